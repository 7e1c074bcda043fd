"""The manifest: same value back, and a typed error for whatever is not one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvfp4_prep.checkpoint.filenames import MANIFEST
from nvfp4_prep.errors import CheckpointError
from nvfp4_prep.prepared.manifest import Manifest

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def raw(sample_prepared: Path) -> bytes:
    return (sample_prepared / MANIFEST).read_bytes()


def test_round_trip(raw: bytes) -> None:
    manifest = Manifest.from_bytes(raw)
    assert manifest.to_bytes() == raw
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest


def test_no_local_paths_and_no_times(raw: bytes, sample_prepared: Path) -> None:
    assert str(sample_prepared.parent).encode() not in raw
    assert b"/tmp" not in raw
    keys = {key for place in places(json.loads(raw)) for key in place if isinstance(key, str)}
    assert "files" in keys
    of_this_run = re.compile(r"(^|_)(time|date|when|host|user)(_|$)|timestamp|created|seconds")
    assert not [key for key in keys if of_this_run.search(key)]


def test_every_file_is_in_it(raw: bytes, sample_prepared: Path) -> None:
    names = {path.relative_to(sample_prepared).as_posix() for path in sample_prepared.rglob("*") if path.is_file()}
    assert set(Manifest.from_bytes(raw).files) == names - {MANIFEST}


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to every value of a JSON value, but the longest lists' tails."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_anything_else_is_a_checkpoint_error(raw: bytes, data: st.DataObject) -> None:
    """Any one value replaced by any other, or left out: a manifest again, or a CheckpointError; nothing else."""
    value = json.loads(raw)
    *above, last = data.draw(st.sampled_from(places(value)))
    inner = value
    for key in above:
        inner = inner[key]
    if data.draw(st.booleans()):
        inner[last] = data.draw(JSON)
    else:
        del inner[last]
    try:
        Manifest.from_bytes(json.dumps(value).encode())
    except CheckpointError as error:
        assert MANIFEST in str(error)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a//b", "", "a/../b", "a\\b"])
def test_file_names_that_lead_outside(raw: bytes, name: str) -> None:
    value = json.loads(raw)
    value["files"][name] = {"nbytes": 1, "sha256": "", "kind": "side"}
    with pytest.raises(CheckpointError, match="unsafe file name"):
        Manifest.from_bytes(json.dumps(value).encode())


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"\xff", b"null", b"[" * 100_000])
def test_no_manifest_at_all(text: bytes) -> None:
    with pytest.raises(CheckpointError):
        Manifest.from_bytes(text)


LAYER: tuple[Any, ...] = ("layers", 0)
FILE = ("files", "expert-scales.safetensors")


@pytest.mark.parametrize(
    ("where", "key", "value"),
    [
        (FILE, "nbytes", True),
        (FILE, "nbytes", "5"),
        (FILE, "nbytes", -1),
        (FILE, "nbytes", 1.0),
        (FILE, "nbytes", 2**63),
        (FILE, "sha256", ""),
        (FILE, "sha256", "A" * 64),
        (FILE, "sha256", "/" + "0" * 63),
        (FILE, "sha256", None),
        (FILE, "kind", "whatever"),
        (FILE, "kind", "made"),
        ((), "files", []),
        ((), "layers", {}),
        ((), "verified", {}),
        ((), "verified", [1]),
        ((), "passed_through_experts", {"a": 1}),
        (("tool",), "version", 1),
        (("source",), "name", None),
        (("source",), "revision", 5),
        (("source", "texts"), "config.json", {"text": 5}),
        (("source", "texts"), "config.json", {"base64": "\u00e4"}),
        (("source", "texts"), "config.json", {}),
        (("source", "texts"), "x\0", {"text": ""}),
        (("options",), "gate_up_block", "64"),
        (("options",), "moe_tp", True),
        (LAYER, "experts", True),
        (LAYER, "experts", "5"),
        (LAYER, "experts", 1e400),
        (LAYER, "hidden", 2**60),
        (LAYER, "layer", -1),
        (LAYER, "layer", 1.0),
        (LAYER, "gated", 1),
        (LAYER, "experts_path", 5),
        (LAYER, "experts_path", "\ud800"),
        (LAYER, "files", "experts"),
        (LAYER, "files", [5]),
        (LAYER, "files", ["x\0"]),
        ((*LAYER, "source_tensors", 0), "head", None),
        ((*LAYER, "source_tensors", 0), "stacked", 0),
        ((*LAYER, "source_tensors", 0), "sha256", "x"),
        ((*LAYER, "source_tensors", 0), "shape", [96.0, 168]),
        ((*LAYER, "expert_crc32", "w2_weight"), 0, -1),
        ((*LAYER, "expert_crc32", "w2_weight"), 0, 2**32),
        ((*LAYER, "expert_crc32", "w2_weight"), 0, True),
        ((*LAYER, "gate_up_scales"), "worst_ratio", float("inf")),
        ((*LAYER, "gate_up_scales"), "worst_ratio", float("nan")),
        ((*LAYER, "gate_up_scales"), "differing", "2"),
        ((*LAYER, "gate_up_scales"), "reconciled", [[True, "up"]]),
        ((*LAYER, "activation"), "clamp", True),
        ((*LAYER, "activation"), "spelled", 5),
    ],
)
def test_values_are_taken_as_json_has_them(raw: bytes, where: tuple[Any, ...], key: Any, value: object) -> None:
    manifest = part = json.loads(raw)
    for step in where:
        part = part[step]
    part[key] = value
    with pytest.raises(CheckpointError, match=rf"^/x/{MANIFEST}: is malformed"):
        Manifest.from_bytes(json.dumps(manifest).encode(), f"/x/{MANIFEST}")


@pytest.mark.parametrize("name", ["x\0y", "\ud800", "a" * 256, "/".join(["a" * 200] * 21), MANIFEST, "config.json"])
def test_names_that_no_side_file_has(raw: bytes, name: str) -> None:
    value = json.loads(raw)
    value["files"][name] = {"nbytes": 1, "sha256": "0" * 64, "kind": "side"}
    with pytest.raises(CheckpointError, match="is malformed"):
        Manifest.from_bytes(json.dumps(value).encode())


@pytest.mark.parametrize("version", [True, 1.0, "1", None, 2, [1]])
def test_versions(raw: bytes, version: object) -> None:
    value = json.loads(raw) | {"format_version": version}
    with pytest.raises(CheckpointError, match="format_version"):
        Manifest.from_bytes(json.dumps(value).encode())


def test_depth_is_bounded_before_parsing() -> None:
    text = b'{"format_version": 1, "x": ' + b"[" * 5000 + b"]" * 5000 + b"}"
    with pytest.raises(CheckpointError, match="is nested too deep; expected at most 200 levels, found 5001 levels"):
        Manifest.from_bytes(text)
