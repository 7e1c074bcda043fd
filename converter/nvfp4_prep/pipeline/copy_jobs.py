"""Jobs that copy bytes unchanged: passed-through tensors and side files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

from nvfp4_prep._util.buffers import byte_view, empty_bytes
from nvfp4_prep.checkpoint.source import Source, SourceFile
from nvfp4_prep.moe.layers import ByteRange
from nvfp4_prep.pipeline.jobs import UNIT_NBYTES, FileJob, Unit, UnitResult
from nvfp4_prep.planning.plan import OutputFile

__all__ = ["copy_units", "passthrough_job", "side_file_job", "values_job"]


def copy_units(source: Source, ranges: Iterable[ByteRange], offset_bytes: int) -> Iterator[Unit]:
    """Yield units that write the ranges one after the other from an offset on.

    Small ranges share a unit, large ones are cut.
    """
    batch: list[ByteRange] = []
    begin = offset_bytes
    held = 0
    for whole in ranges:
        done = 0
        while done < whole.nbytes:
            nbytes = min(whole.nbytes - done, UNIT_NBYTES - held)
            batch.append(ByteRange(whole.file, whole.offset_bytes + done, nbytes, whole.tensor))
            done += nbytes
            held += nbytes
            if held == UNIT_NBYTES:
                yield _copy_unit(source, tuple(batch), begin, held)
                begin, held, batch = begin + held, 0, []
    if batch:
        yield _copy_unit(source, tuple(batch), begin, held)


def _copy_unit(source: Source, ranges: tuple[ByteRange, ...], offset_bytes: int, nbytes: int) -> Unit:
    def work() -> UnitResult:
        view = byte_view(empty_bytes(nbytes))
        position = 0
        for part in ranges:
            source.read_into(part.file, part.offset_bytes, view[position : position + part.nbytes])
            position += part.nbytes
        return UnitResult(pieces=[(offset_bytes, view)])

    return Unit(nbytes, work)


def passthrough_job(file: OutputFile, source: Source) -> FileJob:
    """Return the job that writes a file of passed-through tensors."""
    ranges = [ByteRange(copy.file, copy.offset_bytes, copy.nbytes, copy.name) for copy in file.copies]
    return FileJob(file.name, file.nbytes, file.header, lambda: copy_units(source, ranges, len(file.header)))


def side_file_job(file: SourceFile, source: Source) -> FileJob:
    """Return the job that copies a file as it is."""
    whole = ByteRange(file.name, 0, file.nbytes, file.name)
    return FileJob(file.name, file.nbytes, b"", lambda: copy_units(source, [whole], 0))


def values_job(file: OutputFile, values: dict[str, bytes]) -> FileJob:
    """Return the job that writes a file whose tensors' bytes are known, by name."""

    def units() -> Iterator[Unit]:
        for record in file.records:
            data = memoryview(values[record.name])
            yield Unit(len(data), partial(UnitResult, [(record.offset_bytes, data)]))

    return FileJob(file.name, file.nbytes, file.header, units)
