"""Where a checkpoint's bytes come from: the protocol that all sources follow, and the local directory.

Everything after planning asks a source for byte ranges of named files; only the source knows whether they are on disk
or must be downloaded first.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from nvfp4_prep.errors import SourceError
from nvfp4_prep.paths import is_safe_name
from nvfp4_prep.safetensors_io import ShardHeader, read_header

__all__ = ["LocalSource", "Source", "SourceFile", "read_exactly"]


@dataclass(frozen=True)
class SourceFile:
    """One file of a source.

    Attributes:
        name: path relative to the source, with forward slashes.
        nbytes: size.
        identity: changes when the content does: modification time locally, content hash on the Hub.
    """

    name: str
    nbytes: int
    identity: str


class Source(Protocol):
    """A checkpoint's files. Methods may be called from several threads.

    Attributes:
        label: what the manifest calls the source: Hub id or directory name, never a local path.
        revision: resolved commit, where the source has one.
    """

    label: str
    revision: str | None

    def files(self) -> tuple[SourceFile, ...]:
        """All files, sorted by name."""
        ...

    def header(self, file: str) -> ShardHeader:
        """The checked safetensors header of a shard, without downloading the shard."""
        ...

    def peek(self, file: str, offset_bytes: int, nbytes: int) -> bytes:
        """A small range, read while planning, without downloading the shard."""
        ...

    def schedule(self, shards: Sequence[str], at_once_nbytes: int = 0) -> None:
        """Announces the shards that will be read, in order of first use, and how many bytes of them are needed at
        once."""
        ...

    def room_nbytes(self, shards: Sequence[str], at_once_nbytes: int) -> int:
        """Disk room beside the target's files that a schedule with the same arguments takes."""
        ...

    def read_into(self, file: str, offset_bytes: int, buffer: memoryview) -> None:
        """Fills ``buffer`` with the bytes from ``offset_bytes``; waits for the shard where it is not there yet."""
        ...

    def will_read(self, file: str, offset_bytes: int, nbytes: int) -> None:
        """A hint that a range will be read soon; does not wait and does not fail."""
        ...

    def release(self, shard: str) -> None:
        """Says that a scheduled shard is needed no more."""
        ...

    def check_unchanged(self) -> None:
        """Raises :class:`SourceError` if a file is not the one that was listed any more."""
        ...

    def interrupt(self) -> None:
        """Makes waiting and further reads of what is not there yet fail: the run has failed elsewhere."""
        ...

    def close(self) -> None:
        """Gives back descriptors and temporary files."""
        ...


def read_exactly(descriptor: int, where: str, offset_bytes: int, buffer: memoryview) -> None:
    """Fills ``buffer`` from a file descriptor.

    Raises:
        SourceError: on an I/O error, or if the file ends before the buffer is full.
    """
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(descriptor, [buffer[done:]], offset_bytes + done)
        except OSError as error:
            raise SourceError(
                f"read failed at byte {offset_bytes + done} ({error.strerror})",
                where=where,
                next_step="Check the disk; the same command continues.",
            ) from error
        if count == 0:
            raise SourceError(
                "file ended while it was read",
                where=where,
                expected=f"{len(buffer)} bytes at {offset_bytes}",
                actual=f"{done} bytes",
                next_step="It was truncated meanwhile: restore it and run the same command again.",
            )
        done += count


class LocalSource:
    """A directory as a quantizer or the Hub left it. Nothing in it is ever written.

    Symbolic links may point to files inside the directory, and, in a snapshot of the Hub's cache, to its ``blobs``.
    """

    revision: str | None = None

    def __init__(self, root: Path) -> None:
        """Opens a directory.

        Raises:
            SourceError: if it does not exist, is no directory or cannot be listed.
        """
        self.root = Path(os.path.realpath(root))  # resolve() fails on a loop of links
        self.label = self.root.name or "checkpoint"
        if not root.is_dir():
            what = "is no directory" if root.exists() else "does not exist"
            raise SourceError(what, where=str(root), next_step="Give the directory that holds config.json.")
        self._blobs = self._cache_blobs()
        if self._blobs is not None:
            repository = self.root.parent.parent.name
            self.label = repository.removeprefix("models--").replace("--", "/")
            self.revision = self.root.name
        self._files = tuple(sorted(self._walk(self.root), key=lambda file: file.name))
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()

    def _cache_blobs(self) -> Path | None:
        blobs = self.root.parent.parent / "blobs"
        return blobs.resolve() if self.root.parent.name == "snapshots" and blobs.is_dir() else None

    def _walk(self, folder: Path) -> Iterator[SourceFile]:
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise SourceError(
                f"cannot be listed ({error.strerror})", where=str(folder), next_step="Check its permissions."
            ) from error
        for entry in entries:
            path = Path(entry.path)
            if entry.name.startswith("."):
                continue  # .git, .cache, .gitattributes: of the repository, not of the checkpoint
            if entry.is_symlink():
                self._check_link(path)
            if path.is_dir():
                if entry.is_symlink():
                    raise SourceError("is a symbolic link to a directory", where=str(path), next_step="Replace it.")
                yield from self._walk(path)
            elif path.is_file():
                yield self._file(path.relative_to(self.root).as_posix(), path.stat())
            else:
                raise SourceError("is neither a file nor a directory", where=str(path), next_step="Remove it.")

    @staticmethod
    def _file(name: str, status: os.stat_result) -> SourceFile:
        if not is_safe_name(name):
            raise SourceError(
                "file name cannot be kept in a manifest", where=repr(name), next_step="Rename the file, or remove it."
            )
        return SourceFile(name, status.st_size, f"mtime_ns={status.st_mtime_ns}")

    def _check_link(self, path: Path) -> None:
        target = Path(os.path.realpath(path))
        allowed = [self.root] if self._blobs is None else [self.root, self._blobs]
        if not any(target.is_relative_to(folder) for folder in allowed):
            raise SourceError(
                "symbolic link leaves the source",
                where=str(path),
                actual=target,
                next_step="Copy the file into the source directory, if you trust it.",
            )
        if not target.exists():
            raise SourceError(
                "symbolic link to a file that does not exist",
                where=str(path),
                actual=target,
                next_step="Complete the download, or remove the link.",
            )

    def files(self) -> tuple[SourceFile, ...]:
        """All files, sorted by name; hidden ones left out."""
        return self._files

    def header(self, file: str) -> ShardHeader:
        """See :class:`Source`."""
        return read_header(self.root / file, file)

    def peek(self, file: str, offset_bytes: int, nbytes: int) -> bytes:
        """See :class:`Source`."""
        buffer = bytearray(nbytes)
        self.read_into(file, offset_bytes, memoryview(buffer))
        return bytes(buffer)

    def schedule(self, shards: Sequence[str], at_once_nbytes: int = 0) -> None:
        """Nothing to fetch: the files are here."""

    def room_nbytes(self, shards: Sequence[str], at_once_nbytes: int) -> int:
        """None: the files are here."""
        return 0

    def read_into(self, file: str, offset_bytes: int, buffer: memoryview) -> None:
        """See :class:`Source`."""
        read_exactly(self._descriptor(file), file, offset_bytes, buffer)

    def _descriptor(self, file: str) -> int:
        with self._lock:
            if file not in self._descriptors:
                try:
                    self._descriptors[file] = os.open(self.root / file, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise SourceError(
                        f"cannot be opened ({error.strerror})", where=file, next_step="Check its permissions."
                    ) from error
            return self._descriptors[file]

    def will_read(self, file: str, offset_bytes: int, nbytes: int) -> None:
        """Starts the kernel's read-ahead. A file that cannot be opened fails when it is read, with its name."""
        with suppress(OSError, SourceError):
            os.posix_fadvise(self._descriptor(file), offset_bytes, nbytes, os.POSIX_FADV_WILLNEED)

    def release(self, shard: str) -> None:
        """Closes the shard's descriptor; reading it again opens it again."""
        with self._lock:
            descriptor = self._descriptors.pop(shard, None)
        if descriptor is not None:
            os.close(descriptor)

    def check_unchanged(self) -> None:
        """See :class:`Source`. Goes by size and modification time."""
        for file in self._files:
            try:
                now = self._file(file.name, (self.root / file.name).stat())
            except OSError as error:
                raise SourceError(f"has gone meanwhile ({error.strerror})", where=file.name) from error
            if now != file:
                raise SourceError(
                    "changed while it was converted",
                    where=file.name,
                    expected=f"{file.nbytes} bytes, {file.identity}",
                    actual=f"{now.nbytes} bytes, {now.identity}",
                    next_step="Let nothing write to the source, and convert again with --restart.",
                )

    def interrupt(self) -> None:
        """Nothing waits here."""

    def close(self) -> None:
        """Closes all descriptors."""
        with self._lock:
            descriptors, self._descriptors = self._descriptors, {}
        for descriptor in descriptors.values():
            with suppress(OSError):
                os.close(descriptor)
