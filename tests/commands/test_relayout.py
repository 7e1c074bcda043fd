"""Relayout: the same bytes as a conversion of the source, and nothing that is not whole."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from nvfp4_prep import ConvertOptions, GateUpPolicy, LayoutName, convert, relayout, restore, verify
from nvfp4_prep.checkpoint.safetensors_header import read_header
from nvfp4_prep.errors import (
    CheckpointError,
    ResumeConflictError,
    TargetError,
    UnsupportedCheckpointError,
    UsageError,
    VerificationError,
)
from nvfp4_prep_kernels import PreparedTensor, Projection
from support.cases import slow_after
from support.relayout_cases import flip, same_but_for_provenance, source
from support.tiny_checkpoints import TinyLayer, config, write

CHANGES: list[dict[str, Any]] = [
    {"gate_up_block": 16},
    {"gate_up_block": 32, "moe_tp": 2},
    {"layout": LayoutName.CUTEDSL_BATCHED},
]


def tensor_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".safetensors"}


@pytest.mark.slow
@pytest.mark.parametrize("changes", slow_after(1, CHANGES))
@pytest.mark.parametrize("policy", [GateUpPolicy.RECONCILE, GateUpPolicy.VLLM])
def test_equals_a_conversion_of_the_source(tmp_path: Path, changes: dict[str, Any], policy: GateUpPolicy) -> None:
    made = source(tmp_path / "source", intermediate=128)
    convert(made, tmp_path / "old", ConvertOptions(gate_up_scales=policy))
    result = relayout(tmp_path / "old", tmp_path / "new", **changes)
    convert(made, tmp_path / "direct", ConvertOptions(gate_up_scales=policy, **changes))
    same_but_for_provenance(tmp_path / "new", tmp_path / "direct")
    assert result.manifest.options == ConvertOptions(gate_up_scales=policy, **changes)
    assert [check["check"] for check in result.manifest.verified][-1] == "relayout"
    assert verify(tmp_path / "new", source=made).ok
    restore(tmp_path / "new", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config()


def test_there_and_back_through_padding(tmp_path: Path) -> None:
    """I 96 and H 144 are padded in one layout for each of the sizes; stacked, transposed source."""
    layer = TinyLayer(intermediate=96, hidden=144)
    made = write(tmp_path / "source", layer.llama4())
    convert(made, tmp_path / "a")
    relayout(tmp_path / "a", tmp_path / "b", gate_up_block=16, moe_tp=2)
    relayout(tmp_path / "b", tmp_path / "c", gate_up_block=64, moe_tp=1)
    same_but_for_provenance(tmp_path / "a", tmp_path / "c")
    assert tensor_files(tmp_path / "a").keys() == tensor_files(tmp_path / "b").keys()
    assert tensor_files(tmp_path / "a") != tensor_files(tmp_path / "b")


def test_from_batched_the_block_is_the_usual_one(tmp_path: Path) -> None:
    made = source(tmp_path / "source")
    convert(made, tmp_path / "old", ConvertOptions(layout=LayoutName.CUTEDSL_BATCHED))
    result = relayout(tmp_path / "old", tmp_path / "new", layout=LayoutName.CUTEDSL)
    assert result.manifest.options == ConvertOptions()


def test_refusals_before_anything_is_written(tmp_path: Path) -> None:
    made = source(tmp_path / "source", intermediate=96)
    convert(made, tmp_path / "old")
    target = tmp_path / "new"
    with pytest.raises(UsageError, match="has this layout already"):
        relayout(tmp_path / "old", target)
    with pytest.raises(UsageError, match="expected 16 or 32 or 64"):
        relayout(tmp_path / "old", target, gate_up_block=48)
    with pytest.raises(UnsupportedCheckpointError, match="pads nothing"):
        relayout(tmp_path / "old", target, layout=LayoutName.CUTEDSL_BATCHED)
    with pytest.raises(UnsupportedCheckpointError, match="cannot be split over 4"):
        relayout(tmp_path / "old", target, moe_tp=4)
    with pytest.raises(CheckpointError, match="not a prepared checkpoint"):
        relayout(made, target, gate_up_block=16)
    with pytest.raises(TargetError, match="same directory"):
        relayout(tmp_path / "old", tmp_path / "old", gate_up_block=16)
    assert not target.exists()


def test_experts_without_gate_have_no_batched_layout(tmp_path: Path) -> None:
    layer = TinyLayer(names=("up_proj", "down_proj"), intermediate=128)
    write(tmp_path / "source", layer.tensors(), config(mlp_hidden_act="relu2"))
    convert(tmp_path / "source", tmp_path / "old")
    with pytest.raises(UnsupportedCheckpointError, match="plain SiLU only"):
        relayout(tmp_path / "old", tmp_path / "new", layout=LayoutName.CUTEDSL_BATCHED)


@pytest.mark.parametrize("name", ["experts-layer-00001.safetensors", "model-00001-of-00001.safetensors"])
def test_a_flipped_byte_is_found(tmp_path: Path, name: str) -> None:
    convert(source(tmp_path / "source"), tmp_path / "old")
    flip(tmp_path / "old" / name, (tmp_path / "old" / name).stat().st_size - 1)
    with pytest.raises(VerificationError):
        relayout(tmp_path / "old", tmp_path / "new", gate_up_block=16)
    assert not (tmp_path / "new" / "config.json").exists()
    assert not (tmp_path / "new" / "nvfp4_prep.json").exists()


def test_a_damaged_original_block_scale_is_found(tmp_path: Path) -> None:
    """The rescaled experts' originals decide whether the source comes back; they are copied, so their digest is
    checked."""
    convert(source(tmp_path / "source"), tmp_path / "old")
    path = tmp_path / "old" / "source-block-scales-layer-00001.safetensors"
    flip(path, path.stat().st_size - 1)
    with pytest.raises(VerificationError):
        relayout(tmp_path / "old", tmp_path / "new", gate_up_block=16)
    assert not (tmp_path / "new" / "config.json").exists()


def test_continues_where_it_was_killed(tmp_path: Path) -> None:
    convert(source(tmp_path / "source"), tmp_path / "old")
    relayout(tmp_path / "old", tmp_path / "whole", gate_up_block=16)

    class Kill(BaseException):
        pass

    class Progress:
        def start(self, what: str, total: int, done: int) -> None:
            self.left = 100_000  # more than the first file

        def advance(self, nbytes: int, what: str) -> None:
            self.left -= nbytes
            if self.left < 0:
                raise Kill

        def close(self) -> None:
            return

    with pytest.raises(Kill):
        relayout(tmp_path / "old", tmp_path / "new", gate_up_block=16, progress=Progress(), threads=1)
    assert not (tmp_path / "new" / "config.json").exists()
    with pytest.raises(ResumeConflictError):
        relayout(tmp_path / "old", tmp_path / "new", gate_up_block=32)
    result = relayout(tmp_path / "old", tmp_path / "new", gate_up_block=16)
    assert result.resumed
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "new" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_changed_rescaled_block_scale_is_found(tmp_path: Path) -> None:
    """It turns back to no source tensor, so only the checksum of what was written can tell."""
    (layer,) = convert(write(tmp_path / "s", TinyLayer(differing=True).tensors()), tmp_path / "old").manifest.layers
    expert, side = layer.gate_up.reconciled[0]
    path = tmp_path / "old" / layer.files[0]
    tensor, dims = PreparedTensor.W13_WEIGHT_SCALE, layer.dims
    record = next(r for r in read_header(path).tensors if r.name.endswith(".w13_weight_scale"))
    nbytes = layer.layout.expert_nbytes(tensor, dims)
    begin = record.offset_bytes + expert * nbytes
    data = bytearray(path.read_bytes())
    stored = torch.frombuffer(data[begin : begin + nbytes], dtype=torch.uint8)
    parts = dict(
        zip(
            layer.layout.projections(tensor),
            (
                part.clone()
                for part in layer.layout.invert(tensor, stored.view(layer.layout.expert_shape(tensor, dims)), dims)
            ),
            strict=True,
        )
    )
    parts[Projection(side)][3, 1] ^= 1
    data[begin : begin + nbytes] = layer.layout.apply(tensor, *parts.values()).numpy().tobytes()
    path.write_bytes(data)
    with pytest.raises(VerificationError, match=f"bytes of expert {expert} differ from what was written"):
        relayout(tmp_path / "old", tmp_path / "new", gate_up_block=16)


def test_a_forged_checksum_does_not_hide_another_expert(tmp_path: Path) -> None:
    """Bytes and their checksum changed together: the digests of the source tensors still tell."""
    (layer,) = convert(write(tmp_path / "s", TinyLayer().tensors()), tmp_path / "old").manifest.layers
    path, tensor = tmp_path / "old" / layer.files[0], PreparedTensor.W2_WEIGHT
    record = next(r for r in read_header(path).tensors if r.name.endswith(".w2_weight"))
    nbytes = layer.layout.expert_nbytes(tensor, layer.dims)
    flip(path, record.offset_bytes + nbytes)
    manifest_path = tmp_path / "old" / "nvfp4_prep.json"
    manifest = json.loads(manifest_path.read_text())
    data = path.read_bytes()[record.offset_bytes :][nbytes : 2 * nbytes]
    manifest["layers"][0]["expert_crc32"][tensor][1] = zlib.crc32(data)
    manifest_path.write_text(json.dumps(manifest))
    with pytest.raises(VerificationError, match=r"down_proj\.weight is not what the source held"):
        relayout(tmp_path / "old", tmp_path / "new", gate_up_block=16)
    assert not (tmp_path / "new" / "config.json").exists()


@pytest.mark.parametrize("layout", [LayoutName.CUTEDSL, "cutedsl"])
@pytest.mark.slow
def test_a_layout_by_its_name_keeps_the_rest(sample_source: Path, tmp_path: Path, layout: Any) -> None:
    out = convert(sample_source, tmp_path / "out", ConvertOptions(gate_up_block=32)).path
    options = relayout(out, tmp_path / "new", layout=layout, moe_tp=2).manifest.options
    assert options == ConvertOptions(gate_up_block=32, moe_tp=2)
