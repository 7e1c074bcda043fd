"""One file in work: allocated, written at a temporary place, flushed, and renamed into place when it is whole."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nvfp4_prep._util.buffers import PAGE_NBYTES, address_of
from nvfp4_prep._util.system import open_files_error
from nvfp4_prep._util.text import format_nbytes
from nvfp4_prep.errors import NoSpaceError, OpenFilesError, TargetError
from nvfp4_prep.output.target_root import TargetRoot

__all__ = ["AtomicFile", "free_nbytes", "translate_os_error", "translate_read_error"]

_DIRECT_MIN_NBYTES = 1 << 20


def translate_os_error(error: OSError, path: Path) -> NoSpaceError | TargetError | OpenFilesError:
    """Return a write error as one of ours."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = format_nbytes(free_nbytes(path))
        return NoSpaceError(
            f"no space left while writing ({free} free)",
            where=str(path),
            next_step="Free disk space and run the same command again: finished files are kept.",
        )
    if error.errno == errno.EFBIG:
        return TargetError(
            f"cannot be written ({error.strerror})",
            where=str(path),
            next_step="The limit of file sizes (ulimit -f) or the file system does not allow a file of this size: raise"
            " the limit, or give another target.",
        )
    return open_files_error(error, str(path)) or TargetError(
        f"cannot be written ({error.strerror})",
        where=str(path),
        next_step="Check the directory's permissions and the disk, or give another target.",
    )


def translate_read_error(error: OSError, path: Path) -> TargetError | OpenFilesError:
    """Return an error in reading a file of the target as one of ours."""
    return open_files_error(error, str(path)) or TargetError(
        f"cannot be read ({error.strerror})",
        where=str(path),
        next_step="Check its permissions and the disk, or move it out of the target and run the same command again.",
    )


def free_nbytes(path: Path) -> int:
    """Return the room on the file system that a path lies on, or will lie on."""
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    return shutil.disk_usage(existing).free


def _open_direct(root: TargetRoot, name: str) -> int:
    """Return a second descriptor for direct I/O, or -1 where the file system or the system has none."""
    try:
        return root.open_file(name, os.O_WRONLY | os.O_DIRECT)
    except (OSError, AttributeError):
        return -1


def _write_all(descriptor: int, offset_bytes: int, view: memoryview) -> None:
    while len(view):
        count = os.pwrite(descriptor, view, offset_bytes)
        view, offset_bytes = view[count:], offset_bytes + count


class AtomicFile:
    """One file at its temporary place. Writes may come from several threads, at disjoint ranges."""

    def __init__(
        self,
        root: TargetRoot,
        temporary: str,
        nbytes: int,
        put_in_place: Callable[[Mapping[str, Any], os.stat_result], None],
    ) -> None:
        """Create the file and allocate its space.

        Args:
            root: where it is written.
            temporary: its name there until it is whole.
            nbytes: its size.
            put_in_place: takes the journal's entry and the flushed file's status, and gives the file its name.
        """
        self.nbytes = nbytes
        self._root = root
        self._temporary = temporary
        self._path = root.path / temporary
        self._put_in_place = put_in_place
        try:
            self._descriptor = root.open_file(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, make_folders=True)
        except OSError as error:
            raise translate_os_error(error, self._path) from error
        self._direct = _open_direct(root, temporary)
        try:
            if nbytes:
                os.posix_fallocate(self._descriptor, 0, nbytes)
        except OSError as error:
            self.abandon()
            raise translate_os_error(error, self._path) from error

    def write(self, offset_bytes: int, data: memoryview | bytes) -> None:
        """Write all of ``data`` at an offset; raise :class:`NoSpaceError` or :class:`TargetError` if that fails.

        Whole pages in page-aligned memory go past the page cache where the file system allows it: the copy into the
        cache would cost more than everything else that a conversion does with the bytes but hashing them.
        """
        view = memoryview(data)
        try:
            direct = self._write_direct(offset_bytes, view)
            _write_all(self._descriptor, offset_bytes + direct, view[direct:])
        except OSError as error:
            raise translate_os_error(error, self._path) from error

    def _write_direct(self, offset_bytes: int, view: memoryview) -> int:
        """Write whole pages directly; return how many bytes that were, 0 where it cannot be done."""
        if self._direct < 0 or offset_bytes % PAGE_NBYTES or len(view) < _DIRECT_MIN_NBYTES or view.readonly:
            return 0
        if address_of(view) % PAGE_NBYTES:
            return 0
        try:
            return os.pwrite(self._direct, view[: len(view) // PAGE_NBYTES * PAGE_NBYTES], offset_bytes)
        except OSError as error:
            if error.errno == errno.EINVAL:  # a file system that wants another alignment
                return 0
            raise

    def _close(self) -> None:
        """Close both descriptors, once: their numbers may belong to other files after that."""
        descriptors, self._descriptor, self._direct = (self._descriptor, self._direct), -1, -1
        for descriptor in descriptors:
            if descriptor >= 0:
                os.close(descriptor)

    def commit(self, entry: Mapping[str, Any]) -> None:
        """Flush the file, note it in the journal and rename it into place."""
        try:
            os.fsync(self._descriptor)
            status = os.fstat(self._descriptor)
            self._close()
            self._put_in_place(entry, status)
        except OSError as error:
            raise translate_os_error(error, self._path) from error

    def abandon(self) -> None:
        """Close and delete the temporary file."""
        with contextlib.suppress(OSError):
            self._close()
        self._root.unlink(self._temporary)
