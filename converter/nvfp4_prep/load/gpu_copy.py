"""Copies to a GPU by the thread that filled the staging buffer, through the driver's C interface.

A reading thread copies its one buffer as soon as it is full, and waits until the bytes have arrived: then the buffer
is still in the processor's caches when it is filled again, and the other threads read meanwhile. One call of the driver
a chunk is all that the interpreter is asked for; through torch it would be eight, and each of them waits for the
GIL while sixteen threads want it.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Protocol

import torch

from nvfp4_prep.load.read_plan import Segment
from nvfp4_prep.load.strided_copy import run_views

__all__ = ["Copies", "CopyError", "GpuCopies"]

_DRIVER = "libcuda.so.1"
_ON_DEVICE = 2
"""CU_MEMORYTYPE_DEVICE."""


class CopyError(RuntimeError):
    """The driver refused a copy, or lost it."""


class Copies(Protocol):
    """Takes staged bytes to where they are wanted, when ``ready`` is over, and returns once they are there."""

    def copy(self, source: int, target: int, nbytes: int, ready: torch.cuda.Event | None) -> None:
        """Copy from an address of pinned host memory to an address of the device."""

    def copy_runs(self, source: int, cut: Segment, target: torch.Tensor, ready: torch.cuda.Event | None) -> None:
        """Copy the runs of ``cut``, the first of which begins at ``source``, to ``target``, flat ``uint8``."""


class _Copy2D(ctypes.Structure):
    """CUDA_MEMCPY2D of the driver's interface."""

    _fields_ = [
        (side + name, kind)
        for side in ("src", "dst")
        for name, kind in (
            ("XInBytes", ctypes.c_size_t),
            ("Y", ctypes.c_size_t),
            ("MemoryType", ctypes.c_int),
            ("Host", ctypes.c_void_p),
            ("Device", ctypes.c_uint64),
            ("Array", ctypes.c_void_p),
            ("Pitch", ctypes.c_size_t),
        )
    ] + [("WidthInBytes", ctypes.c_size_t), ("Height", ctypes.c_size_t)]


class GpuCopies:
    """Copies of one thread to one GPU, on a stream of its own.

    Device memory, from the first :meth:`copy_runs` on: the longest span of runs (:attr:`Segment.span_nbytes`).
    """

    def __init__(self, device: torch.device) -> None:
        """Remember the device; the first copy opens the stream, in the thread that copies."""
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._handle = 0
        self._awaited: torch.cuda.Event | None = None
        self._rows = torch.empty(0, dtype=torch.uint8)

    def copy(self, source: int, target: int, nbytes: int, ready: torch.cuda.Event | None) -> None:
        """Copy as :meth:`Copies.copy`; raises :class:`CopyError` if it fails."""
        stream = self._opened(ready)
        self._send(source, target, nbytes)
        self._wait(stream)

    def copy_runs(self, source: int, cut: Segment, target: torch.Tensor, ready: torch.cuda.Event | None) -> None:
        """Copy everything to the GPU, and the runs of it to ``target`` there; raises as :meth:`copy`."""
        stream = self._opened(ready)
        if len(self._rows) < cut.span_nbytes:
            self._rows = torch.empty(cut.span_nbytes, dtype=torch.uint8, device=self._device)
        self._send(source, self._rows.data_ptr(), cut.span_nbytes)
        runs = _Copy2D(
            srcMemoryType=_ON_DEVICE,
            srcDevice=self._rows.data_ptr(),
            srcPitch=cut.stride_bytes,
            dstMemoryType=_ON_DEVICE,
            dstDevice=target.data_ptr(),
            dstPitch=cut.run_nbytes,
            WidthInBytes=cut.run_nbytes,
            Height=cut.runs,
        )
        # The driver need not take these distances, which it did not choose; torch takes any.
        if _driver().cuMemcpy2DAsync_v2(ctypes.byref(runs), self._handle):
            cut_rows, rows = run_views(self._rows, 0, cut.run_nbytes, cut.stride_bytes, cut.runs, target)
            rows.copy_(cut_rows)
        self._wait(stream)

    def _opened(self, ready: torch.cuda.Event | None) -> torch.cuda.Stream:
        if self._stream is None:
            torch.cuda.set_device(self._device)
            self._stream = torch.cuda.Stream(self._device)
            torch.cuda.set_stream(self._stream)  # of this thread
            self._handle = self._stream.cuda_stream
        if ready is not None and ready is not self._awaited:
            self._stream.wait_event(ready)
            self._awaited = ready
        return self._stream

    def _send(self, source: int, target: int, nbytes: int) -> None:
        status = _driver().cuMemcpyHtoDAsync_v2(target, source, nbytes, self._handle)
        if status:
            raise CopyError(f"copy to {self._device} failed (CUDA driver error {status})")

    def _wait(self, stream: torch.cuda.Stream) -> None:
        try:
            stream.synchronize()
        except RuntimeError as error:
            raise CopyError(f"copy to {self._device} failed ({error})") from error


@functools.cache
def _driver() -> ctypes.CDLL:
    """Return the CUDA driver's library, which torch has opened already.

    Its calls release the GIL: with all threads copying, to begin a copy takes long (22 GB/s instead of 65 with it).
    """
    library = ctypes.CDLL(_DRIVER)
    library.cuMemcpyHtoDAsync_v2.argtypes = [ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    library.cuMemcpyHtoDAsync_v2.restype = ctypes.c_int
    library.cuMemcpy2DAsync_v2.argtypes = [ctypes.POINTER(_Copy2D), ctypes.c_void_p]
    library.cuMemcpy2DAsync_v2.restype = ctypes.c_int
    return library
