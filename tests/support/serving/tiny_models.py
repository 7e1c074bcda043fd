"""Writes small NVFP4 MoE checkpoints made of hash bytes; `families.py` has the models.

Each holds all routed experts and enough other tensors to see that those pass through. Tensors that a model would need
for a forward pass but that loading does not check (attention, dense layers) are left out: the tests compare what is
loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from data.synthetic_layers import SyntheticLayer
from data.synthetic_torch import stacked_like_llama4, to_torch

__all__ = ["TinyModel"]


@dataclass(frozen=True)
class TinyModel:
    """One checkpoint to write.

    Attributes:
        family: model family, for names in test ids.
        config: config.json without sizes of the experts and without quantization_config.
        experts_path: module path of the experts with ``{n}`` for the layer.
        layers: layer numbers of the MoE layers.
        projections: names of gate, up and down (or up and down).
        sizes: E, H, I.
        others: names of tensors besides the experts, with shapes; ``{n}`` stands for each MoE layer.
        sized: config keys of E, H and I; dots lead into sub-configs.
        quant: "modelopt", "modelopt_legacy" (hf_quant_config.json), "modelopt_mixed", "modelopt_mixed_split" (the
            list of layers in hf_quant_config.json alone) or "compressed-tensors".
        ignore: modules that are not quantized.
        equal_gate_up: see SyntheticLayer.
        shards: number of files.
        stacked: one transposed tensor for all experts and one scalar for all, as Llama-4 has them.
        one_scalar: one scalar for all experts though the tensors are per expert: what `stacked` unstacked is.
    """

    family: str
    config: dict[str, Any]
    experts_path: str
    layers: tuple[int, ...]
    projections: tuple[str, ...]
    sized: tuple[str, str, str]
    sizes: tuple[int, int, int] = (8, 256, 128)
    others: dict[str, tuple[int | str, ...]] = field(default_factory=dict)
    quant: str = "modelopt"
    ignore: tuple[str, ...] = ("lm_head", "*self_attn*")
    equal_gate_up: bool = True
    shards: int = 2
    stacked: bool = False
    one_scalar: bool = False

    @property
    def gated(self) -> bool:
        return len(self.projections) == 3

    def with_sizes(self, experts: int, hidden: int, intermediate: int) -> TinyModel:
        return replace(self, sizes=(experts, hidden, intermediate))

    def layer(self, number: int) -> SyntheticLayer:
        experts, hidden, intermediate = self.sizes
        return SyntheticLayer(
            experts, hidden, intermediate, self.gated, self.equal_gate_up, label=f"-{self.family}-{number}"
        )

    def write(self, directory: Path) -> Path:
        """Writes config.json, shards and index."""
        directory.mkdir(parents=True)
        config = self._config()
        quant = self._quantization_config()
        if self.quant == "modelopt_mixed_split":
            legacy = {
                "quant_algo": "MIXED_PRECISION",
                "kv_cache_quant_algo": None,
                "exclude_modules": list(self.ignore),
            }
            legacy["quantized_layers"] = quant.pop("quantized_layers")
            producer = {"name": "modelopt", "version": "0.40.0"}
            text = json.dumps({"producer": producer, "quantization": legacy})
            (directory / "hf_quant_config.json").write_text(text)
        if self.quant == "modelopt_legacy":
            (directory / "hf_quant_config.json").write_text(json.dumps(quant))
        else:
            config["quantization_config"] = quant
        (directory / "config.json").write_text(json.dumps(config, indent=1))
        tensors = dict(self.tensors())
        weight_map: dict[str, str] = {}
        for shard in range(self.shards):
            # Round robin: every layer and every expert is spread over all shards.
            part = {name: tensor for i, (name, tensor) in enumerate(tensors.items()) if i % self.shards == shard}
            file = f"model-{shard + 1:05d}-of-{self.shards:05d}.safetensors"
            save_file(part, directory / file)
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        return directory

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors by name."""
        for number in self.layers:
            path = self.experts_path.format(n=number)
            if self.stacked:
                yield from stacked_like_llama4(self.layer(number), path)
            else:
                yield from self._expert_tensors(path, number)
        for pattern, shape in self.others.items():
            for name in dict.fromkeys(pattern.format(n=number) for number in self.layers):
                yield name, self._other(name, shape)

    def _expert_tensors(self, path: str, number: int) -> Iterator[tuple[str, torch.Tensor]]:
        spelled = dict(zip(self.layer(number).projections, self.projections, strict=True))
        for name, tensor in self.layer(number).tensors():
            expert, projection, leaf = name.split(".")
            if self.one_scalar and not tensor.shape:
                tensor = self.layer(number).tensor(0, "gate_proj" if projection == "up_proj" else projection, leaf)
            value = to_torch(tensor)
            if self.quant == "compressed-tensors":
                leaf, value = _compressed_tensors_leaf(leaf, value)
            yield f"{path}.{expert}.{spelled[projection]}.{leaf}", value

    def _other(self, name: str, shape: tuple[int | str, ...]) -> torch.Tensor:
        """A tensor of random values; in a shape, "E" and "H" stand for the sizes."""
        experts, hidden, _ = self.sizes
        sizes = [{"E": experts, "H": hidden}[size] if isinstance(size, str) else size for size in shape]
        count = int(torch.Size(sizes).numel())
        raw = hashlib.shake_256(f"{self.family}/{name}".encode()).digest(2 * count)
        values = torch.frombuffer(bytearray(raw), dtype=torch.int16).to(torch.float32) / 2**16
        bias = name.endswith("e_score_correction_bias")
        return values.reshape(sizes).to(torch.float32 if bias else torch.bfloat16)

    def _config(self) -> dict[str, Any]:
        config: dict[str, Any] = json.loads(json.dumps(self.config))
        for key, size in zip(self.sized, self.sizes, strict=True):
            *path, last = key.split(".")
            holder = config
            for part in path:
                holder = holder[part]
            holder[last] = size
        return config

    def _quantization_config(self) -> dict[str, Any]:
        if self.quant == "compressed-tensors":
            return _compressed_tensors_config(list(self.ignore))
        if self.quant == "modelopt_legacy":
            inner = {"quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": 16}
            return {
                "producer": {"name": "modelopt", "version": "0.29.0"},
                "quantization": {**inner, "exclude_modules": list(self.ignore)},
            }
        flat = {"quant_method": "modelopt", "producer": {"name": "modelopt", "version": "0.47.0"}}
        if self.quant.startswith("modelopt_mixed"):
            quantized = {
                self.experts_path.format(n=number): {"quant_algo": "NVFP4", "group_size": 16} for number in self.layers
            }
            return {**flat, "quant_algo": "MIXED_PRECISION", "ignore": list(self.ignore), "quantized_layers": quantized}
        four_bit = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
        group = {"input_activations": four_bit, "weights": four_bit, "targets": ["Linear"]}
        return {**flat, "quant_algo": "NVFP4", "config_groups": {"group_0": group}, "ignore": list(self.ignore)}


def _compressed_tensors_leaf(leaf: str, value: torch.Tensor) -> tuple[str, torch.Tensor]:
    """A ModelOpt leaf under its compressed-tensors name; global scales are reciprocals of shape [1]."""
    if leaf == "weight":
        return "weight_packed", value
    if leaf == "weight_scale":
        return leaf, value
    return {"weight_scale_2": "weight_global_scale", "input_scale": "input_global_scale"}[leaf], 1.0 / value.reshape(1)


def _compressed_tensors_config(ignore: list[str]) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
    activations = {**weights, "dynamic": "local"}
    group = {
        "format": "nvfp4-pack-quantized",
        "input_activations": activations,
        "weights": {**weights, "dynamic": False},
        "targets": ["Linear"],
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignore,
        "kv_cache_scheme": None,
    }
