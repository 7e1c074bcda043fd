"""Directories that hold something else than a checkpoint in safetensors files: named, with the step that helps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nvfp4_prep import inspect
from nvfp4_prep.checkpoint.contents import WEIGHT_SUFFIXES
from nvfp4_prep.checkpoint.index import read_index
from nvfp4_prep.checkpoint.local_source import LocalSource
from nvfp4_prep.errors import SourceError
from support.tiny_checkpoints import TinyLayer, config, write

_POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 4999802720\n"
PUBLISHED = "Only safetensors can be prepared"
BY_NAME = {
    "m-Q4_K_M.gguf": ("GGUF files", "A GGUF repository cannot be prepared"),
    "M.GGUF": (r"GGUF files \(M\.GGUF\)", "A GGUF repository cannot be prepared"),
    "Q4/m-00001-of-2.gguf": ("GGUF files", "A GGUF repository cannot be prepared"),
    "pytorch_model.bin": (r"PyTorch \.bin files", PUBLISHED),
    "x.PTH": (r"PyTorch \.pth files", PUBLISHED),
    "model.onnx": ("ONNX files", PUBLISHED),
    "tf_model.h5": (r"Keras \.h5 files", PUBLISHED),
    "flax_model.msgpack": (r"Flax \.msgpack files", PUBLISHED),
    "model.ckpt": (r"\.ckpt files", PUBLISHED),
    "weights.npz": (r"NumPy \.npz files", PUBLISHED),
    "rank0.engine": (r"TensorRT \.engine files", "An engine is built for one GPU"),
    "model.plan": (r"TensorRT \.plan files", "An engine is built for one GPU"),
    "model.SAFETENSORS": (r"but model\.SAFETENSORS", "Rename them"),
}


def refusal(folder: Path) -> str:
    with pytest.raises(SourceError) as caught:
        read_index(LocalSource(folder))
    return str(caught.value)


def test_a_suffix_that_may_mean_something_else_is_copied(tmp_path: Path) -> None:
    """Beside safetensors it does not say that the model's weights are there once more."""
    write(tmp_path, TinyLayer().tensors())
    names = [f"other{Path(name).suffix.casefold()}" for name in BY_NAME if not name.endswith(".SAFETENSORS")]
    put(tmp_path, *names)
    index = read_index(LocalSource(tmp_path))
    assert set(index.left_out) == {name for name in names if name.endswith(WEIGHT_SUFFIXES)}
    assert {"other.ckpt", "other.npz", "other.engine", "other.plan"} <= {file.name for file in index.side_files}


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".safetensors"):
            save_file({"x": torch.ones(4)}, folder / name)
        else:
            (folder / name).write_text("{}")


@pytest.mark.parametrize("with_config", [False, True])
@pytest.mark.parametrize("name", BY_NAME)
def test_formats_are_named(tmp_path: Path, name: str, with_config: bool) -> None:
    put(tmp_path, name, "README.md", *(["config.json"] if with_config else []))
    form, next_step = BY_NAME[name]
    with pytest.raises(SourceError, match=rf"{form}.*\. {next_step}") as caught:
        read_index(LocalSource(tmp_path))
    assert "download complete" not in str(caught.value)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("with_config", [False, True])
def test_an_adapter_is_no_model(tmp_path: Path, with_config: bool) -> None:
    put(tmp_path, "adapter_config.json", "adapter_model.safetensors", *(["config.json"] if with_config else []))
    assert "it holds a LoRA adapter, not a model. Give the NVFP4 checkpoint of the base model" in refusal(tmp_path)


def test_an_adapter_beside_a_model_is_no_reason_to_refuse_it(tmp_path: Path) -> None:
    write(tmp_path, TinyLayer().tensors(), index=True)
    put(tmp_path, "adapter_config.json", "adapter_model.safetensors")
    assert not inspect(tmp_path).refusal


@pytest.mark.parametrize("folder", ["nvfp4", "a/b"])
def test_a_checkpoint_below_is_found(tmp_path: Path, folder: str) -> None:
    put(tmp_path, f"{folder}/config.json", f"{folder}/model.safetensors", "README.md")
    assert f"has no config.json: a checkpoint is in the folder {folder}. Give the folder: …/{folder}." in refusal(
        tmp_path
    )


def test_several_checkpoints_below(tmp_path: Path) -> None:
    put(tmp_path, *(f"{name}/{file}" for name in "abcd" for file in ("config.json", "model.safetensors")))
    assert "4 checkpoints are in the folders a, b, c and 1 more" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["model_index.json", "unet/model.safetensors"], "is a diffusers pipeline"),
        (["params.json", "consolidated.00.pth"], "as Mistral or Meta distributes it"),
        (["params.json", "consolidated.safetensors"], "as Mistral or Meta distributes it"),
        (["Config.json", "model.safetensors"], "but 'Config.json'. Rename it"),
        (["model.safetensors"], "Give the directory of a Hugging Face checkpoint"),
        (["README.md"], "Give the directory of a Hugging Face checkpoint"),
        (["config.json", "training_args.bin", "optimizer.pt"], "Is the download complete?"),
        (["config.json"], "Is the download complete?"),
    ],
)
def test_what_else_is_there(tmp_path: Path, names: list[str], said: str) -> None:
    put(tmp_path, *names)
    assert said in refusal(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "m.gguf"])
def test_pointers_are_called_so_without_a_config(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(_POINTER)
    assert "is a git-lfs pointer" in refusal(tmp_path)


def test_names_are_bounded(tmp_path: Path) -> None:
    put(tmp_path, *(f"{'x' * 240}{number}.gguf" for number in range(5)))
    assert len(refusal(tmp_path)) < 900


def test_json_has_the_refusal(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config()))
    put(tmp_path, "m.gguf")
    with pytest.raises(SourceError, match="GGUF"):
        inspect(tmp_path)
