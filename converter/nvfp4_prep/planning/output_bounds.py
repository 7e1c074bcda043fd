"""Bounds of what a conversion may write: whatever convert accepts, verify, restore and the loader accept."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from nvfp4_prep.checkpoint.bounded_json import MAX_VALUES
from nvfp4_prep.checkpoint.tensors import TensorRecord
from nvfp4_prep.errors import SourceError

__all__ = ["MAX_MADE_NBYTES", "check_header", "check_made_files"]

MAX_MADE_NBYTES = 200_000_000
"""Most that a source may bring into the index or the manifest; readers take these up to 256 MB."""
_ENTRY_VALUES = 8
"""JSON values of a tensor's entry in a header, apart from its shape's."""
_ENTRY_NBYTES = 80
"""Bytes of a tensor's entry in an index, apart from its name."""


def check_header(name: str, tensors: int, dimensions: int) -> None:
    """Raise :class:`SourceError` if a header of so many tensors, of so many dimensions in all, has too many values."""
    values = _ENTRY_VALUES * tensors + dimensions
    if values > MAX_VALUES:
        raise SourceError(
            f"has too many tensors for the output's {name}",
            expected=f"a header of at most {MAX_VALUES:,} JSON values",
            actual=f"{values:,} for {tensors:,} tensors",
        )


def check_made_files(where: str, served: Iterable[TensorRecord], texts: Mapping[str, bytes]) -> None:
    """Raise :class:`SourceError` if the index or the manifest of the output would be too large to be read again.

    Args:
        where: the source, for errors.
        served: tensors that the index lists.
        texts: files of the source that the manifest holds.
    """
    names = [record.name for record in served]
    index_nbytes = len(json.dumps(names)) + _ENTRY_NBYTES * len(names)
    texts_nbytes = sum(map(_embedded_nbytes, texts.values()))
    for what, nbytes in (("tensor names", index_nbytes), (f"{', '.join(texts)} together", texts_nbytes)):
        if nbytes > MAX_MADE_NBYTES:
            raise SourceError(
                f"{what} would be too large in the output",
                where=where,
                expected=f"at most {MAX_MADE_NBYTES:,} bytes of JSON",
                actual=f"{nbytes:,} bytes",
            )


def _embedded_nbytes(text: bytes) -> int:
    """Return the size of a text inside JSON, where a character may take six times its bytes."""
    if 6 * len(text) < MAX_MADE_NBYTES // 10:
        return 6 * len(text)
    return max(len(json.dumps(text.decode("utf-8", "replace"))), len(text) * 4 // 3)
