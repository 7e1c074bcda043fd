"""Files of a local directory: listed without recursion, and opened only as the regular files that were listed."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nvfp4_prep._util.system import open_files_error
from nvfp4_prep.checkpoint.filenames import is_safe_name
from nvfp4_prep.errors import SourceError

__all__ = [
    "MAX_FOLDER_DEPTH",
    "FileState",
    "ListedFile",
    "NotRegularError",
    "check_state",
    "list_files",
    "open_listed",
    "read_exactly",
    "regular_descriptor",
]

MAX_FOLDER_DEPTH = 64
"""Deepest nesting of folders in a checkpoint."""
_CHANGED = "Let nothing write there while a command runs; a conversion has to begin anew, with --restart."


@dataclass(frozen=True)
class FileState:
    """State that tells a file from another one, or from itself after a change, within one run on one machine.

    The change time and the inode show what size and modification time do not: those can be set back. The device number
    differs between machines and between boots, so it stays out of everything that is stored.
    """

    nbytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    device: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileState:
        """Return the state that a ``stat`` found."""
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev)

    @property
    def identity(self) -> str:
        """The part that is the same on every machine that sees the file system, after every boot."""
        return f"mtime_ns={self.mtime_ns} ctime_ns={self.ctime_ns}"

    def __str__(self) -> str:
        return f"{self.nbytes} bytes, {self.identity}, inode {self.inode} of device {self.device}"


@dataclass(frozen=True)
class ListedFile:
    """A file as it was listed.

    Attributes:
        name: path relative to the directory, with forward slashes.
        state: of the file itself, behind a link where there is one.
        is_link: whether the name was a symbolic link, whose target the listing has checked.
    """

    name: str
    state: FileState
    is_link: bool


def list_files(root: Path, shown: Path, link_roots: Sequence[Path]) -> Mapping[str, ListedFile]:
    """Return the files below a directory by name, sorted; hidden files and folders are left out.

    Args:
        root: the directory, without links in its path.
        shown: the directory as errors name it.
        link_roots: directories to which symbolic links may lead, without links in their paths.

    Raises:
        SourceError: if something is not a file or a folder, leads elsewhere, or cannot be listed or named.
    """
    found = {file.name: file for file in _walk(root, shown, link_roots)}
    return dict(sorted(found.items()))


def _walk(root: Path, shown: Path, link_roots: Sequence[Path]) -> Iterator[ListedFile]:
    waiting: list[tuple[str, ...]] = [()]
    while waiting:
        parts = waiting.pop()
        if len(parts) > MAX_FOLDER_DEPTH:
            raise SourceError(
                "folders are nested too deep",
                where=str(shown / parts[0]),
                expected=f"at most {MAX_FOLDER_DEPTH} levels",
                actual="more",
                next_step="Remove what does not belong to the checkpoint.",
            )
        folder = root.joinpath(*parts)
        for name in _names(folder, shown.joinpath(*parts)):
            path, place = folder / name, shown.joinpath(*parts, name)
            status, is_link = _status(path, place, link_roots)
            if stat.S_ISDIR(status.st_mode):
                waiting.append((*parts, name))
            else:
                yield ListedFile("/".join((*parts, name)), FileState.of(status), is_link)


def _names(folder: Path, place: Path) -> Iterator[str]:
    """Yield the names in a folder, hidden ones left out: .git, .cache, .gitattributes belong to the repository."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries)
    except OSError as error:
        raise open_files_error(error, str(place)) or SourceError(
            f"cannot be listed ({error.strerror})", where=str(place), next_step="Check its permissions."
        ) from error
    for name in names:
        if name.startswith("."):
            continue
        if not is_safe_name(name):
            raise SourceError(
                "file name cannot be kept in a manifest",
                where=ascii(str(place / name)),
                expected="valid UTF-8 without backslashes",
                next_step="Rename the file, or remove it.",
            )
        yield name


def _status(path: Path, place: Path, link_roots: Sequence[Path]) -> tuple[os.stat_result, bool]:
    """Return the status of a regular file or folder, and whether a link led to it."""
    try:
        is_link = stat.S_ISLNK(path.lstat().st_mode)
        if is_link:
            _check_link(path, place, link_roots)
        status = path.stat()
    except OSError as error:
        raise open_files_error(error, str(place)) or SourceError(
            f"cannot be looked at ({error.strerror})", where=str(place), next_step="Check its permissions."
        ) from error
    if stat.S_ISDIR(status.st_mode):
        if is_link:
            raise SourceError("is a symbolic link to a directory", where=str(place), next_step="Replace it.")
    elif not stat.S_ISREG(status.st_mode):
        raise SourceError("is neither a file nor a directory", where=str(place), next_step="Remove it.")
    return status, is_link


def _check_link(path: Path, place: Path, link_roots: Sequence[Path]) -> None:
    target = Path(os.path.realpath(path))
    if not any(target.is_relative_to(folder) for folder in link_roots):
        raise SourceError(
            "symbolic link leaves the source",
            where=str(place),
            actual=target,
            next_step="Copy the file into the source directory, if you trust it.",
        )
    if not target.exists():
        raise SourceError(
            "symbolic link to a file that does not exist",
            where=str(place),
            actual=target,
            next_step="Complete the download, or remove the link.",
        )


class NotRegularError(OSError):
    """A folder, a FIFO or a device where a file was expected."""


def regular_descriptor(path: Path, *, follow_links: bool = True) -> int:
    """Return a descriptor of a regular file, open for reading; neither a FIFO nor a device makes it wait.

    Raises:
        NotRegularError: if it is not a regular file.
        OSError: as ``os.open``; ``ELOOP`` if it is a link and must not be one.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    descriptor = os.open(path, flags if follow_links else flags | os.O_NOFOLLOW)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise NotRegularError(errno.EINVAL, "not a regular file", str(path))


def open_listed(path: Path, listed: ListedFile, place: str) -> int:
    """Return a descriptor of the very file that was listed.

    Raises:
        SourceError: if another file, a link, a FIFO or a device has taken its place, or it was changed.
        OSError: ``EMFILE`` or ``ENFILE``, if no descriptor is left.
    """
    try:
        descriptor = regular_descriptor(path, follow_links=listed.is_link)
    except OSError as error:
        if open_files_error(error) is not None:
            raise
        next_step = "Check its permissions." if isinstance(error, PermissionError) else _CHANGED
        raise SourceError(f"cannot be opened ({error.strerror})", where=place, next_step=next_step) from error
    try:
        check_state(listed.state, os.fstat(descriptor), place)
    except SourceError:
        os.close(descriptor)
        raise
    return descriptor


def check_state(listed: FileState, status: os.stat_result, place: str) -> None:
    """Raise :class:`SourceError` if a file is not the one that was listed any more."""
    now = FileState.of(status)
    if now != listed:
        raise SourceError(
            "changed while it was converted", where=place, expected=listed, actual=now, next_step=_CHANGED
        )


def read_exactly(descriptor: int, where: str, offset_bytes: int, buffer: memoryview) -> None:
    """Fill ``buffer`` from a file descriptor.

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
                next_step="Check the disk; the same command resumes.",
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
