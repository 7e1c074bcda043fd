"""A local directory as a source."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from nvfp4_prep.checkpoint.descriptor_pool import DescriptorPool
from nvfp4_prep.checkpoint.local_files import ListedFile, check_state, list_files, open_listed, read_exactly
from nvfp4_prep.checkpoint.safetensors_header import header_nbytes, parse_header
from nvfp4_prep.checkpoint.source import SourceFile
from nvfp4_prep.checkpoint.tensors import ShardHeader
from nvfp4_prep.errors import OpenFilesError, SourceError

__all__ = ["LocalSource"]


class LocalSource:
    """A directory as a quantizer or the Hub left it. Nothing in it is ever written.

    Symbolic links may point to files inside the directory, and, in a snapshot of the Hub's cache, to its ``blobs``.
    A file is read only while it is the one that was listed: size, both times, inode and device.
    """

    revision: str | None = None
    sequential = False

    def __init__(self, root: Path) -> None:
        """Open a directory.

        Raises:
            SourceError: if it does not exist, is not a directory, cannot be listed, or holds what is not a file.
        """
        if "\0" in str(root):
            raise SourceError("a path cannot hold a NUL character", where=ascii(str(root)))
        self.root = Path(os.path.realpath(root))  # resolve() fails on a loop of links
        self._shown = self.root if root.name in ("", "..") else root  # "." would leave the bare file names
        self.label = os.fsencode(self.root.name or "checkpoint").decode("utf-8", "backslashreplace")
        if not root.is_dir():
            what = "is not a directory" if root.exists() else "does not exist"
            raise SourceError(what, where=str(root), next_step="Give the directory that holds config.json.")
        blobs = self._cache_blobs()
        if blobs is not None:
            repository = self.root.parent.parent.name
            self.label = repository.removeprefix("models--").replace("--", "/")
            self.revision = self.root.name
        self._listed = list_files(self.root, root, [self.root] if blobs is None else [self.root, blobs])
        self._descriptors = DescriptorPool(self._open, where=self.where)

    def _cache_blobs(self) -> Path | None:
        blobs = self.root.parent.parent / "blobs"
        return blobs.resolve() if self.root.parent.name == "snapshots" and blobs.is_dir() else None

    def where(self, file: str = "") -> str:
        """Return the path of a file for errors, as the user gave the directory."""
        return str(self._shown / file)

    def files(self) -> tuple[SourceFile, ...]:
        """Return all files, sorted by name; hidden ones left out."""
        return tuple(SourceFile(file.name, file.state.nbytes, file.state.identity) for file in self._listed.values())

    def header(self, file: str) -> ShardHeader:
        """See :class:`~nvfp4_prep.checkpoint.source.Source`."""
        where, nbytes = self.where(file), self._file(file).state.nbytes
        length = header_nbytes(where, self.peek(file, 0, min(8, nbytes)), nbytes)
        return parse_header(file, self.peek(file, 0, 8 + length), nbytes, where=where)

    def peek(self, file: str, offset_bytes: int, nbytes: int) -> bytes:
        """See :class:`~nvfp4_prep.checkpoint.source.Source`."""
        buffer = bytearray(nbytes)
        self.read_into(file, offset_bytes, memoryview(buffer))
        return bytes(buffer)

    def schedule(self, shards: Sequence[str], at_once_nbytes: int = 0) -> None:
        """Do nothing: the files are here."""

    def room_nbytes(self, shards: Sequence[str], at_once_nbytes: int) -> int:
        """Return 0: the files are here."""
        return 0

    def read_into(self, file: str, offset_bytes: int, buffer: memoryview) -> None:
        """See :class:`~nvfp4_prep.checkpoint.source.Source`."""
        with self._descriptors.use(file) as descriptor:
            read_exactly(descriptor, self.where(file), offset_bytes, buffer)

    def _file(self, file: str) -> ListedFile:
        try:
            return self._listed[file]
        except KeyError:
            raise SourceError(
                "cannot be opened (it was not there when the directory was listed)", where=self.where(file)
            ) from None

    def _open(self, file: str) -> int:
        return open_listed(self.root / file, self._file(file), self.where(file))

    def will_read(self, file: str, offset_bytes: int, nbytes: int) -> None:
        """Start the kernel's read-ahead. A file that cannot be opened fails when it is read, with its name."""
        with suppress(OSError, SourceError, OpenFilesError), self._descriptors.use(file) as descriptor:
            os.posix_fadvise(descriptor, offset_bytes, nbytes, os.POSIX_FADV_WILLNEED)

    def release(self, shard: str) -> None:
        """Close the shard's descriptor; reading it again opens it again."""
        self._descriptors.forget(shard)

    def check_unchanged(self) -> None:
        """See :class:`~nvfp4_prep.checkpoint.source.Source`.

        Goes by size, modification and change time, inode and device.
        """
        for file in self._listed.values():
            where = self.where(file.name)
            try:
                status = (self.root / file.name).stat()
            except OSError as error:
                raise SourceError(
                    f"has gone meanwhile ({error.strerror})",
                    where=where,
                    next_step="Put it back, and convert again with --restart.",
                ) from error
            check_state(file.state, status, where)

    def interrupt(self) -> None:
        """Do nothing: no read waits here."""

    def close(self) -> None:
        """Close all descriptors."""
        self._descriptors.close()
