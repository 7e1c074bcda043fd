"""The manifest: same value back, and a typed error for whatever is not one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvfp4_prep.errors import CheckpointError
from nvfp4_prep.manifest import MANIFEST, Manifest

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
