"""A source that verify could not read back in its prepared form is refused before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from nvfp4_prep import plan
from nvfp4_prep.checkpoint.safetensors_header import encode_header, parse_header
from nvfp4_prep.checkpoint.tensors import TensorRecord, TensorSpec
from nvfp4_prep.errors import SourceError
from nvfp4_prep.planning import output_bounds
from nvfp4_prep.planning.output_bounds import check_header, check_made_files
from support import tiny_checkpoints as tiny


def test_a_header_at_the_bound_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The count of values is not below what the reader counts."""
    specs = [TensorSpec(f"t{number}", "U8", (1,) * (number % 5)) for number in range(50)]
    raw, _ = encode_header("x", specs, {"format": "pt"})
    values = 8 * 50 + sum(len(spec.shape) for spec in specs)
    monkeypatch.setattr(output_bounds, "MAX_VALUES", values)
    check_header("x", 50, values - 8 * 50)
    monkeypatch.setattr("nvfp4_prep.checkpoint.bounded_json.check_bounds.__defaults__", (values,))
    assert len(parse_header("x", raw, len(raw) + 50).tensors) == 50


@pytest.mark.parametrize("values", [8_000_000, 8_000_001])
def test_values_of_a_header(values: int) -> None:
    if values <= 8_000_000:
        check_header("x", 900_000, values - 7_200_000)
    else:
        with pytest.raises(SourceError, match="at most 8,000,000 JSON values, found 8,000,001 for 900,000 tensors"):
            check_header("x", 900_000, values - 7_200_000)


@pytest.mark.slow
def test_long_names_and_texts() -> None:
    record = TensorRecord("n" * 10_000_000, "U8", (1,), "x", 0, 1)
    check_made_files("s", [record] * 19, {})
    with pytest.raises(SourceError, match="s: tensor names would be too large"):
        check_made_files("s", [record] * 20, {})
    texts = {"README.md": b"\1" * 60_000_000}  # six bytes each, once it is JSON
    with pytest.raises(SourceError, match=r"README\.md together would be too large in the output; expected"):
        check_made_files("s", [], texts)
    check_made_files("s", [], {"README.md": b"x" * 60_000_000})


def test_planning_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny.write(tmp_path / "source", tiny.TinyLayer().tensors())
    monkeypatch.setattr(output_bounds, "MAX_MADE_NBYTES", 100)
    with pytest.raises(SourceError, match="too large in the output"):
        plan(source)
