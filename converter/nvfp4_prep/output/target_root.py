"""A directory whose files are opened, renamed and removed without ever leaving it.

Every path below the root is walked component by component from a descriptor, and no component may be a link. Names
that come from a journal, a manifest or a part are checked here a second time.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import shutil
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Self

from nvfp4_prep.checkpoint.entry_kind import LINK, entry_kind
from nvfp4_prep.checkpoint.filenames import WORK_FOLDER, is_safe_name
from nvfp4_prep.errors import TargetError
from nvfp4_prep.output.exclusive_rename import rename_new

__all__ = ["TargetRoot", "check_work_folder", "sync_folder"]

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_ANOTHER_KIND = (errno.ELOOP, errno.ENOTDIR, errno.ENXIO)
"""What opening with ``O_NOFOLLOW`` or ``O_DIRECTORY`` says of a link, of another kind of file, and of a socket."""


class TargetRoot:
    """An open directory and what may be done in it; names are relative, with forward slashes.

    Methods raise :class:`TargetError` for an unsafe name or for a link on the way, and ``OSError`` for everything that
    the file system refuses.
    """

    def __init__(self, path: Path) -> None:
        """Name the directory; :meth:`open` opens it."""
        self.path = path
        self._descriptor = -1

    @classmethod
    def open(cls, path: Path, *, make: bool = False) -> Self:
        """Open the directory, and make it first if ``make`` says so.

        The directory itself may be reached through links of the user's, but not through any from a work folder on: a
        part lies in the work folder of the whole.
        """
        root, parts = cls(path), path.parts
        border = parts.index(WORK_FOLDER) if WORK_FOLDER in parts[1:] else len(parts)
        outer, inner = Path(*parts[:border]), parts[border:]
        if make:
            _make_folders(outer)
        opened = os.open(outer, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        root._descriptor = root._walk(opened, inner, make=make)
        return root

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the directory; a second time does nothing."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _walk(self, descriptor: int, folders: Collection[str], *, make: bool = False) -> int:
        """Return a descriptor of an inner folder; the one given is closed, whatever happens."""
        for folder in folders:
            try:
                if make:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(folder, dir_fd=descriptor)
                        os.fsync(descriptor)
                inner = os.open(folder, _FOLDER, dir_fd=descriptor)
            except OSError as error:
                os.close(descriptor)
                if error.errno in _ANOTHER_KIND:
                    raise _wrong_kind(self.path / folder, "a folder", "a link or another kind of file") from error
                raise
            os.close(descriptor)
            descriptor = inner
        return descriptor

    @contextlib.contextmanager
    def _parent(self, name: str, *, make: bool = False) -> Iterator[tuple[int, str]]:
        """Open the folder of a name, as a descriptor and the name in it."""
        if not is_safe_name(name):
            raise TargetError(
                f"unsafe file name {name!r}",
                where=str(self.path),
                expected="a relative path inside the target",
                next_step="Do not trust where it comes from: the checkpoint, or the target's work folder.",
            )
        *folders, last = name.split("/")
        descriptor = self._walk(os.dup(self._descriptor), folders, make=make)
        try:
            yield descriptor, last
        finally:
            os.close(descriptor)

    def make_folder(self, name: str) -> None:
        """Make an inner folder, if it is not there."""
        with self._parent(f"{name}/x", make=True):
            pass

    def status(self, name: str) -> os.stat_result | None:
        """Return the status of an entry, of a link itself; ``None`` if there is none."""
        with contextlib.suppress(FileNotFoundError), self._parent(name) as (folder, last):
            return os.stat(last, dir_fd=folder, follow_symlinks=False)
        return None

    @property
    def held_path(self) -> Path:
        """A path to the open directory that stays right when another one takes its name; while this is open."""
        return Path(f"/proc/self/fd/{self._descriptor}")

    def open_file(self, name: str, flags: int, *, make_folders: bool = False) -> int:
        """Return a descriptor of a regular file; never wait for the other end of a FIFO.

        A file that is to be written has one name, this one: what a hard link shares with another place stays as it is.
        """
        truncate, flags = flags & os.O_TRUNC, flags & ~os.O_TRUNC
        flags |= os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
        with self._parent(name, make=make_folders) as (folder, last):
            try:
                descriptor = os.open(last, flags, 0o666, dir_fd=folder)
            except OSError as error:
                if error.errno in (*_ANOTHER_KIND, errno.EISDIR):
                    raise _wrong_kind(self.path / name, "a regular file", "a link or another kind of file") from error
                raise
        try:
            self._check_opened(name, os.fstat(descriptor), flags)
            if truncate:
                os.ftruncate(descriptor, 0)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _check_opened(self, name: str, status: os.stat_result, flags: int) -> None:
        if not stat.S_ISREG(status.st_mode):
            raise _wrong_kind(self.path / name, "a regular file", "another kind of file")
        if flags & (os.O_WRONLY | os.O_RDWR) and status.st_nlink > 1:
            error = _wrong_kind(self.path / name, "a file with one name", f"{status.st_nlink} hard links to one file")
            here, own = shlex.quote(name), shlex.quote(f"{name}.own")
            error.next_step = (
                f"Give it a file of its own (cd {shlex.quote(str(self.path))}; cp -a -- {here} {own} &&"
                f" mv -- {own} {here}), or give another target: what shares a file with another place is not changed."
            )
            raise error

    def read(self, name: str, max_nbytes: int) -> bytes:
        """Return the bytes of a regular file of bounded size."""
        with open(self.open_file(name, os.O_RDONLY), "rb") as stream:
            data = stream.read(max_nbytes + 1)
        if len(data) > max_nbytes:
            raise TargetError(
                "is too large",
                where=str(self.path / name),
                expected=f"at most {max_nbytes:,} bytes",
                next_step="It was damaged: remove the target's work folder and what is beside it.",
            )
        return data

    def names(self, folder: str = "") -> list[str]:
        """Return the names in the directory or in an inner folder."""
        with self._parent(f"{folder}/x" if folder else "x") as (descriptor, _):
            return os.listdir(descriptor)  # noqa: PTH208 - not by its path

    def move(self, old: str, new: str, *, replace: bool, root: TargetRoot | None = None) -> None:
        """Rename a flushed file, and flush its folder and those that had to be made for it.

        Args:
            old: the file's name below ``root``.
            new: its name here.
            replace: whether a file of that name is ours and may go.
            root: where ``old`` lies, if not here.

        Raises:
            FileExistsError: if there is an entry of that name which must stay.
        """
        with (root or self)._parent(old) as (folder, last), self._parent(new, make=True) as (other, final):
            if replace:
                os.rename(last, final, src_dir_fd=folder, dst_dir_fd=other)
            else:
                rename_new(last, final, folder, other)
            os.fsync(other)

    def unlink(self, name: str) -> None:
        """Remove a file or a link; nothing happens where there is none."""
        with contextlib.suppress(FileNotFoundError), self._parent(name) as (folder, last):
            os.unlink(last, dir_fd=folder)

    def remove_tree(self, name: str) -> None:
        """Remove a file, or a folder with what is in it; links are removed themselves, nothing behind them."""
        status = self.status(name)
        if status is None:
            return
        if not stat.S_ISDIR(status.st_mode):
            self.unlink(name)
            return
        with self._parent(name) as (folder, last):
            shutil.rmtree(last, dir_fd=folder)  # walks descriptors without following links

    def sync(self, folder: str = "") -> None:
        """Flush the directory or an inner folder, so that what was done in it survives a power cut."""
        with self._parent(f"{folder}/x" if folder else "x") as (descriptor, _):
            os.fsync(descriptor)


def _make_folders(path: Path) -> None:
    """Make a directory with those above it, and flush every folder that got a new entry."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        with contextlib.suppress(PermissionError):  # a folder that may be entered, but not listed
            sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Flush a directory, so that renames in it survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_work_folder(work: Path, files: Collection[str], folders: Collection[str]) -> None:
    """Raise :class:`TargetError` if a work folder, or an entry in it, is a link or of an unexpected type; only look.

    Args:
        work: the folder; may be missing.
        files: names that must be regular files.
        folders: names that must be folders.
    """
    try:
        mode = os.lstat(work).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    _check(work, mode, stat.S_ISDIR(mode), "a folder")
    for entry in os.scandir(work):
        with contextlib.suppress(FileNotFoundError):  # another run is at work
            mode = entry.stat(follow_symlinks=False).st_mode
            path = Path(entry.path)
            if entry.name in files:
                _check(path, mode, stat.S_ISREG(mode), "a regular file")
            elif entry.name in folders:
                _check(path, mode, stat.S_ISDIR(mode), "a folder")
            else:
                _check(path, mode, stat.S_ISREG(mode) or stat.S_ISDIR(mode), "a regular file or folder")


def _check(path: Path, mode: int, right: bool, expected: str) -> None:
    if not right:
        kind = entry_kind(path)
        error = _wrong_kind(path, expected, kind)
        if kind == LINK:
            error.next_step = "Put what it leads to in its place, or give another target."
        raise error


def _wrong_kind(path: Path, expected: str, actual: str) -> TargetError:
    return TargetError(
        "is not what nvfp4-prep makes there",
        where=str(path),
        expected=expected,
        actual=actual,
        next_step="Remove it, or give another target.",
    )
