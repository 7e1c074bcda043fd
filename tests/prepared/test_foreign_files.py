"""Files that the source does not have: verify names them, whether the manifest lists them or not."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nvfp4_prep import convert, relayout, restore, verify
from nvfp4_prep.checkpoint.filenames import MANIFEST
from nvfp4_prep.errors import CheckpointError, VerificationError

NAMES = ["chat_template.jinja", "modeling_deepseek.py", "tokenizer.model", "pytorch_model.bin", "sub/x.txt", "a.json"]


@pytest.fixture
def copy(sample_prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sample_prepared, tmp_path / "prepared"))


def plant(folder: Path, name: str, data: bytes = b"planted") -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(data)


def listed(folder: Path, name: str, **changes: Any) -> None:
    """Names a file in the manifest, as a forger would."""
    data = (folder / name).read_bytes()
    manifest = json.loads((folder / MANIFEST).read_text())
    record = {"nbytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "kind": "side"}
    manifest["files"][name] = record | changes
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.slow
def test_unlisted(copy: Path, sample_source: Path, name: str, quick: bool) -> None:
    plant(copy, name)
    for source in (None, sample_source):
        report = verify(copy, source=source, quick=quick)
        assert [(problem.where, problem.what[:15]) for problem in report.problems] == [(name, "does not belong")]
        assert report.next_step == "Move away what is not part of the checkpoint."


@pytest.mark.parametrize("command", [restore, relayout])
def test_unlisted_before_anything_is_made_of_it(copy: Path, tmp_path: Path, command: Any) -> None:
    plant(copy, "modeling_x.py")
    options = {"gate_up_block": 16} if command is relayout else {}
    with pytest.raises(VerificationError, match=r"modeling_x.py: does not belong"):
        command(copy, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("quick", [True, False])
def test_listed_as_a_side_file(copy: Path, sample_source: Path, name: str, quick: bool) -> None:
    plant(copy, name)
    listed(copy, name)
    report = verify(copy, source=sample_source, quick=quick)
    assert [(problem.where, problem.what) for problem in report.problems] == [(name, "is not in the source")]


@pytest.mark.parametrize("kind", ["made", "whatever", "passthrough", "", None, 5, ["side"]])
def test_listed_as_something_else(copy: Path, kind: object) -> None:
    plant(copy, "modeling_x.py")
    listed(copy, "modeling_x.py", kind=kind)
    with pytest.raises(CheckpointError, match=r"malformed.*modeling_x\.py"):
        verify(copy)


@pytest.mark.parametrize("kind", ["experts", "passthrough", "expert-scales", "source-scales", "source-block-scales"])
def test_listed_as_tensors(copy: Path, sample_source: Path, kind: str) -> None:
    save_file({"lm_head.weight_scale": torch.zeros(4)}, copy / "model-extra.safetensors")
    listed(copy, "model-extra.safetensors", kind=kind)
    report = verify(copy, source=sample_source, quick=True)
    assert not report.ok


@pytest.mark.parametrize("name", ["expert-scales.safetensors", "source-scales.safetensors"])
def test_one_more_tensor_in_a_file_of_the_experts(copy: Path, sample_source: Path, name: str) -> None:
    """A server would load it, if the index named it."""
    save_file({**load_file(copy / name), "lm_head.bias": torch.zeros(4)}, copy / name)
    listed(copy, name, kind=name.removesuffix(".safetensors"))
    found = [str(problem) for problem in verify(copy, source=sample_source, quick=True).problems]
    assert any("tensor 'lm_head.bias' does not belong" in line for line in found)


def test_a_listed_side_file_that_the_source_has_differently(sample_source: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(sample_source, tmp_path / "source"))
    plant(source, "tokenizer.model", b"as it was")
    made = convert(source, tmp_path / "out").path
    assert verify(made, source=source).ok
    plant(made, "tokenizer.model", b"as it is.")
    listed(made, "tokenizer.model")
    assert verify(made).ok
    assert "tokenizer.model: differs from the source" in str(verify(made, source=source).problems[0])


@pytest.mark.parametrize("name", [".gitattributes", ".cache/huggingface/x.lock", ".git/HEAD"])
def test_hidden_files_are_the_repository_s(copy: Path, sample_source: Path, name: str) -> None:
    (copy / name).parent.mkdir(parents=True, exist_ok=True)
    (copy / name).write_text("")
    assert verify(copy, source=sample_source, quick=True).ok


@pytest.mark.parametrize("name", [MANIFEST, "config.json", "README.md", "model.safetensors.index.json"])
def test_sizes_are_bounded_before_anything_is_read(copy: Path, name: str) -> None:
    if name != MANIFEST:
        listed(copy, name, nbytes=300_000_000, kind="made")
    os.truncate(copy / name, 300_000_000)
    if name == MANIFEST:
        with pytest.raises(CheckpointError, match=f"{copy / name}: is too large; expected at most 256000000 bytes"):
            verify(copy)
    else:
        assert "is too large; expected at most 256000000" in str(verify(copy, quick=True).problems[0])


@pytest.mark.parametrize(
    ("link_to", "step"),
    [
        ("/etc/passwd", r"Put the file itself in its place \(cp -rL .*\), or remove it if it does not belong there"),
        ("nowhere", "It does not belong to a prepared checkpoint: remove it"),
    ],
)
def test_a_foreign_link_is_a_problem_of_the_checkpoint(
    sample_prepared: Path, tmp_path: Path, link_to: str, step: str
) -> None:
    copy = Path(shutil.copytree(sample_prepared, tmp_path / "copy"))
    (copy / "modeling_x.py").symlink_to(link_to)
    with pytest.raises(CheckpointError, match=rf"modeling_x\.py: symbolic link .*{step}"):
        verify(copy)


@pytest.mark.parametrize("name", ["hf_quant_config.json", "{shard}", "{shard}/x"])
def test_a_copied_file_with_a_name_that_restore_needs(sample_prepared: Path, tmp_path: Path, name: str) -> None:
    copy = Path(shutil.copytree(sample_prepared, tmp_path / "copy"))
    manifest = json.loads((copy / "nvfp4_prep.json").read_text())
    count = len(manifest["layers"]) + sum(file["kind"] == "passthrough" for file in manifest["files"].values())
    name = name.format(shard=f"model-{count:05d}-of-{count:05d}.safetensors")
    manifest["source"]["texts"]["hf_quant_config.json"] = {"text": "{}"}
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_bytes(b"owned")
    digest = hashlib.sha256(b"owned").hexdigest()
    manifest["files"][name] = {"nbytes": 5, "sha256": digest, "kind": "side"}
    (copy / "nvfp4_prep.json").write_text(json.dumps(manifest))
    assert any("name of a file that restore writes" in str(problem) for problem in verify(copy).problems)
