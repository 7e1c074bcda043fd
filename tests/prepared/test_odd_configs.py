"""Whatever config convert accepts, verify, restore, relayout and restamp accept: deep ones, NaN, odd numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from nvfp4_prep import convert, inspect, relayout, restamp, restore, verify
from nvfp4_prep.checkpoint.bounded_json import SOURCE_MAX_DEPTH
from support.cases import slow_after

DEEP = SOURCE_MAX_DEPTH - 3


def nested(depth: int, kind: str) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value] if kind == "lists" else {"a": value}
    return value


@pytest.mark.slow
@pytest.mark.parametrize(
    "added",
    slow_after(
        2,
        [
            {"quantization_config": {"odd": {"x": [1, 1.0, True, None, -0.0, 2**70]}}},
            {"deep": nested(DEEP, "objects")},
            {"deep": nested(DEEP, "lists")},
            {"quantization_config": {"deep": nested(DEEP, "lists")}},
            {"quantization_config": {"deep": nested(DEEP, "objects")}},
            {"text_config": {"quantization_config": {"deep": nested(DEEP - 1, "objects")}}},
            {"quantization_config": {"ignore": nested(DEEP, "lists")}},
            {"odd": float("nan"), "quantization_config": {"odd": [float("nan"), float("inf"), 1e400]}},
        ],
    ),
)
def test_every_command_takes_it(sample_source: Path, tmp_path: Path, added: dict[str, Any]) -> None:
    source = Path(shutil.copytree(sample_source, tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    quantization = config.get("quantization_config", {}) | added.get("quantization_config", {})
    (source / "config.json").write_text(json.dumps({**config, **added, "quantization_config": quantization}))
    made = convert(source, tmp_path / "out").path
    assert verify(made, source=source).ok
    restore(made, tmp_path / "back")
    assert (tmp_path / "back" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert verify(relayout(made, tmp_path / "other", gate_up_block=16).path, quick=True).ok
    edited = json.loads((made / "config.json").read_text()) | {"edit": nested(DEEP, "objects")}
    (made / "config.json").write_text(json.dumps(edited))
    assert restamp(made).edits == ("edit",)
    assert verify(made, quick=True).ok
    inspect(made)


@pytest.mark.parametrize("depth", [300, 5000])
def test_an_edit_too_deep(sample_prepared: Path, tmp_path: Path, depth: int) -> None:
    copy = Path(shutil.copytree(sample_prepared, tmp_path / "copy"))
    text = (copy / "config.json").read_text().rstrip().removesuffix("}")
    (copy / "config.json").write_text(f'{text}, "deep": {"[" * depth}{"]" * depth}}}')
    report = verify(copy, quick=True)
    assert "is nested too deep; expected at most 200 levels" in str(report.problems[0])
