"""Staging memory of a loader."""

from __future__ import annotations

import torch

from nvfp4_prep._util.text import format_nbytes
from nvfp4_prep.errors import LoadError
from nvfp4_prep.load.options import LoadOptions
from nvfp4_prep.load.read_plan import ALIGNMENT
from nvfp4_prep.load.worker import Buffers

__all__ = ["make_buffers"]


def make_buffers(options: LoadOptions, *, pinned: bool) -> Buffers:
    """Return page-aligned staging buffers; raises :class:`LoadError` if the memory is refused."""
    try:
        nbytes = options.staging_nbytes + ALIGNMENT
        slab = torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=pinned)
    except (RuntimeError, MemoryError) as error:
        raise LoadError(
            f"{format_nbytes(options.staging_nbytes)} of {'pinned ' if pinned else ''}staging memory refused"
            f" ({str(error).splitlines()[0] if str(error) else 'out of memory'})",
            next_step="Use fewer or smaller buffers.",
        ) from error
    lead = -slab.data_ptr() % ALIGNMENT
    staging = slab[lead : lead + options.staging_nbytes]
    return Buffers(staging, options.buffer_nbytes, options.chunk_nbytes, options.thread_count)
