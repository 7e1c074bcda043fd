"""Reader of one file's chunks into memory: page cache, direct I/O or a mapping; it counts every byte."""

from __future__ import annotations

import errno
import os
import threading
import zlib
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from nvfp4_prep._util.buffers import byte_view
from nvfp4_prep._util.system import open_files_error
from nvfp4_prep.checkpoint.small_files import open_regular
from nvfp4_prep.errors import LoadError
from nvfp4_prep.load.mmap_gather import FileMapping
from nvfp4_prep.load.page_cache import cached_pages
from nvfp4_prep.load.read_plan import ALIGNMENT, DIRECT_NBYTES, Chunk, Segment
from nvfp4_prep.load.strided_copy import gather_runs

__all__ = ["FileReader", "ReadCounts"]

_PROBES = 8


@dataclass
class ReadCounts:
    """Counts of what was really read.

    Attributes:
        reads: system calls that returned data.
        read_nbytes: bytes they returned.
        gathered_nbytes: bytes copied out of mappings.
        mapped_nbytes: bytes of the pages that had to be in memory for that; what a cold disk would have to deliver,
            once for all ranks of a host.
        direct_nbytes: the part of ``read_nbytes`` that went past the page cache.
    """

    reads: int = 0
    read_nbytes: int = 0
    gathered_nbytes: int = 0
    mapped_nbytes: int = 0
    direct_nbytes: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes taken out of files."""
        return self.read_nbytes + self.gathered_nbytes

    def add(self, other: ReadCounts) -> None:
        """Add another thread's counts."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


class FileReader:
    """One open file. Methods may be called from several threads, each with its own buffers and counts.

    Attributes:
        path: the file.
        nbytes: its size when it was opened.
        direct: whether long ranges are read past the page cache.
        share_rows: whether whole rows, of which other ranks need their columns too, go through the page cache all the
            same, so that they are read from storage once for all ranks of a host.
        resident: whether what will be read is in the page cache of this machine, on local storage.
    """

    def __init__(self, path: Path, descriptor: int, nbytes: int) -> None:
        """Take over an open file, which :meth:`close` closes.

        Args:
            path: the file.
            descriptor: open for reading.
            nbytes: its size.
        """
        self.path = path
        self.nbytes = nbytes
        self._mapping: FileMapping | None = None
        self._lock = threading.Lock()
        self._descriptor, self._direct_descriptor = descriptor, -1
        self.direct = self.resident = self.share_rows = False

    @classmethod
    def open(cls, path: Path, *, direct: bool = False) -> FileReader:
        """Open a file.

        Args:
            path: the file.
            direct: read long ranges past the page cache where the file system allows.

        Raises:
            LoadError: if it cannot be opened.
        """
        reader = cls(path, *open_regular(path, LoadError, "Copy or download it again."))
        try:
            if direct:
                reader._open_direct()
        except LoadError:
            reader.close()
            raise
        return reader

    def close(self) -> None:
        """Close descriptors and mapping. No other thread may read any more."""
        if self._mapping is not None:
            self._mapping.close()
        for descriptor in (self._descriptor, self._direct_descriptor):
            if descriptor >= 0:
                os.close(descriptor)
        self._descriptor = self._direct_descriptor = -1

    @property
    def device(self) -> int:
        """``st_dev`` of the file."""
        return os.fstat(self._descriptor).st_dev

    def cached(self, offset_bytes: int, nbytes: int) -> bool:
        """Return whether most of a range is in the page cache, by a few pages; True where the system does not say."""
        offsets = [offset_bytes + nbytes * probe // _PROBES for probe in range(_PROBES)]
        return cached_pages(self._descriptor, offsets) * 2 >= _PROBES

    def fill(self, tensor: str, chunk: Chunk, target: torch.Tensor, counts: ReadCounts) -> int:
        """Read the segments of a chunk without window, one after the other.

        Args:
            tensor: name for messages.
            chunk: what to read.
            target: ``uint8``; for direct I/O page-aligned and two pages longer than the chunk.
            counts: added to.

        Returns:
            Where in ``target`` the data begins: 0, or less than a page after direct I/O of an unaligned range.

        Raises:
            LoadError: if the file cannot be read or is too short.
        """
        if len(chunk.segments) == 1 and chunk.segments[0].contiguous:
            return self.read_span(tensor, chunk.segments[0], target, counts)
        position = 0
        for segment in chunk.segments:
            part = target[position : position + segment.nbytes]
            if segment.contiguous:
                self._read(tensor, self._descriptor, segment.offset_bytes, byte_view(part), segment.nbytes, counts)
            else:
                self._gather(tensor, segment, part, counts)
            position += segment.nbytes
        return 0

    def read_span(self, tensor: str, segment: Segment, target: torch.Tensor, counts: ReadCounts) -> int:
        """Read everything from a segment's first to its last byte, also what lies between its runs; see :meth:`fill`.

        Returns:
            Where in ``target`` the first run begins.
        """
        if self.direct and (segment.contiguous or not self.share_rows):
            lead = self._read_direct(tensor, segment, target, counts)
            if lead is not None:
                return lead
        nbytes = segment.span_nbytes
        self._read(tensor, self._descriptor, segment.offset_bytes, byte_view(target[:nbytes]), nbytes, counts)
        return 0

    def fill_window(
        self, tensor: str, chunk: Chunk, target: torch.Tensor, scratch: torch.Tensor, crc32: int, counts: ReadCounts
    ) -> int:
        """Read the window of a chunk, add it to a CRC-32 and cut the chunk's segments out; see :meth:`fill`.

        Returns:
            The new CRC-32.
        """
        if chunk.window is None:
            raise ValueError("chunk has no window")
        offset, nbytes = chunk.window
        whole = len(chunk.segments) == 1 and chunk.segments[0].nbytes == nbytes
        window = target[:nbytes] if whole else scratch[:nbytes]
        view = byte_view(window)
        self._read(tensor, self._descriptor, offset, view, nbytes, counts)
        if not whole:
            _cut(chunk.segments, window, offset, target)
        return zlib.crc32(view, crc32)

    def read(self, tensor: str, offset_bytes: int, view: memoryview, nbytes: int, counts: ReadCounts) -> None:
        """Read one range through the page cache into the first ``nbytes`` of ``view``; see :meth:`fill`."""
        exact = view if len(view) == nbytes else view[:nbytes]
        self._read(tensor, self._descriptor, offset_bytes, exact, nbytes, counts)

    def _open_direct(self) -> None:
        flag = getattr(os, "O_DIRECT", None)
        if flag is None:
            return
        try:
            self._direct_descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | flag)
            self.direct = True
        except OSError as error:
            if error.errno != errno.EINVAL:  # EINVAL: this file system has no direct I/O
                refused = LoadError(f"cannot be opened ({error.strerror})", where=str(self.path))
                raise open_files_error(error, str(self.path)) or refused from error

    def _read_direct(self, tensor: str, segment: Segment, target: torch.Tensor, counts: ReadCounts) -> int | None:
        """Return where the data begins, or None where this range, buffer or file system does not fit direct I/O."""
        lead = segment.offset_bytes % ALIGNMENT
        needed = lead + segment.span_nbytes
        rounded = -(-needed // ALIGNMENT) * ALIGNMENT
        # Rounding outwards reads up to two pages more: 0.8 % of the shortest range that is worth it.
        if segment.span_nbytes < DIRECT_NBYTES or len(target) < rounded or target.data_ptr() % ALIGNMENT:
            return None
        before = counts.read_nbytes
        view = byte_view(target[:rounded])
        try:
            self._read(tensor, self._direct_descriptor, segment.offset_bytes - lead, view, needed, counts)
        except LoadError as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EINVAL:
                self.direct = False  # opened, but wants an alignment that we do not have
                return None
            raise
        counts.direct_nbytes += counts.read_nbytes - before
        return lead

    def _read(
        self, tensor: str, descriptor: int, offset: int, view: memoryview, needed: int, counts: ReadCounts
    ) -> None:
        done = 0
        while done < needed:
            try:
                count = os.preadv(descriptor, [view[done:] if done else view], offset + done)
            except OSError as error:
                raise self._failed(tensor, f"read failed at byte {offset + done} ({error.strerror})") from error
            if count == 0:
                raise LoadError(
                    "file ended while it was read",
                    where=self._where(tensor),
                    expected=f"{needed} bytes at {offset}",
                    actual=f"{done} bytes",
                    next_step="It is truncated or was replaced meanwhile: run `nvfp4-prep verify` on the directory.",
                )
            counts.reads += 1
            counts.read_nbytes += count
            done += count

    def _gather(self, tensor: str, segment: Segment, target: torch.Tensor, counts: ReadCounts) -> None:
        mapping = self._map(tensor)
        span = segment.span_nbytes
        if segment.offset_bytes + span > mapping.nbytes:
            raise self._failed(tensor, f"file ended before byte {segment.offset_bytes + span}")
        try:
            mapping.populate(segment.offset_bytes, span)
        except OSError as error:
            raise self._failed(tensor, f"{error.strerror} at byte {segment.offset_bytes}") from error
        gather_runs(mapping.bytes, segment.offset_bytes, segment.run_nbytes, segment.stride_bytes, segment.runs, target)
        mapping.release(segment.offset_bytes, span)
        counts.gathered_nbytes += segment.nbytes
        counts.mapped_nbytes += min(span, segment.runs * (-(-segment.run_nbytes // ALIGNMENT) + 1) * ALIGNMENT)

    def _map(self, tensor: str) -> FileMapping:
        with self._lock:
            if self._mapping is None:
                try:
                    self._mapping = FileMapping.open(self._descriptor, self.nbytes)
                except OSError as error:
                    raise self._failed(tensor, str(error.strerror)) from error
            return self._mapping

    def _where(self, tensor: str) -> str:
        return f"{self.path}, tensor {tensor!r}"

    def _failed(self, tensor: str, what: str) -> LoadError:
        return LoadError(
            what,
            where=self._where(tensor),
            next_step="Check the disk and the file: run `nvfp4-prep verify` on the directory.",
        )


def _cut(segments: tuple[Segment, ...], window: torch.Tensor, offset: int, target: torch.Tensor) -> None:
    position = 0
    for segment in segments:
        part = target[position : position + segment.nbytes]
        begin = segment.offset_bytes - offset
        gather_runs(window, begin, segment.run_nbytes, segment.stride_bytes, segment.runs, part)
        position += segment.nbytes
