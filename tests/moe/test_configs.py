"""Published config files: read, planned at the models' real sizes, and stamped so that nothing else changes."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from nvfp4_prep import ConvertOptions, convert, plan, restore, verify
from nvfp4_prep.checkpoint.safetensors_header import encode_header
from nvfp4_prep.checkpoint.tensors import TensorSpec
from nvfp4_prep.errors import UnsupportedCheckpointError
from nvfp4_prep.moe.activation import ActivationKind
from nvfp4_prep.moe.model_config import quantization_configs
from nvfp4_prep.prepared.stamp import config_bytes
from nvfp4_prep.prepared.stamp import stamped as stamp_config
from nvfp4_prep_kernels import MoeDims
from support.cases import slow_after
from support.checkpoint_files import as_bytes, read_tensors
from support.paths import DATA
from support.tiny_checkpoints import TinyLayer, write

CONFIGS = DATA / "configs"
NAMES = sorted(
    path.name.removesuffix("_config.json") for path in CONFIGS.glob("*_config.json") if "hf_quant" not in path.name
)


def read(name: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
    quant = CONFIGS / f"{name}_hf_quant_config.json"
    config = json.loads((CONFIGS / f"{name}_config.json").read_text())
    return config, json.loads(quant.read_text()) if quant.exists() else None


@dataclass(frozen=True)
class Model:
    """One MoE layer of a published model, and what must come out."""

    name: str
    path: str
    projections: tuple[str, ...]
    dims: MoeDims
    activation: ActivationKind
    tp_sizes: tuple[int, ...]
    quantization_at: str
    clamp: float | None = None


W = ("w1", "w3", "w2")
P = ("gate_proj", "up_proj", "down_proj")
KIMI = Model(
    "nvidia--Kimi-K2.5-NVFP4",
    "language_model.model.layers.1.mlp.experts",
    P,
    MoeDims(384, 2048, 7168),
    ActivationKind.SILU,
    (1, 2, 4, 8, 16, 32),
    "config.json:quantization_config",
)
MODELS = [
    KIMI,
    replace(KIMI, name="nvidia--Kimi-K2.6-NVFP4"),
    Model(
        "nvidia--DeepSeek-V3.2-NVFP4",
        "model.layers.3.mlp.experts",
        P,
        MoeDims(256, 2048, 7168),
        ActivationKind.SILU,
        (1, 2, 4, 8, 16, 32),
        "hf_quant_config.json",
    ),
    Model(
        "nvidia--Qwen3-235B-A22B-NVFP4",
        "model.layers.0.mlp.experts",
        P,
        MoeDims(128, 1536, 4096),
        ActivationKind.SILU,
        (1, 2, 3, 4, 6, 8, 12, 24),
        "hf_quant_config.json",
    ),
    Model(
        "nvidia--NVIDIA-Nemotron-3-Nano-30B-A3B-NVFP4",
        "backbone.layers.1.mixer.experts",
        P[1:],
        MoeDims(128, 1856, 2688),
        ActivationKind.RELU2,
        (1,),
        "hf_quant_config.json",
    ),
    Model(
        "nvidia--MiniMax-M3-NVFP4",
        "language_model.model.layers.3.block_sparse_moe.experts",
        W,
        MoeDims(128, 3072, 6144),
        ActivationKind.SWIGLUOAI,
        (1, 2, 3, 4, 6, 8, 12, 16, 24, 48),
        "config.json:quantization_config",
        7.0,
    ),
]


def sparse_checkpoint(folder: Path, model: Model, experts: int | None = None) -> Path:
    """A checkpoint with one MoE layer at full size whose matrices are a hole in the file; only scalars are written."""
    config, quant = read(model.name)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if quant is not None:
        (folder / "hf_quant_config.json").write_text(json.dumps(quant))
    specs = []
    for expert in range(model.dims.experts if experts is None else experts):
        for name in model.projections:
            down = name in ("down_proj", "w2")
            rows, cols = (
                (model.dims.hidden, model.dims.intermediate) if down else (model.dims.intermediate, model.dims.hidden)
            )
            base = f"{model.path}.{expert}.{name}"
            specs += [
                TensorSpec(f"{base}.weight", "U8", (rows, cols // 2)),
                TensorSpec(f"{base}.weight_scale", "F8_E4M3", (rows, cols // 16)),
                TensorSpec(f"{base}.weight_scale_2", "F32", ()),
                TensorSpec(f"{base}.input_scale", "F32", ()),
            ]
    header, records = encode_header("model.safetensors", specs)
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(header)
        for record in records:
            if record.dtype == "F32":
                stream.seek(record.offset_bytes)
                stream.write(struct.pack("<f", 2.0**-9))
        stream.truncate(records[-1].offset_bytes + records[-1].nbytes)
    return folder


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
@pytest.mark.slow
def test_real_sizes_are_planned_with_the_real_config(tmp_path: Path, model: Model) -> None:
    made = plan(sparse_checkpoint(tmp_path / "source", model))
    (layer,) = made.layers
    assert layer.dims == model.dims
    assert (layer.activation.kind, layer.activation.clamp) == (model.activation, model.clamp)
    assert layer.layout.tp_sizes(model.dims) == model.tp_sizes
    assert next(iter(quantization_configs(made.index.config, made.index.hf_quant_config))) == model.quantization_at


def test_kimi_bytes(tmp_path: Path) -> None:
    """The figures of the survey: bytes of an expert, of a layer, and 4608 tensors that become 8."""
    made = plan(sparse_checkpoint(tmp_path / "source", KIMI))
    (layer,) = made.layers
    assert len(made.index.tensors) == 4608
    assert layer.source.source_nbytes == 9_512_690_688 == 384 * 24_772_632
    assert layer.prepared_nbytes == layer.source.source_nbytes - 384 * 3 * 2 * 4


def test_nemotron_is_padded_for_the_size_that_was_asked_for(tmp_path: Path) -> None:
    model = next(model for model in MODELS if "Nemotron" in model.name)
    source = sparse_checkpoint(tmp_path / "source", model)
    (layer,) = plan(source, ConvertOptions(moe_tp=4)).layers
    assert layer.layout.tp_sizes(model.dims) == (4,)
    assert layer.layout.padded_intermediate(1856) == 4 * 512
    with pytest.raises(UnsupportedCheckpointError, match="cannot be split over 8"):
        plan(source, ConvertOptions(moe_tp=8))


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_fewer_experts_than_the_config_promises(tmp_path: Path, model: Model) -> None:
    source = sparse_checkpoint(tmp_path / "source", model, experts=model.dims.experts - 1)
    with pytest.raises(UnsupportedCheckpointError, match=rf"experts 0 to {model.dims.experts - 2}, but config.json's"):
        plan(source)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model", slow_after(1, [m for m in MODELS if "K2.6" not in m.name]), ids=lambda model: model.name
)
def test_round_trip_under_the_real_config_and_names(tmp_path: Path, model: Model) -> None:
    """The real number of experts and spelling, small random matrices."""
    layer = TinyLayer(model.path, model.dims.experts, intermediate=32, hidden=64, names=model.projections)
    conf, quant = read(model.name)
    source = write(tmp_path / "source", layer.tensors(), conf, shards=2)
    if quant is not None:
        (source / "hf_quant_config.json").write_text(json.dumps(quant))
    (made,) = convert(source, tmp_path / "out").manifest.layers
    assert made.experts_path == model.path
    assert made.activation.kind is model.activation
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()
    assert verify(tmp_path / "out", source=source).ok
    restore(tmp_path / "out", tmp_path / "back")
    assert read_tensors(tmp_path / "back") == as_bytes(layer.tensors())
    for name in ("config.json", "hf_quant_config.json"):
        assert (source / name).exists() == (tmp_path / "back" / name).exists()
        if (source / name).exists():
            assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_stamp_replaces_the_quantization_config_and_nothing_else(name: str) -> None:
    config, quant = read(name)
    original = config.get("quantization_config") or quant
    assert original is not None
    stamped = json.loads(config_bytes(stamp_config(config, quant, ConvertOptions(gate_up_block=32), gated=True)))
    stamp = stamped.pop("quantization_config")
    assert list(stamped) == [key for key in config if key != "quantization_config"]
    assert stamped == {key: value for key, value in config.items() if key != "quantization_config"}
    assert (stamp["quant_method"], stamp["source"]) == ("nvfp4_prep", original)
    assert stamp["layout"]["gate_up_block"] == 32
    assert "producer" not in stamp
    flat = original.get("quantization", original)
    for key in ("quant_algo", "group_size", "kv_cache_quant_algo", "kv_cache_scheme", "ignore", "exclude_modules"):
        assert (key in stamp) == (key in flat)
        assert stamp.get(key) == flat.get(key)


def test_nested_quantization_config_is_stamped_where_it_stood() -> None:
    quantization = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    config = {"text_config": {"hidden_act": "silu", "quantization_config": quantization, "x": 1}, "unknown": [1, None]}
    stamped = json.loads(config_bytes(stamp_config(config, None, ConvertOptions(), gated=True)))
    assert "quantization_config" not in stamped
    assert stamped["unknown"] == [1, None]
    assert list(stamped["text_config"]) == ["hidden_act", "quantization_config", "x"]
    assert stamped["text_config"]["quantization_config"]["source"] == quantization
    both = {**config, "quantization_config": {"quant_method": "other"}}
    stamped = json.loads(config_bytes(stamp_config(both, None, ConvertOptions(), gated=True)))
    assert stamped["quantization_config"] == stamped["text_config"]["quantization_config"]
    assert stamped["quantization_config"]["source"] == {"quant_method": "other"}


def test_every_published_config_is_tested() -> None:
    assert {model.name for model in MODELS} == set(NAMES)
