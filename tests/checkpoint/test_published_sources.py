"""Sources as people publish or keep them, from the command line: converted whole, or refused with the right advice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from nvfp4_prep import convert, inspect, plan, verify
from nvfp4_prep.cli import cli
from nvfp4_prep.commands.restore import restore
from support import tiny_checkpoints as tiny
from support.checkpoint_files import read_tensors

_POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 4999802720\n"
INDEX = "model.safetensors.index.json"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def converted(source: Path, out: Path) -> Result:
    result = run("convert", source, out, "--no-smoke", "-q")
    assert result.exit_code == 0, result.output
    return result


def model() -> tiny.Tensors:
    layers = [tiny.TinyLayer(f"model.layers.{number}.mlp.experts", seed=number).tensors() for number in (0, 1)]
    return tiny.merged([*layers, tiny.others()])


def by_module(folder: Path) -> None:
    """A file for each layer's experts, as some exporters write them; no index."""
    (folder / "model.safetensors").unlink()
    for number in (0, 1):
        experts = {name: it for name, it in model().items() if name.startswith(f"model.layers.{number}.mlp.experts.")}
        save_file(experts, folder / f"layer_{number:03d}_experts.safetensors")
    rest = {name: tensor for name, tensor in model().items() if ".experts." not in name}
    save_file(rest, folder / "model_non_experts.safetensors")


def with_mtp(folder: Path) -> None:
    save_file({"mtp.fc.weight": torch.ones(4, 8, dtype=torch.bfloat16)}, folder / "mtp.safetensors")


@pytest.mark.parametrize("arrange", [by_module, with_mtp])
def test_every_file_of_a_source_without_an_index_comes_back(tmp_path: Path, arrange: Callable[[Path], None]) -> None:
    source = tiny.write(tmp_path / "source", model())
    arrange(source)
    converted(source, tmp_path / "out")
    restore(tmp_path / "out", tmp_path / "back")
    assert read_tensors(tmp_path / "back") == read_tensors(source)


def test_what_is_left_out_is_named(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "source", model(), shards=2)
    (source / "draft").mkdir()
    for name in ("draft/config.json", "draft/model.safetensors", "pytorch_model.bin", "chat_template.jinja"):
        (source / name).write_text("{}")
    left_out = ["draft/config.json", "draft/model.safetensors", "pytorch_model.bin"]
    assert list(plan(source).left_out) == list(inspect(source).left_out) == left_out
    lines = ["draft/config.json, draft/model.safetensors (not of this model)", "pytorch_model.bin (not safetensors)"]
    for shown in (run("convert", source, tmp_path / "out", "--dry-run"), converted(source, tmp_path / "out")):
        for line in lines:
            assert f"left out {line}" in shown.stdout
    assert not (tmp_path / "out" / "draft").exists()
    assert (tmp_path / "out" / "chat_template.jinja").exists()
    as_json = run("convert", source, tmp_path / "json", "--no-smoke", "--json")
    value = json.loads(as_json.stdout)
    assert value["left_out"] == list(value["left_out_reasons"]) == left_out
    assert verify(tmp_path / "out", source=source).ok


def test_an_index_that_lists_too_much_is_a_warning_everywhere(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "source", model(), shards=2)
    index = json.loads((source / INDEX).read_text())
    index["weight_map"]["model.layers.2.eh_proj.weight"] = "model-00002-of-00002.safetensors"
    (source / INDEX).write_text(json.dumps(index))
    warning = f"{INDEX} lists 1 tensor that no file holds ('model.layers.2.eh_proj.weight')"
    dry_run, inspected = run("convert", source, tmp_path / "out", "--dry-run"), run("inspect", source)
    for shown in (dry_run, inspected, converted(source, tmp_path / "out")):
        assert shown.exit_code == 0
        assert warning in shown.stdout
        assert "download" not in shown.stdout
    assert verify(tmp_path / "out", source=source).ok
    assert "eh_proj" not in (tmp_path / "out" / INDEX).read_text()
    restore(tmp_path / "out", tmp_path / "back")
    assert read_tensors(tmp_path / "back") == read_tensors(source)


@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", INDEX, "tokenizer.json"])
def test_git_lfs_pointers_are_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    source = tiny.write(tmp_path / "source", model(), shards=2)
    (source / name).write_text(_POINTER)
    for options in ([], ["--dry-run"]):
        result = run("convert", source, tmp_path / "out", *options)
        assert result.exit_code == 3
        assert f"{source / name}: is a git-lfs pointer" in result.stderr
        assert "git lfs pull" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("levels", [100, 101])
def test_a_depth_that_convert_takes_the_others_take(tmp_path: Path, levels: int) -> None:
    value: object = 0
    for _ in range(levels - 1):
        value = [value]
    source = tiny.write(tmp_path / "source", model(), tiny.config(odd=value))
    result = run("convert", source, tmp_path / "out", "--no-smoke", "-q")
    assert result.exit_code == (0 if levels <= 100 else 3), result.output
    if levels > 100:
        assert "at most 100 levels, found 101 levels" in result.stderr
        return
    assert verify(tmp_path / "out", source=source).ok
    assert inspect(tmp_path / "out").prepared
    restore(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back" / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_result_tells_what_was_left_out(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "source", model())
    (source / "model.gguf").write_bytes(b"GGUF")
    assert convert(source, tmp_path / "out").left_out == ("model.gguf",)
