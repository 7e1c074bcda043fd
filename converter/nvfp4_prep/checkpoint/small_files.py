"""Reading the small files of a checkpoint whole: regular files only, and no more than a bound."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from nvfp4_prep._util.system import open_files_error
from nvfp4_prep.checkpoint.local_files import NotRegularError, regular_descriptor
from nvfp4_prep.errors import LoadError, NvfpPrepError

__all__ = ["MAX_SMALL_NBYTES", "open_regular", "os_error_kind", "read_small_file"]

MAX_SMALL_NBYTES = 256_000_000
"""Largest manifest, config, index or model card that is read. The manifest of Kimi-K2.5 has 3 MB, its index 25 MB."""


def os_error_kind(error: BaseException | None, kind: type[NvfpPrepError]) -> type[NvfpPrepError]:
    """Return the type of error for a file that was refused: ``kind``, unless this process lacks memory."""
    return LoadError if isinstance(error, OSError) and error.errno == errno.ENOMEM else kind


def open_regular(path: Path, kind: type[NvfpPrepError], next_step: str | None = None) -> tuple[int, int]:
    """Open a regular file for reading, without waiting for the other end of a FIFO.

    Returns:
        Descriptor and size.

    Raises:
        NvfpPrepError: of type ``kind``, if it does not exist or is not a regular file; :class:`OpenFilesError` or
            :class:`LoadError` if this process has no descriptors or memory left.
    """
    try:
        descriptor = regular_descriptor(path)
    except NotRegularError:
        raise kind("is not a regular file", where=str(path), next_step=next_step) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        if (none_left := open_files_error(error, str(path))) is not None:
            raise none_left from error
        reason = error.strerror if isinstance(error, OSError) else error
        raise os_error_kind(error, kind)(f"cannot be read ({reason})", where=str(path), next_step=next_step) from error
    return descriptor, os.fstat(descriptor).st_size


def read_small_file(path: Path, kind: type[NvfpPrepError], next_step: str | None = None) -> bytes:
    """Return the bytes of a small regular file; raises as :func:`open_regular`, or if it is too large."""
    descriptor, nbytes = open_regular(path, kind, next_step)
    with open(descriptor, "rb") as stream:
        try:
            data = stream.read(nbytes + 1) if nbytes <= MAX_SMALL_NBYTES else b""
        except OSError as error:
            raise kind(f"cannot be read ({error.strerror})", where=str(path), next_step=next_step) from error
    if max(nbytes, len(data)) > MAX_SMALL_NBYTES:
        raise kind(
            "is too large",
            where=str(path),
            expected=f"at most {MAX_SMALL_NBYTES} bytes",
            actual=f"{max(nbytes, len(data))} bytes",
            next_step=next_step,
        )
    return data
