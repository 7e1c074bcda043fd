"""The protocol of sources: the files of a checkpoint, on this disk or on the Hub.

Everything after planning asks a source for byte ranges of named files; only the source knows whether they are on disk
or must be downloaded first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from nvfp4_prep.checkpoint.tensors import ShardHeader

__all__ = ["Source", "SourceFile"]


@dataclass(frozen=True)
class SourceFile:
    """One file of a source.

    Attributes:
        name: path relative to the source, with forward slashes.
        nbytes: size.
        identity: changes when the content does: modification and change time locally, content hash on the Hub. The
            same on every machine that sees the file, so that a run may go on elsewhere.
    """

    name: str
    nbytes: int
    identity: str


class Source(Protocol):
    """A checkpoint's files. Methods may be called from several threads.

    Attributes:
        label: what the manifest calls the source: Hub id or directory name, never a local path.
        revision: resolved commit, where the source has one.
        sequential: whether the output's files must be made one after the other, because there is room for the shards
            of one (see :meth:`schedule`).
    """

    label: str
    revision: str | None
    sequential: bool

    def where(self, file: str = "") -> str:
        """Return what errors call the source, or one of its files: the whole path of a local one."""
        ...

    def files(self) -> tuple[SourceFile, ...]:
        """Return all files, sorted by name."""
        ...

    def header(self, file: str) -> ShardHeader:
        """Return the checked safetensors header of a shard, without downloading the shard."""
        ...

    def peek(self, file: str, offset_bytes: int, nbytes: int) -> bytes:
        """Return a small range, read while planning, without downloading the shard."""
        ...

    def schedule(self, shards: Sequence[str], at_once_nbytes: int = 0) -> None:
        """Announce the shards that will be read, in order of first use, and how many bytes of them are needed at
        once."""
        ...

    def room_nbytes(self, shards: Sequence[str], at_once_nbytes: int) -> int:
        """Return the disk space, beside the target's files, that a schedule with the same arguments takes."""
        ...

    def read_into(self, file: str, offset_bytes: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the bytes from ``offset_bytes``; waits for the shard where it is not there yet."""
        ...

    def will_read(self, file: str, offset_bytes: int, nbytes: int) -> None:
        """Hint that a range will be read soon; never waits and never fails."""
        ...

    def release(self, shard: str) -> None:
        """Say that a scheduled shard is needed no more."""
        ...

    def check_unchanged(self) -> None:
        """Raise :class:`SourceError` if a file is not the one that was listed any more."""
        ...

    def interrupt(self) -> None:
        """Make waiting and further reads of what is not there yet fail: the run has failed elsewhere."""
        ...

    def close(self) -> None:
        """Give back descriptors and temporary files."""
        ...
