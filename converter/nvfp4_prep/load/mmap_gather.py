"""Read-only mappings of files through libc, for gathering many short runs without reading what lies between them.

Python's ``mmap`` keeps the GIL while pages are brought in and does not give the address that
``madvise`` and tensors need. ``MADV_POPULATE_READ`` brings a window in at once and reports a file that has become too
short or a disk that fails as an error; touching such a page without it would end the process with SIGBUS.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import sys
from typing import Any

import torch

from nvfp4_prep._util.text import format_nbytes

__all__ = ["FileMapping", "mapping_supported"]

_PROT_READ, _MAP_SHARED = 1, 1
_MADV_DONTNEED, _MADV_POPULATE_READ = 4, 22
_PAGE = 4096


@functools.cache
def _libc() -> Any:
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int64,
    ]
    library.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return library


@functools.cache
def mapping_supported() -> bool:
    """Return whether windows of a mapping can be brought in safely: Linux 5.14 or later."""
    if sys.platform != "linux" or os.sysconf("SC_PAGE_SIZE") != _PAGE:
        return False
    address = _libc().mmap(None, _PAGE, _PROT_READ, _MAP_SHARED | 0x20, -1, 0)  # anonymous
    if address in (None, ctypes.c_void_p(-1).value):
        return False
    supported = bool(_libc().madvise(address, _PAGE, _MADV_POPULATE_READ) == 0)
    _libc().munmap(address, _PAGE)
    return supported


class FileMapping:
    """A whole file, read-only; :attr:`bytes` is ``uint8 [nbytes]``.

    Peak resident memory: the windows between :meth:`populate` and :meth:`release`.
    """

    def __init__(self, address: int, nbytes: int) -> None:
        """Take over a mapping, which :meth:`close` ends."""
        self.nbytes = nbytes
        self._address: int | None = address
        self.bytes = torch.frombuffer((ctypes.c_ubyte * nbytes).from_address(address), dtype=torch.uint8)

    @classmethod
    def open(cls, descriptor: int, nbytes: int) -> FileMapping:
        """Map ``nbytes`` bytes of an open file; raises ``OSError`` if the system refuses."""
        address = _libc().mmap(None, nbytes, _PROT_READ, _MAP_SHARED, descriptor, 0)
        if address == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), f"{format_nbytes(nbytes)} cannot be mapped")
        return cls(address, nbytes)

    def populate(self, offset_bytes: int, nbytes: int) -> None:
        """Bring the pages of a range in.

        Raises:
            OSError: if a page cannot be read: the file ended, the disk failed, or there is no memory.
        """
        begin, size = self._pages(offset_bytes, nbytes)
        while _libc().madvise(begin, size, _MADV_POPULATE_READ):
            code = ctypes.get_errno()
            if code not in (errno.EINTR, errno.EAGAIN):
                raise OSError(code, "file ended or cannot be read" if code == errno.EFAULT else os.strerror(code))

    def release(self, offset_bytes: int, nbytes: int) -> None:
        """Give the pages of a range back to the page cache."""
        _libc().madvise(*self._pages(offset_bytes, nbytes), _MADV_DONTNEED)

    def close(self) -> None:
        """Unmap; tensors that view the mapping must not be used any more."""
        if self._address is not None:
            del self.bytes
            _libc().munmap(self._address, self.nbytes)
            self._address = None

    def _pages(self, offset_bytes: int, nbytes: int) -> tuple[int, int]:
        if self._address is None:
            raise ValueError("mapping is closed")
        begin = offset_bytes // _PAGE * _PAGE
        return self._address + begin, offset_bytes + nbytes - begin
