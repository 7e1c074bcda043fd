"""Sinks: where finished files go beyond the target directory."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from nvfp4_prep.options import ConvertOptions

__all__ = ["FILES_AT_ONCE", "FileSink", "KeepFiles", "PublishedFiles", "stream_room_nbytes"]

FILES_AT_ONCE = 3
"""With ``stream_out``, room for so many files of the largest size: one being made, one waiting, one on its way."""


class FileSink(Protocol):
    """A taker of every file of a conversion as soon as it is finished. Methods are called from several threads.

    Attributes:
        sequential: whether files must be made one after the other, because there is room for a few of them.
    """

    sequential: bool

    def begin(self, source: str, revision: str | None, options: ConvertOptions, sizes: Mapping[str, int]) -> None:
        """Take note of the planned files: ``sizes`` are those of all that the conversion will write.

        Raises:
            NvfpPrepError: if the files could not be taken.
        """
        ...

    def holds(self, name: str, nbytes: int, sha256: str | None) -> bool:
        """Return whether a file that was written before was taken from the directory, and so need not be there."""
        ...

    def room_nbytes(self, sizes: Mapping[str, int]) -> int:
        """Return the room in the directory that files of these sizes take at most, all the time."""
        ...

    def before_file(self, name: str, nbytes: int, stop: threading.Event) -> None:
        """Wait until there is space for a file that is about to be created, or ``stop`` is set."""
        ...

    def file_done(self, name: str, path: Path, nbytes: int, sha256: str | None) -> None:
        """Take over a file that has its final name now."""
        ...

    def drain(self) -> None:
        """Wait until everything is taken.

        Raises:
            NvfpPrepError: if something could not be taken.
        """
        ...

    def interrupt(self) -> None:
        """End all waiting: the conversion has failed."""
        ...


class KeepFiles:
    """The sink that leaves everything in the directory."""

    sequential = False

    def begin(self, source: str, revision: str | None, options: ConvertOptions, sizes: Mapping[str, int]) -> None:
        """Accept everything."""

    def holds(self, name: str, nbytes: int, sha256: str | None) -> bool:
        """Return ``False``: the files are in the directory."""
        return False

    def room_nbytes(self, sizes: Mapping[str, int]) -> int:
        """Return all of them."""
        return sum(sizes.values())

    def before_file(self, name: str, nbytes: int, stop: threading.Event) -> None:
        """Do nothing: the space was checked."""

    def file_done(self, name: str, path: Path, nbytes: int, sha256: str | None) -> None:
        """Do nothing: the file stays."""

    def drain(self) -> None:
        """Do nothing: no file waits."""

    def interrupt(self) -> None:
        """Do nothing: no thread waits here."""


def stream_room_nbytes(sizes: Mapping[str, int]) -> int:
    """Return the room in the target that files of these sizes take at most with ``stream_out``."""
    everything, largest = sum(sizes.values()), max(sizes.values(), default=0)
    small = sum(nbytes for name, nbytes in sizes.items() if not name.endswith(".safetensors"))
    return min(everything, FILES_AT_ONCE * largest + small)


class PublishedFiles(KeepFiles):
    """The sink of a preview of ``stream_out``, which asks no Hub: what was published is taken to be there still."""

    def holds(self, name: str, nbytes: int, sha256: str | None) -> bool:
        """Return whether the file has a digest, without which none was published."""
        return sha256 is not None

    def room_nbytes(self, sizes: Mapping[str, int]) -> int:
        """See :class:`~nvfp4_prep.output.sink.FileSink`."""
        return stream_room_nbytes(sizes)
