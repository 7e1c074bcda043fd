"""What convert accepts, its own readers accept: its small files are made and read before its first byte."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from nvfp4_prep import ConvertOptions, convert, inspect, plan, restore, verify
from nvfp4_prep.checkpoint.bounded_json import JsonBounds, dump_json
from nvfp4_prep.checkpoint.index import TEXT_MAX_NBYTES
from nvfp4_prep.cli import cli
from nvfp4_prep.errors import SourceError
from nvfp4_prep.pipeline import foresight
from nvfp4_prep.pipeline.foresight import check_readable
from nvfp4_prep.prepared.manifest import Manifest
from nvfp4_prep.prepared.stamp import config_bytes
from support import tiny_checkpoints as tiny


def nested(levels: int, value: Any) -> Any:
    for _ in range(levels):
        value = [value]
    return value


def source_with(folder: Path, **keys: Any) -> Path:
    """A tiny checkpoint with these keys in its config, whose file is compact."""
    source = tiny.write(folder, tiny.TinyLayer().tensors())
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys, separators=(",", ":")))
    return source


@pytest.mark.slow
def test_a_config_that_indentation_makes_too_large(tmp_path: Path) -> None:
    """Two bytes become 200 at 94 levels: half a megabyte would be written as 80 MB, which no reader takes."""
    source, out = source_with(tmp_path / "source", padding=nested(94, [0] * 400_000)), tmp_path / "out"
    assert (source / "config.json").stat().st_size < 1_000_000
    with pytest.raises(
        SourceError, match=rf"^{source}: cannot be converted: config\.json of the output is too large; expected at"
    ):
        convert(source, out)
    ran = CliRunner().invoke(cli, ["convert", str(source), str(out), "-q"])
    assert ran.exit_code == 3 and not out.exists()
    ahead = CliRunner().invoke(cli, ["convert", str(source), str(out), "--dry-run", "-q"])
    assert "config.json of the output is too large" in ahead.output


def test_the_deepest_and_largest_that_is_accepted_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quantization config stands three times in the output, deeper each time."""
    deep = nested(95, [0] * 50)
    source = source_with(tmp_path / "source", other=deep)
    path = source / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = config.get("quantization_config", {}) | {"ignore": deep[0]}
    path.write_text(json.dumps(config))
    out = convert(source, tmp_path / "out").path
    assert verify(out, source=source).ok
    inspect(out)
    assert (restore(out, tmp_path / "back").path / "config.json").read_bytes() == path.read_bytes()
    size = (out / "config.json").stat().st_size
    monkeypatch.setattr(foresight, "TEXT_MAX_NBYTES", TEXT_MAX_NBYTES | {"config.json": size})
    check_readable(plan(source), "s")
    monkeypatch.setattr(foresight, "TEXT_MAX_NBYTES", TEXT_MAX_NBYTES | {"config.json": size - 1})
    with pytest.raises(SourceError, match=r"config\.json of the output is too large"):
        check_readable(plan(source), "s")


@pytest.mark.parametrize("name", ["nvfp4_prep.json", "model.safetensors.index.json", "README.md"])
def test_each_small_file_is_bounded(
    sample_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    if name == "nvfp4_prep.json":
        monkeypatch.setattr(foresight, "MAX_SMALL_NBYTES", 5_000)
    else:
        monkeypatch.setattr(foresight, "TEXT_MAX_NBYTES", TEXT_MAX_NBYTES | {name: 500})
    with pytest.raises(SourceError, match=f"{name} of the output is too large; expected at most"):
        convert(sample_source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [ConvertOptions(), ConvertOptions(gate_up_scales="vllm"), ConvertOptions(layout="trtllm")],  # type: ignore[arg-type]
    ids=["reconcile", "vllm", "trtllm"],
)
def test_the_manifest_is_foreseen(
    sample_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: ConvertOptions
) -> None:
    """As many values as it will have, and no byte less, nor many more."""
    seen: list[bytes] = []
    keep = Manifest.from_bytes
    monkeypatch.setattr(Manifest, "from_bytes", lambda raw, *rest: seen.append(raw) or keep(raw, *rest))
    check_readable(plan(sample_source, options), "s")
    monkeypatch.undo()
    (foreseen,) = seen
    written = (convert(sample_source, tmp_path / "out", options).path / "nvfp4_prep.json").read_bytes()
    assert len(written) <= len(foreseen) < 1.1 * len(written)
    assert foreseen.count(b",") == written.count(b",")


def test_dump_json_is_the_text_that_is_written() -> None:
    value = {"name": "模型", "bad": "\ud800", "deep": nested(20, [1.5, None, True])}
    text = config_bytes(value)
    assert dump_json(value, len(text), indent=2, ensure_ascii=False) == text
    with pytest.raises(JsonBounds):
        dump_json(value, len(text) - 1, indent=2, ensure_ascii=False)
    with pytest.raises(JsonBounds, match="is too large: more, at most 50 bytes"):
        dump_json(value, 50, indent=2)


@pytest.mark.parametrize("folder", ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"])
def test_a_folder_with_the_name_of_a_restored_shard(tmp_path: Path, folder: str) -> None:
    """One layer and one file of other tensors: restore would write two shards."""
    source = tiny.write(tmp_path / "source", tiny.TinyLayer().tensors() | {"model.norm.weight": torch.ones(8)})
    (source / folder).mkdir()
    (source / folder / "notes.txt").write_text("x")
    with pytest.raises(SourceError, match=f"{folder}/notes.txt: folder has the name of a file of what restore would"):
        convert(source, tmp_path / "out")
    other = source / "model-00001-of-00003.safetensors"
    shutil.move(source / folder, other)
    out = convert(source, tmp_path / "out").path
    assert verify(out, source=source).ok
    assert (restore(out, tmp_path / "back").path / other.name / "notes.txt").read_text() == "x"
