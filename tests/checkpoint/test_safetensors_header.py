"""Headers: against the official library both ways, damaged in every way that has a name, and fuzzed."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.torch import save, save_file

from nvfp4_prep.checkpoint.safetensors_header import (
    HEADER_ALIGNMENT,
    MAX_HEADER_NBYTES,
    encode_header,
    parse_header,
    read_header,
)
from nvfp4_prep.checkpoint.tensors import DTYPE_BITS, TensorSpec, tensor_nbytes
from nvfp4_prep.errors import SourceError

ENTRY = {"dtype": "U8", "shape": [4, 2], "data_offsets": [0, 8]}


def raw(header: Any, data: int = 8) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(range(data))


def parse(blob: bytes) -> Any:
    length = min(int.from_bytes(blob[:8], "little"), MAX_HEADER_NBYTES)
    return parse_header("x.safetensors", blob[: 8 + length], len(blob))


def test_reads_what_the_official_library_writes(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "empty": torch.zeros(0, 4, dtype=torch.bfloat16),
        "scalar": torch.tensor(2.5),
        "ünï/cödé": torch.arange(5, dtype=torch.uint8),
        "scale": torch.arange(8, dtype=torch.uint8).view(torch.float8_e4m3fn),
    }
    path = tmp_path / "m.safetensors"
    save_file(tensors, path, metadata={"format": "pt", "note": "ü"})
    header = read_header(path)
    assert header.metadata == {"format": "pt", "note": "ü"}
    data = path.read_bytes()
    assert header.file_nbytes == len(data)
    found = {record.name: record for record in header.tensors}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        record = found[name]
        assert record.shape == tuple(tensor.shape)
        expected = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert data[record.offset_bytes : record.offset_bytes + record.nbytes] == expected


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=40).filter(lambda name: name != "__metadata__" and name.isprintable()),
        st.tuples(st.sampled_from(["U8", "F8_E4M3", "BF16", "F32", "I64"]), st.lists(st.integers(0, 5), max_size=3)),
        max_size=12,
    ),
    st.dictionaries(st.sampled_from(["format", "b", "a"]), st.text(max_size=10), max_size=3),
)
@settings(deadline=None)
@pytest.mark.slow
def test_official_library_reads_what_we_write(contents: dict[str, Any], metadata: dict[str, str]) -> None:
    specs = [TensorSpec(name, dtype, tuple(shape)) for name, (dtype, shape) in contents.items()]
    header, records = encode_header("x.safetensors", specs, metadata)
    assert len(header) % HEADER_ALIGNMENT == 0
    size = sum(spec.nbytes for spec in specs)
    blob = header + bytes(index % 251 for index in range(size))
    assert [(r.name, r.dtype, r.shape, r.nbytes) for r in records] == [
        (s.name, s.dtype, s.shape, s.nbytes) for s in specs
    ]
    read = dict(deserialize(blob))
    assert read.keys() == contents.keys()
    for record in records:
        assert list(record.shape) == read[record.name]["shape"]
        assert bytes(read[record.name]["data"]) == blob[record.offset_bytes : record.offset_bytes + record.nbytes]
    again = parse(blob)
    assert sorted(again.tensors, key=lambda r: r.name) == sorted(records, key=lambda r: r.name)
    assert again.metadata == metadata


def test_encode_refuses_a_name_twice() -> None:
    with pytest.raises(ValueError, match="occurs twice"):
        encode_header("x", [TensorSpec("a", "U8", (1,)), TensorSpec("a", "U8", (1,))])


BAD = {
    "not JSON": (raw(b"{nope}"), "not valid JSON"),
    "not UTF-8": (raw(b'{"\xff": 1}'), "not valid JSON"),
    "deeply nested": (raw(b"[" * 200_000), "nested too deep"),
    "an array": (raw([]), "(no|not a) JSON object"),
    "entry is a number": (raw({"a": 1}), "(no|not a) JSON object"),
    "unknown dtype": (raw({"a": {**ENTRY, "dtype": "F5"}}), "unknown dtype"),
    "dtype is a list": (raw({"a": {**ENTRY, "dtype": ["U8"]}}), "unknown dtype"),
    "no dtype": (raw({"a": {"shape": [8], "data_offsets": [0, 8]}}), "unknown dtype"),
    "negative size": (raw({"a": {**ENTRY, "shape": [-4, -2]}}), "malformed shape"),
    "fractional size": (raw({"a": {**ENTRY, "shape": [4.0, 2]}}), "malformed shape"),
    "boolean size": (raw({"a": {**ENTRY, "shape": [True, 8]}}), "malformed shape"),
    "shape is text": (raw({"a": {**ENTRY, "shape": "42"}}), "malformed shape"),
    "too many dimensions": (raw({"a": {**ENTRY, "shape": [1] * 200}}), "malformed shape"),
    "astronomic size": (raw({"a": {**ENTRY, "shape": [10**30]}}), "malformed shape"),
    "product overflows 64 bits": (raw({"a": {**ENTRY, "shape": [2**62, 2**62]}}), "does not fit its byte range"),
    "three offsets": (raw({"a": {**ENTRY, "data_offsets": [0, 8, 9]}}), "malformed data_offsets"),
    "negative offset": (raw({"a": {**ENTRY, "data_offsets": [-8, 0]}}), "malformed data_offsets"),
    "reversed offsets": (raw({"a": {**ENTRY, "data_offsets": [8, 0]}}), "does not fit its byte range"),
    "shape and bytes disagree": (raw({"a": {**ENTRY, "shape": [4, 3]}}), "does not fit its byte range"),
    "dtype and bytes disagree": (raw({"a": {**ENTRY, "dtype": "F32"}}), "does not fit its byte range"),
    "range leaves the file": (raw({"a": {**ENTRY, "data_offsets": [8, 16]}}), "hole before it"),
    "file longer than the tensors": (raw({"a": ENTRY}, 9), "file size does not match"),
    "file shorter than the tensors": (raw({"a": ENTRY}, 7), "file size does not match"),
    "overlap": (raw({"a": ENTRY, "b": {**ENTRY, "data_offsets": [4, 12]}}, 12), "overlaps"),
    "same range twice": (raw({"a": ENTRY, "b": ENTRY}, 8), "overlaps"),
    "hole": (raw({"a": ENTRY, "b": {**ENTRY, "data_offsets": [9, 17]}}, 17), "hole before it"),
    "name twice": (
        raw(
            b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"a":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}'
        ),
        "the name 'a' occurs twice",
    ),
    "field twice": (
        raw(b'{"a":{"dtype":"U8","dtype":"U8","shape":[8],"data_offsets":[0,8]}}'),
        "the name 'dtype' occurs twice in one object",
    ),
    "metadata with a number": (raw({"__metadata__": {"a": 1}, "a": ENTRY}), "must map strings to strings"),
    "metadata is text": (raw({"__metadata__": "x", "a": ENTRY}), "must map strings to strings"),
    "lone surrogate in a name": (raw(b'{"\\ud800":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}'), "Unicode"),
    "sub-byte size": (raw({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 2]}}, 2), "whole bytes"),
}


@pytest.mark.parametrize("case", BAD)
def test_damaged_headers_are_refused_with_the_reason(case: str) -> None:
    blob, message = BAD[case]
    with pytest.raises(SourceError, match=message) as caught:
        parse(blob)
    assert "x.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (b"", "too short"),
        (b"\x08\0\0\0\0\0\0", "too short"),
        (struct.pack("<Q", 1000) + b"{}", "longer than the file"),
        (struct.pack("<Q", MAX_HEADER_NBYTES + 1) + b"{}", "more than the format allows"),
        (struct.pack("<Q", 2**64 - 1) + b"{}", "more than the format allows"),
        (raw({"a": ENTRY})[:-3], "file size does not match"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, blob: bytes, message: str) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(blob)
    with pytest.raises(SourceError, match=message):
        read_header(path)


def test_a_huge_claim_in_a_sparse_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", 5_000_000_000))
        stream.truncate(6_000_000_000)
    with pytest.raises(SourceError, match="more than the format allows"):
        read_header(path)


def test_missing_file_and_directory(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.safetensors", tmp_path):
        with pytest.raises(SourceError, match="cannot be read"):
            read_header(path)


def accepts(blob: bytes) -> bool:
    try:
        parse(blob)
    except SourceError:
        return False
    return True


def official_accepts(blob: bytes) -> bool:
    try:
        deserialize(blob)
    except SafetensorError:
        return False
    return True


VALID = save({"a": torch.arange(12, dtype=torch.int16).reshape(3, 4), "b": torch.ones(2), "c": torch.zeros(0)})


@given(st.binary(max_size=200))
def test_fuzz_random_bytes(blob: bytes) -> None:
    assert not accepts(blob) or official_accepts(blob)


@pytest.mark.slow
@given(st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), min_size=1, max_size=6))
@settings(max_examples=500, deadline=None)
def test_fuzz_changed_bytes(changes: list[tuple[int, int]]) -> None:
    """Whatever we accept, the official library accepts too; nothing but SourceError ever escapes."""
    blob = bytearray(VALID)
    for place, value in changes:
        blob[place] = value
    assert not accepts(bytes(blob)) or official_accepts(bytes(blob))


@given(st.integers(0, len(VALID)))
def test_fuzz_truncated(length: int) -> None:
    assert accepts(VALID[:length]) == (length == len(VALID))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(sorted(DTYPE_BITS)) | json_values,
        "shape": st.lists(st.integers(-2, 9), max_size=4) | json_values,
        "data_offsets": st.lists(st.integers(-2, 40), min_size=2, max_size=2) | json_values,
    },
)


@given(st.dictionaries(st.text(max_size=6), entries | json_values, max_size=4), st.integers(0, 64))
@settings(max_examples=500, deadline=None)
@pytest.mark.slow
def test_fuzz_structured_headers(header: dict[str, Any], data: int) -> None:
    """Accepted headers describe the file exactly: in order, without holes, to the last byte."""
    text = json.dumps(header).encode()
    blob = struct.pack("<Q", len(text)) + text + bytes(data)
    try:
        parsed = parse(blob)
    except SourceError:
        return
    position = 8 + len(text)
    for record in parsed.tensors:
        assert record.offset_bytes == position
        assert record.nbytes == tensor_nbytes(record.dtype, record.shape)
        position += record.nbytes
    assert position == len(blob)


def test_official_library_opens_a_padded_header(tmp_path: Path) -> None:
    header, _ = encode_header("m", [TensorSpec("w", "F8_E4M3", (2, 3))], {"format": "pt"})
    (tmp_path / "m").write_bytes(header + bytes(range(6)))
    with safe_open(tmp_path / "m", framework="pt") as opened:
        assert opened.get_tensor("w").view(torch.uint8).flatten().tolist() == list(range(6))


@pytest.mark.slow
def test_number_of_tensors_is_bounded() -> None:
    """A header within the format's size may still take gigabytes of memory once it is parsed."""
    entry = b'"%d":{"dtype":"U8","shape":[],"data_offsets":[0,0]}'
    text = b"{" + b",".join(entry % number for number in range(1_200_000)) + b"}"
    with pytest.raises(SourceError, match="header has too many JSON values; expected at most 8,000,000"):
        parse_header("x", len(text).to_bytes(8, "little") + text, 8 + len(text))


def test_header_of_a_fifo_does_not_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(SourceError, match=r"x\.safetensors: cannot be read \(not a regular file\)"):
        read_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid", "git-lfs pointer.*git lfs pull"),
        (b"GGUF\3\0\0\0\0\0\0\0", "GGUF"),
        (b"PK\3\4\x14\0\0\0\0\0", "PyTorch or zip"),
    ],
)
def test_other_formats_are_named(content: bytes, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        parse_header("x", content, len(content))
