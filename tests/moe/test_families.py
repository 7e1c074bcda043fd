"""Real quantizers' checkpoints and every arrangement of synthetic layers, end to end, against vLLM's own preparation.

`vllm_digests.json` holds what vLLM 0.33 makes of the same layers at load time (see make_vllm_digests.py).
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data.synthetic_layers import LAYERS, SyntheticLayer
from data.synthetic_torch import stacked_like_llama4, to_torch
from nvfp4_prep import ConvertOptions, GateUpPolicy, LayoutName, convert, inspect, restore, verify
from nvfp4_prep.errors import UnsupportedCheckpointError
from nvfp4_prep_kernels import MoeDims, MoeLayout, PreparedTensor, take_rank
from support.cases import slow_after
from support.checkpoint_files import IN_REPOSITORY, WHOLE, load_tensors, raw_bytes, read_tensors
from support.paths import DATA
from support.tiny_checkpoints import Tensors, config, write

REAL = sorted(IN_REPOSITORY.iterdir()) + (sorted(WHOLE.iterdir()) if WHOLE.is_dir() else [])
REFUSED = {
    "modelopt-gpt_oss-experts": r"experts have biases \(model\.layers\.0\.mlp\.experts\.down_proj_bias",
    "modelopt-qwen3_moe-w4a16": r"weight-only NVFP4 \(W4A16: no input scales\)",
}
ACCEPTED = [path for path in REAL if path.name not in REFUSED]
VLLM = ConvertOptions(gate_up_scales=GateUpPolicy.VLLM)


def label(path: Path) -> str:
    return path.name if path.is_relative_to(DATA) else f"{path.name}-whole"


@functools.cache
def digests() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DATA / "vllm_digests.json").read_text())["layers"]
    return found


def assert_digest(tensor: torch.Tensor, record: dict[str, Any]) -> None:
    assert list(tensor.shape) == record["shape"]
    assert str(tensor.dtype) == f"torch.{record['dtype']}"
    assert hashlib.sha256(raw_bytes(tensor)).hexdigest() == record["sha256"]


@pytest.mark.parametrize("source", ACCEPTED, ids=label)
def test_real_checkpoints_become_what_vllm_makes_of_them(tmp_path: Path, source: Path) -> None:
    made = convert(source, tmp_path / "out", VLLM).manifest
    tensors = load_tensors(tmp_path / "out")
    for layer in made.layers:
        record = digests()[f"{source.name}/{layer.experts_path}"]["tensors"]
        prefix = f"{layer.experts_path}.routed_experts"
        for name in record.keys() - {"w13_alpha", "w2_alpha"}:
            assert_digest(tensors[f"{prefix}.{name}"], record[name])
        for side in ("w13", "w2"):
            alpha = tensors[f"{prefix}.{side}_weight_scale_2"] * tensors[f"{prefix}.{side}_input_scale"]
            assert_digest(alpha, record[f"{side}_alpha"])


@pytest.mark.parametrize("source", ACCEPTED, ids=label)
def test_real_checkpoints_come_back_bit_for_bit(tmp_path: Path, source: Path) -> None:
    convert(source, tmp_path / "out")
    assert verify(tmp_path / "out", source=source).ok
    restore(tmp_path / "out", tmp_path / "back")
    assert read_tensors(source) == read_tensors(tmp_path / "back")
    for name in ("config.json", "hf_quant_config.json", "generation_config.json", "recipe.yaml"):
        assert (source / name).exists() == (tmp_path / "back" / name).exists()
        if (source / name).exists():
            assert (source / name).read_bytes() == (tmp_path / "back" / name).read_bytes()


@pytest.mark.parametrize("source", [path for path in REAL if path.name in REFUSED], ids=label)
def test_real_checkpoints_that_must_be_refused(tmp_path: Path, source: Path) -> None:
    with pytest.raises(UnsupportedCheckpointError, match=REFUSED[source.name]) as caught:
        convert(source, tmp_path / "out")
    assert "experts" in str(caught.value)
    assert caught.value.next_step
    assert not (tmp_path / "out").exists()
    found = inspect(source)
    assert str(caught.value) == found.refusal
    assert any(layer.reason for layer in found.layers)


def test_figures_of_the_policies_for_differing_scales(tmp_path: Path) -> None:
    """llm-compressor 0.9: all pairs differ. reconcile is within e4m3's rounding and far below vllm's error."""
    source = IN_REPOSITORY / "llmc09-mixtral"
    for policy in (GateUpPolicy.RECONCILE, GateUpPolicy.VLLM):
        result = convert(source, tmp_path / policy.value, ConvertOptions(gate_up_scales=policy))
        (layer,) = result.manifest.layers
        assert layer.gate_up.differing == 8
        errors = layer.gate_up.figures["relative_error"]
        assert errors == {"source": 0.0, "reconcile": 0.0152064, "vllm": 0.282319}
        assert (
            errors
            == json.loads((tmp_path / policy.value / "nvfp4_prep.json").read_text())["layers"][0]["gate_up_scales"][
                "figures"
            ]["relative_error"]
        )
        assert len(layer.gate_up.reconciled) == (8 if policy is GateUpPolicy.RECONCILE else 0)
    assert errors["reconcile"] < 2**-4 / 2 < errors["vllm"]
    with pytest.raises(UnsupportedCheckpointError, match="8 of 8 experts have different global scales"):
        convert(source, tmp_path / "error", ConvertOptions(gate_up_scales=GateUpPolicy.ERROR))


def test_policies_agree_where_the_scales_do(tmp_path: Path) -> None:
    source = IN_REPOSITORY / "modelopt041-deepseek_v3-mlp"
    files = {}
    for policy in GateUpPolicy:
        convert(source, tmp_path / policy.value, ConvertOptions(gate_up_scales=policy))
        files[policy] = {path.name: path.read_bytes() for path in (tmp_path / policy.value).glob("*.safetensors")}
    assert files[GateUpPolicy.RECONCILE] == files[GateUpPolicy.VLLM] == files[GateUpPolicy.ERROR]


LEAVES = ("weight", "weight_scale", "weight_scale_2", "input_scale")
Arrangement = Callable[[SyntheticLayer], Tensors]


def per_expert(layer: SyntheticLayer, path: str = "model.layers.0.mlp.experts") -> Tensors:
    return {f"{path}.{name}": to_torch(tensor) for name, tensor in layer.tensors()}


def step(layer: SyntheticLayer) -> Tensors:
    """Step-3.5: stacks per projection, scalars ``[E]``."""
    made: Tensors = {}
    for name in layer.projections:
        for leaf in LEAVES:
            each = [to_torch(layer.tensor(expert, name, leaf)) for expert in range(layer.experts)]
            stack = torch.stack([tensor.view(torch.uint8) if tensor.dim() else tensor for tensor in each])
            made[f"model.layers.0.moe.{name}.{leaf}"] = stack.view(each[0].dtype)
    return made


def llama4(layer: SyntheticLayer) -> Tensors:
    return dict(stacked_like_llama4(layer, "model.layers.0.feed_forward.experts"))


GATED = [layer for layer in LAYERS if layer.gated and layer.hidden < 4096]
ARRANGED = [("per expert", per_expert, layer) for layer in LAYERS if layer.hidden < 4096]
ARRANGED += [("step", step, layer) for layer in GATED[:7]] + [("llama4", llama4, layer) for layer in GATED[:7]]
ARRANGED = ARRANGED[::3] + ARRANGED[1::3] + ARRANGED[2::3]  # a few of each kind first


@pytest.mark.parametrize(
    ("kind", "arrange", "layer"),
    slow_after(3, ARRANGED),
    ids=[f"{kind}-{layer.name}" for kind, _, layer in ARRANGED],
)
def test_synthetic_layers_become_what_vllm_makes_of_them(
    tmp_path: Path, kind: str, arrange: Arrangement, layer: SyntheticLayer
) -> None:
    """Aligned and padded, gated and not, in every arrangement."""
    conf = config() if layer.gated else config(hidden_act="relu2")
    source = write(tmp_path / "source", arrange(layer), conf, shards=2)
    (made,) = convert(source, tmp_path / "out", VLLM).manifest.layers
    record = digests()[f"synthetic/{layer.name}"]
    assert made.layout.padded_hidden(layer.hidden) == record["padded_hidden"]
    assert made.layout.padded_intermediate(layer.intermediate) == record["padded_intermediate"]
    tensors, prefix = load_tensors(tmp_path / "out"), f"{made.experts_path}.routed_experts"
    for name in PreparedTensor:
        assert_digest(tensors[f"{prefix}.{name}"], record["tensors"][name])
    if kind != "llama4":  # one scalar for all experts is another model
        for name in record["tensors"].keys() - set(PreparedTensor) - {"w13_alpha", "w2_alpha"}:
            assert_digest(tensors[f"{prefix}.{name}"], record["tensors"][name])
    assert verify(tmp_path / "out", source=source).ok
    restore(tmp_path / "out", tmp_path / "back")
    assert read_tensors(source) == read_tensors(tmp_path / "back")


RANKS = [
    (key, layer)
    for layer in LAYERS
    for key in digests()
    if key.startswith(f"synthetic/{layer.name}/") and "/tp" in key and layer.hidden < 4096
]


@pytest.mark.parametrize(("key", "layer"), slow_after(10, RANKS), ids=[key for key, _ in RANKS])
def test_a_rank_of_a_file_made_for_its_size_gets_what_vllm_prepares(
    tmp_path: Path, key: str, layer: SyntheticLayer
) -> None:
    size, rank = map(int, key.rpartition("/tp")[2].split("-rank"))
    batched = "/batched/" in key
    options = ConvertOptions(
        layout=LayoutName.CUTEDSL_BATCHED if batched else LayoutName.CUTEDSL,
        gate_up_scales=GateUpPolicy.VLLM,
        moe_tp=size,
    )
    conf = config() if layer.gated else config(hidden_act="relu2")
    source = write(tmp_path / "s", per_expert(layer), conf)
    if batched and layer.intermediate // size % 128:
        # [gate; up] of a rank is no union of the whole's swizzle tiles: no such file is made
        with pytest.raises(UnsupportedCheckpointError, match="whole swizzle tiles"):
            convert(source, tmp_path / "out", options)
        return
    (made,) = convert(source, tmp_path / "out", options).manifest.layers
    assert size in made.tp_sizes
    tensors = load_tensors(tmp_path / "out")
    layout: MoeLayout = made.layout
    dims = MoeDims(layer.experts, layer.intermediate, layer.hidden)
    for name in PreparedTensor:
        whole = tensors[f"{made.experts_path}.routed_experts.{name}"]
        share = take_rank(layout, name, whole.view(torch.uint8), dims, rank, size)
        assert_digest(share.contiguous().view(whole.dtype), digests()[key]["tensors"][name])
