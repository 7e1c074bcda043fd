"""Bounds of untrusted JSON are checked before a parser sees the text."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvfp4_prep.checkpoint.bounded_json import MAX_VALUES, JsonBounds, check_bounds, parse_json
from nvfp4_prep.errors import SourceError

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def depth_of(value: object) -> int:
    """Nesting by the definition."""
    if isinstance(value, dict):
        return 1 + max((depth_of(item) for item in value.values()), default=0)
    if isinstance(value, list):
        return 1 + max((depth_of(item) for item in value), default=0)
    return 0


@given(_JSON)
@pytest.mark.slow
def test_depth_is_that_of_the_value(value: object) -> None:
    raw = json.dumps(value).encode()
    assert parse_json(raw, "x", SourceError, max_depth=depth_of(value)) == value
    if depth_of(value):
        with pytest.raises(JsonBounds, match="nested too deep"):
            check_bounds(raw, depth_of(value) - 1)


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'{"\\"[":['])
def test_a_deep_text_is_refused_with_bound_and_value(opening: bytes) -> None:
    with pytest.raises(SourceError, match=r"x: is nested too deep; expected at most 100 levels, found \d+ levels"):
        parse_json(opening * 200_000, "x", SourceError)


def test_many_small_values_are_refused() -> None:
    raw = b'{"a":[' + b"[]," * MAX_VALUES + b"0]}"
    with pytest.raises(SourceError, match="too many JSON values"):
        parse_json(raw, "x", SourceError)


@pytest.mark.parametrize("raw", [b"", b"{", b'"\xff"', b"[1]]", b'{"a" 1}', b"1" * 5000])
def test_what_is_not_json_is_one_typed_error(raw: bytes) -> None:
    with pytest.raises(SourceError, match="is not valid JSON"):
        parse_json(raw, "x", SourceError)


@pytest.mark.parametrize("piece", [b'\\"', b"\\\\", b'"\\', b"]", b"}", b'"', b"\\"])
def test_the_scan_is_linear(piece: bytes) -> None:
    """Megabytes of quotes, escapes and closing brackets take no time worth a limit."""
    begin = time.monotonic()
    with pytest.raises(SourceError):
        parse_json(b'["' + piece * 2_000_000, "x", SourceError)
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize("raw", [b"\xef\xbb\xbf{}", '{"a": 1}'.encode("utf-16"), '{"a": 1}'.encode("utf-32-le")])
def test_only_plain_utf8_is_json(raw: bytes) -> None:
    with pytest.raises(SourceError, match="is not valid JSON"):
        parse_json(raw, "x", SourceError)
