"""Reading and writing safetensors headers; data is addressed by byte ranges, never loaded as a whole.

The official library reads whole tensors; a converter that streams hundreds of gigabytes needs (file, offset, size)
instead. Input files are untrusted: everything in a header is checked against the file's size before it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from nvfp4_prep._util.collector import collector_paused
from nvfp4_prep._util.system import open_files_error
from nvfp4_prep.checkpoint.bounded_json import SOURCE_MAX_DEPTH, JsonBounds, check_bounds
from nvfp4_prep.checkpoint.filenames import is_text, quoted
from nvfp4_prep.checkpoint.lfs_pointer import LFS_MAGIC, LFS_NEXT_STEP
from nvfp4_prep.checkpoint.local_files import regular_descriptor
from nvfp4_prep.checkpoint.tensors import DTYPE_BITS, ShardHeader, TensorRecord, TensorSpec, tensor_nbytes
from nvfp4_prep.errors import SourceError

__all__ = [
    "HEADER_ALIGNMENT",
    "MAX_HEADER_NBYTES",
    "ShardHeader",
    "TensorRecord",
    "encode_header",
    "parse_header",
    "read_header",
]

MAX_HEADER_NBYTES = 100_000_000
"""The official library's limit."""
HEADER_ALIGNMENT = 4096
"""Data of files that we write starts at a multiple of this (direct I/O, GPUDirect)."""
_MAX_DIMENSIONS = 32
_ONLY_SAFETENSORS = "Only safetensors checkpoints can be prepared."
_OTHER_FORMATS: Mapping[bytes, tuple[str, str]] = {
    LFS_MAGIC[:8]: ("is a git-lfs pointer, not the file itself", LFS_NEXT_STEP),
    b"GGUF": ("is a GGUF file under the name of a safetensors file", _ONLY_SAFETENSORS),
    b"PK\x03\x04": ("is a PyTorch or zip file, not a safetensors file", _ONLY_SAFETENSORS),
}
"""First bytes that no safetensors file has: each would be the length of a header beyond the format's limit."""


def read_header(path: Path, file: str | None = None) -> ShardHeader:
    """Read and check the header of a local file.

    Args:
        path: the file.
        file: the name that records carry; the path's last part if left out. Errors name the whole path.

    Raises:
        SourceError: if the file cannot be read or its header is malformed.
    """
    name, where = file if file is not None else path.name, str(path)
    try:
        with open(regular_descriptor(path), "rb") as stream:
            nbytes = os.fstat(stream.fileno()).st_size
            prefix = stream.read(8)
            length = header_nbytes(where, prefix, nbytes)
            return parse_header(name, prefix + stream.read(length), nbytes, where=where)
    except OSError as error:
        raise open_files_error(error, where) or SourceError(
            f"cannot be read ({error.strerror})", where=where, next_step="Check that it exists and is readable."
        ) from error


def header_nbytes(file: str, prefix: bytes, file_nbytes: int) -> int:
    """Return the header's length from the first eight bytes of a file, checked against the file's size."""
    hint = "The file is truncated or no safetensors file: download it again."
    if len(prefix) < 8:
        raise SourceError(
            "too short for a safetensors file", where=file, expected="8 bytes", actual=len(prefix), next_step=hint
        )
    length = int.from_bytes(prefix[:8], "little")
    if length > MAX_HEADER_NBYTES:
        for magic, (what, next_step) in _OTHER_FORMATS.items():
            if prefix.startswith(magic):
                raise SourceError(what, where=file, next_step=next_step)
        raise SourceError(
            "header claims more than the format allows",
            where=file,
            expected=f"at most {MAX_HEADER_NBYTES} bytes",
            actual=f"{length} bytes",
            next_step=hint,
        )
    if 8 + length > file_nbytes:
        raise SourceError(
            "header is longer than the file",
            where=file,
            expected=f"{8 + length} bytes",
            actual=f"{file_nbytes} bytes",
            next_step=hint,
        )
    return length


@collector_paused()
def parse_header(file: str, raw: bytes, file_nbytes: int, *, where: str | None = None) -> ShardHeader:
    """Parse length prefix and header.

    Args:
        file: name for records.
        raw: the first ``8 + header length`` bytes of the file.
        file_nbytes: size of the whole file.
        where: name for errors; ``file`` if left out.

    Raises:
        SourceError: if anything in the header is malformed, overlaps, leaves holes or leaves the file, or if it has
            more than :data:`~nvfp4_prep.checkpoint.bounded_json.MAX_VALUES` values.
    """
    place = where or file
    length = header_nbytes(place, raw, file_nbytes)
    if len(raw) < 8 + length:
        raise SourceError("header is cut off", where=place, expected=8 + length, actual=len(raw))
    entries = _decode(place, raw[8 : 8 + length])
    metadata = _metadata(place, entries.pop("__metadata__", None))
    data_start = 8 + length
    records = []
    while entries:  # taken out one by one, so that the decoded entries and the records are never all in memory
        name, entry = entries.popitem()
        try:
            records.append(_record(file, name, entry, data_start))
        except SourceError as error:
            error.where = f"{place}, tensor {quoted(name)}"
            raise
    records.reverse()
    records.sort(key=lambda record: (record.offset_bytes, record.nbytes))
    _check_coverage(place, records, data_start, file_nbytes)
    digest = hashlib.sha256(raw[: 8 + length]).hexdigest()
    return ShardHeader(file, file_nbytes, data_start, digest, metadata, tuple(records))


def _decode(file: str, text: bytes) -> dict[str, object]:
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = Counter(key for key, _ in pairs)
            twice = next(key for key, number in names.items() if number > 1)
            raise SourceError(f"the name {quoted(twice)} occurs twice in one object of the header", where=file)
        return found

    try:
        check_bounds(text, SOURCE_MAX_DEPTH)
        decoded = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except JsonBounds as error:
        raise SourceError(
            f"header {error.what}", where=file, expected=f"at most {error.expected}", actual=error.actual
        ) from error
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise SourceError(
            f"header is not valid JSON ({error})", where=file, next_step="Download the file again."
        ) from error
    if not isinstance(decoded, dict):
        raise SourceError("header is not a JSON object", where=file, next_step="Download the file again.")
    return decoded


def _metadata(file: str, value: object) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise SourceError("__metadata__ must map strings to strings", where=file)
    return dict(value)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63  # JSON makes no other kind of int than bool


def _record(file: str, name: str, entry: object, data_start: int) -> TensorRecord:
    """Return the record of one entry; errors have no place yet, because making its text for each entry takes longer
    than all else."""
    if not isinstance(entry, dict):
        raise SourceError("entry is not a JSON object")
    if not is_text(name):
        raise SourceError("tensor name is not valid Unicode text")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise SourceError("unknown dtype", expected=", ".join(DTYPE_BITS), actual=repr(dtype)[:80])
    if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS or not all(map(_is_size, shape)):
        raise SourceError("malformed shape", actual=repr(shape)[:80])
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise SourceError("malformed data_offsets", actual=repr(offsets)[:80])
    begin, end = offsets
    try:
        nbytes = tensor_nbytes(dtype, shape)
    except ValueError as error:
        raise SourceError(str(error)) from error
    if end - begin != nbytes:
        raise SourceError(
            f"{dtype} {shape} does not fit its byte range",
            expected=f"{nbytes} bytes",
            actual=f"{end - begin} bytes",
        )
    return TensorRecord(name, dtype, tuple(shape), file, data_start + begin, nbytes)


def _check_coverage(file: str, records: list[TensorRecord], data_start: int, file_nbytes: int) -> None:
    position = data_start
    for record in records:
        if record.offset_bytes != position:
            kind = "overlaps the tensor before it" if record.offset_bytes < position else "leaves a hole before it"
            raise SourceError(
                f"byte range {kind}",
                where=f"{file}, tensor {quoted(record.name)}",
                expected=f"start at {position}",
                actual=record.offset_bytes,
                next_step="The header is damaged: download the file again.",
            )
        position += record.nbytes
    if position != file_nbytes:
        raise SourceError(
            "file size does not match its header",
            where=file,
            expected=f"{position} bytes",
            actual=f"{file_nbytes} bytes",
            next_step="The file is truncated or damaged: download it again.",
        )


def encode_header(
    file: str, tensors: Iterable[TensorSpec], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, tuple[TensorRecord, ...]]:
    """Make a header for tensors that follow each other without holes.

    Args:
        file: name that the records carry.
        tensors: in the order of the data.
        metadata: the ``__metadata__`` entry, sorted by key.

    Returns:
        ``(raw, records)``: length prefix and header, padded with spaces to :data:`HEADER_ALIGNMENT`, and where each
        tensor goes.

    Raises:
        ValueError: if a name is a duplicate or the header would pass the format's limit.
    """
    entries: dict[str, object] = {}
    if metadata:
        entries["__metadata__"] = dict(sorted(metadata.items()))
    relative: list[tuple[TensorSpec, int]] = []
    position = 0
    for spec in tensors:
        if spec.name in entries:
            raise ValueError(f"{file}: tensor {spec.name!r} occurs twice")
        nbytes = spec.nbytes
        entries[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [position, position + nbytes],
        }
        relative.append((spec, position))
        position += nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    length = -(-(8 + len(text)) // HEADER_ALIGNMENT) * HEADER_ALIGNMENT - 8
    if length > MAX_HEADER_NBYTES:
        raise ValueError(f"{file}: a header of {length} bytes passes the format's limit of {MAX_HEADER_NBYTES}")
    raw = length.to_bytes(8, "little") + text.ljust(length, b" ")
    records = tuple(
        TensorRecord(spec.name, spec.dtype, spec.shape, file, len(raw) + begin, spec.nbytes) for spec, begin in relative
    )
    return raw, records
