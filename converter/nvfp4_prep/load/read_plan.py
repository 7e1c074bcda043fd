"""Plan of the byte ranges of a file that become a rank's parameter: index arithmetic, no data.

A parameter is ``uint8 [slots, rows, bytes per row]``, one slot for each expert that the rank holds. It is filled in
:class:`Chunk`s: contiguous bytes of the parameter, small enough for one staging buffer, each made of a few
:class:`Segment`s of the file. Whole experts that follow each other in file and parameter become one long range.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nvfp4_prep.checkpoint.safetensors_header import TensorRecord
from nvfp4_prep_kernels import ExpertSlice

__all__ = ["ALIGNMENT", "DIRECT_NBYTES", "LONG_RUN_NBYTES", "Chunk", "Segment", "Task", "pieces", "plan_reads"]

ALIGNMENT = 4096
"""Chunks end at multiples of this in the file, so that neighbouring reads share no page and direct I/O fits."""
LONG_RUN_NBYTES = 64 * 1024
"""Runs from this size on are read one by one; shorter ones (columns of w2) with what lies between them, or mapped."""
DIRECT_NBYTES = 1024 * 1024
"""Ranges from this size on get a chunk of their own, as direct I/O needs."""


@dataclass(frozen=True, slots=True)
class Segment:
    """``runs`` runs of ``run_nbytes`` bytes, ``stride_bytes`` apart, from byte ``offset_bytes`` of the file.

    In the parameter the runs follow each other without gaps. A plan has one range of the file as one run.
    """

    offset_bytes: int
    run_nbytes: int
    stride_bytes: int
    runs: int

    @property
    def nbytes(self) -> int:
        """Bytes that the parameter takes."""
        return self.runs * self.run_nbytes

    @property
    def span_nbytes(self) -> int:
        """Bytes of the file from the first to the last byte taken."""
        return (self.runs - 1) * self.stride_bytes + self.run_nbytes

    @property
    def contiguous(self) -> bool:
        """Whether it is one range of the file."""
        return self.runs == 1 or self.stride_bytes == self.run_nbytes


@dataclass(frozen=True, slots=True)
class Chunk:
    """Bytes ``[destination_bytes, destination_bytes + nbytes)`` of the parameter.

    With a ``window`` (``offset, size`` in the file), the whole window is read and checksummed and the segments, which
    lie inside, are cut out of it; there may be none. Without one, only the segments are read. With ``sliced`` the one
    segment has many runs, which are cut out of everything from its first to its last byte, read at once. With ``long``
    the one segment is a range of any length, which the reading threads divide among themselves.
    """

    destination_bytes: int
    nbytes: int
    segments: tuple[Segment, ...]
    window: tuple[int, int] | None = None
    sliced: bool = False
    long: bool = False


@dataclass(frozen=True, slots=True)
class Task:
    """Chunks that one thread does in their order.

    Attributes:
        path, tensor: for opening and for messages.
        chunks: what to read.
        expert: the one expert whose stored bytes the windows cover in order, where a checksum is to be compared.
        crc32: its expected CRC-32.
    """

    path: Path
    tensor: str
    chunks: tuple[Chunk, ...]
    expert: int | None = None
    crc32: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the parameter that it fills."""
        return sum(chunk.nbytes for chunk in self.chunks)

    @property
    def units(self) -> int:
        """Count that reaches zero when it is complete: its bytes, and the comparison of a checksum."""
        return self.nbytes + (self.crc32 is not None)


def plan_reads(
    path: Path,
    record: TensorRecord,
    part: ExpertSlice,
    experts: Sequence[int],
    chunk_nbytes: int,
    crc32: Sequence[int] | None = None,
    *,
    mapped: bool = False,
    divided: bool = False,
) -> tuple[Task, ...]:
    """Plan the reads that fill one parameter.

    Args:
        path: the file.
        record: the stored tensor, ``[E, …]``.
        part: the rank's share of one expert.
        experts: for each slot of the parameter the stored expert; any order, repetitions allowed.
        chunk_nbytes: size of a staging buffer; at least :data:`ALIGNMENT`.
        crc32: the stored experts' checksums. If given, every expert is read whole, once for each slot: a checksum
            says nothing about a part.
        mapped: short runs will be gathered from a mapping; otherwise they are cut out of long ranges.
        divided: ranges longer than a staging buffer are planned as one, for the reading threads to divide.

    Returns:
        Tasks in ascending order of their place in the file.
    """
    stored = record.nbytes // record.shape[0]
    if crc32 is None:
        chunks = _chunks(record.offset_bytes, stored, part, experts, chunk_nbytes, mapped, divided)
        tasks = [Task(path, record.name, (chunk,)) for chunk in chunks]
    else:
        tasks = [
            Task(
                path,
                record.name,
                tuple(_windows(record.offset_bytes + expert * stored, stored, part, slot * part.nbytes, chunk_nbytes)),
                expert,
                crc32[expert],
            )
            for slot, expert in enumerate(experts)
        ]
    return tuple(sorted(tasks, key=_first_byte))


def _first_byte(task: Task) -> int:
    first = task.chunks[0]
    return first.window[0] if first.window is not None else first.segments[0].offset_bytes


def _chunks(
    begin: int, stored: int, part: ExpertSlice, experts: Sequence[int], chunk_nbytes: int, mapped: bool, divided: bool
) -> Iterator[Chunk]:
    """Pack segments into chunks; long ranges get chunks of their own, which direct I/O needs, and so do whole rows."""
    destination, pending, size = 0, list[Segment](), 0
    for segment in _merged(begin, stored, part, experts):
        long = divided and segment.contiguous and segment.nbytes > chunk_nbytes
        for piece in [segment] if long else _split(segment, chunk_nbytes, mapped):
            sliced = not (mapped or piece.contiguous)
            alone = long or sliced or (piece.contiguous and piece.nbytes >= DIRECT_NBYTES)
            if pending and (alone or size + piece.nbytes > chunk_nbytes):
                yield Chunk(destination, size, tuple(pending))
                destination, pending, size = destination + size, [], 0
            pending.append(piece)
            size += piece.nbytes
            if alone:
                yield Chunk(destination, size, tuple(pending), sliced=sliced, long=long)
                destination, pending, size = destination + size, [], 0
    if pending:
        yield Chunk(destination, size, tuple(pending))


def _merged(begin: int, stored: int, part: ExpertSlice, experts: Sequence[int]) -> Iterator[Segment]:
    """Yield the segments of all slots in the parameter's order, neighbours in the file joined."""
    last: Segment | None = None
    if part.nbytes == stored and part.runs == 1:
        for first, count in _consecutive(experts):
            yield Segment(begin + first * stored, count * stored, count * stored, 1)
        return
    for expert in experts:
        for segment in _segments(begin + expert * stored, part):
            joined = None if last is None else _joined(last, segment)
            if joined is not None:
                last = joined
                continue
            if last is not None:
                yield last
            last = segment
    if last is not None:
        yield last


def _consecutive(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Return the first of each run of numbers that follow each other, and how many they are."""
    first = count = 0
    for number in numbers:
        if count and number == first + count:
            count += 1
            continue
        if count:
            yield first, count
        first, count = number, 1
    if count:
        yield first, count


def _joined(last: Segment, following: Segment) -> Segment | None:
    """Return both as one: ranges that adjoin, or equal runs that go on at the same distance."""
    if last.contiguous and following.contiguous:
        nbytes = last.nbytes + following.nbytes
        adjoin = last.offset_bytes + last.nbytes == following.offset_bytes
        return Segment(last.offset_bytes, nbytes, nbytes, 1) if adjoin else None
    pattern = (last.run_nbytes, last.stride_bytes)
    goes_on = last.offset_bytes + last.runs * last.stride_bytes == following.offset_bytes
    if goes_on and not following.contiguous and pattern == (following.run_nbytes, following.stride_bytes):
        return Segment(last.offset_bytes, *pattern, last.runs + following.runs)
    return None


def _segments(begin: int, part: ExpertSlice) -> Iterator[Segment]:
    whole = Segment(begin + part.offset_bytes, part.run_nbytes, part.stride_bytes, part.runs)
    if whole.contiguous:
        yield Segment(whole.offset_bytes, whole.nbytes, whole.nbytes, 1)
        return
    if part.run_nbytes < LONG_RUN_NBYTES:
        yield whole
        return
    for run in range(part.runs):
        yield Segment(whole.offset_bytes + run * part.stride_bytes, part.run_nbytes, part.run_nbytes, 1)


def _split(segment: Segment, limit: int, mapped: bool) -> Iterator[Segment]:
    """Yield the pieces of at most ``limit`` bytes, to be read or, if ``mapped``, to be taken.

    They end at page boundaries of the file, or between runs.
    """
    if (segment.nbytes if mapped else segment.span_nbytes) <= limit:
        yield segment
    elif segment.contiguous:
        position, end = segment.offset_bytes, segment.offset_bytes + segment.nbytes
        while position < end:
            stop = min(end, (position + limit) // ALIGNMENT * ALIGNMENT)
            yield Segment(position, stop - position, stop - position, 1)
            position = stop
    else:
        step = (
            limit // segment.run_nbytes if mapped else max(1, (limit - segment.run_nbytes) // segment.stride_bytes + 1)
        )
        for run in range(0, segment.runs, step):
            offset = segment.offset_bytes + run * segment.stride_bytes
            yield Segment(offset, segment.run_nbytes, segment.stride_bytes, min(step, segment.runs - run))


def pieces(segment: Segment, limit: int) -> range:
    """Return where the pieces of a long range begin in the file, and where they end: at the next one, or its end.

    The first one may begin before the range does. Pieces end at page boundaries, as those of other plans do.

    Args:
        segment: contiguous.
        limit: of a piece, a multiple of :data:`ALIGNMENT`.
    """
    begin = segment.offset_bytes // ALIGNMENT * ALIGNMENT
    return range(begin, segment.offset_bytes + segment.nbytes, limit)


def _windows(begin: int, stored: int, part: ExpertSlice, destination: int, limit: int) -> Iterator[Chunk]:
    """Yield one expert in windows of at most ``limit`` bytes, each with the segments inside."""
    position, end = begin, begin + stored
    while position < end:
        stop = min(end, (position + limit) // ALIGNMENT * ALIGNMENT)
        segments = tuple(_inside(begin, part, position, stop))
        size = sum(segment.nbytes for segment in segments)
        yield Chunk(destination, size, segments, (position, stop - position))
        destination += size
        position = stop


def _inside(begin: int, part: ExpertSlice, start: int, stop: int) -> Iterator[Segment]:
    """Yield the parts of an expert's runs in ``[start, stop)`` of the file: cut runs at both ends, whole between."""
    origin = begin + part.offset_bytes
    if part.runs == 1 or part.stride_bytes == part.run_nbytes:
        low, high = max(start, origin), min(stop, origin + part.nbytes)
        if low < high:
            yield Segment(low, high - low, high - low, 1)
        return
    first = max(0, (start - origin) // part.stride_bytes)
    last = min(part.runs, -(-(stop - origin) // part.stride_bytes))
    run = first
    while run < last:
        low = origin + run * part.stride_bytes
        high = low + part.run_nbytes
        if low >= start and high <= stop:
            whole = min(last - run, (stop - low - part.run_nbytes) // part.stride_bytes + 1)
            yield Segment(low, part.run_nbytes, part.stride_bytes, whole)
            run += whole
            continue
        low, high = max(low, start), min(high, stop)
        if low < high:
            yield Segment(low, high - low, high - low, 1)
        run += 1
