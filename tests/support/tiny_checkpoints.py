"""Tiny NVFP4 checkpoints of every kind, written with the official safetensors library.

Random codes and block scales, never zeros; global scales differ from expert to expert. Nothing here uses the
converter, so that reading is tested against another writer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

LEAVES = {
    "modelopt": ("weight", "weight_scale", "weight_scale_2", "input_scale"),
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"),
}
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class TinyLayer:
    """One MoE layer.

    Attributes:
        path: module path of the experts as per-expert checkpoints have it.
        kind: "modelopt" or "compressed-tensors".
        names: gate, up and down; two names where the experts have no gate.
        differing: gate and up have different global scales.
    """

    path: str = "model.layers.0.mlp.experts"
    experts: int = 3
    intermediate: int = 64
    hidden: int = 128
    kind: str = "modelopt"
    names: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    differing: bool = False
    seed: int = 0

    def leaves(self, expert: int, name: str) -> tuple[torch.Tensor, torch.Tensor, float, float]:
        """Codes, block scales and the two global scales as multipliers."""
        position = self.names.index(name)
        generator = torch.Generator().manual_seed(1000 * self.seed + 10 * expert + position)
        down = position == len(self.names) - 1
        rows, cols = (self.hidden, self.intermediate) if down else (self.intermediate, self.hidden)
        codes = torch.randint(0, 256, (rows, cols // 2), dtype=torch.uint8, generator=generator)
        scales = torch.randint(1, 0x7F, (rows, cols // 16), dtype=torch.uint8, generator=generator)
        shared = 0 if position == 1 and not self.differing and len(self.names) == 3 else position
        global_scale = (1.0 + 0.37 * expert + 0.21 * shared) / 4096
        return codes, scales.view(torch.float8_e4m3fn), global_scale, (1.0 + 0.11 * expert + 0.05 * position) / 512

    def tensors(self) -> Tensors:
        """One tensor for each leaf of each projection of each expert."""
        made: Tensors = {}
        for expert in range(self.experts):
            for name in self.names:
                codes, scales, global_scale, input_scale = self.leaves(expert, name)
                reciprocal = self.kind == "compressed-tensors"
                scalars = [
                    torch.tensor([1.0 / value]) if reciprocal else torch.tensor(value)
                    for value in (global_scale, input_scale)
                ]
                for leaf, tensor in zip(LEAVES[self.kind], (codes, scales, *scalars), strict=True):
                    made[f"{self.path}.{expert}.{name}.{leaf}"] = tensor
        return made

    def llama4(self) -> Tensors:
        """The same layer stacked as Llama-4: ``[E, in, out]``, gate and up in one, one scalar for all experts."""
        made: Tensors = {}
        for fused, names in (("gate_up_proj", self.names[:-1]), ("down_proj", self.names[-1:])):
            for suffix, which in (("", 0), ("_weight_scale", 1)):
                experts = [
                    torch.cat([self.leaves(expert, name)[which].view(torch.uint8) for name in names])
                    for expert in range(self.experts)
                ]
                stack = torch.stack(experts).transpose(1, 2).contiguous()
                made[f"{self.path}.{fused}{suffix}"] = stack.view(torch.float8_e4m3fn) if which else stack
            for suffix, which in (("_weight_scale_2", 2), ("_input_scale", 3)):
                made[f"{self.path}.{fused}{suffix}"] = torch.tensor(self.leaves(0, names[0])[which])
        return made

    def step(self) -> Tensors:
        """The same layer as Step-3.5 stacks it: ``….moe.gate_proj.weight [E, out, in/2]``, scalars ``[E]``."""
        made: Tensors = {}
        for name in self.names:
            for position, leaf in enumerate(LEAVES["modelopt"]):
                parts = [torch.as_tensor(self.leaves(expert, name)[position]) for expert in range(self.experts)]
                stack = torch.stack([part.view(torch.uint8) if position == 1 else part for part in parts])
                made[f"{self.path}.{name}.{leaf}"] = stack.view(torch.float8_e4m3fn) if position == 1 else stack
        return made


def config(**changes: Any) -> dict[str, Any]:
    """A config.json of the ModelOpt kind."""
    made: dict[str, Any] = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_act": "silu",
        "quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16},
    }
    return made | changes


def write(
    folder: Path, tensors: Tensors, conf: dict[str, Any] | None = None, *, shards: int = 1, index: bool | None = None
) -> Path:
    """Writes a checkpoint; tensors are dealt out to the shards one by one, so that experts are torn apart."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config() if conf is None else conf))
    names = list(tensors)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors"
        mine = names[number::shards]
        save_file({name: tensors[name].contiguous() for name in mine}, folder / file)
        weight_map |= dict.fromkeys(mine, file)
    if index if index is not None else shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def others(layer: int = 0) -> Tensors:
    """Tensors that pass through, with names that must not be taken for routed experts."""
    prefix = f"model.layers.{layer}.mlp"
    return {
        "model.embed_tokens.weight": torch.ones(4, 8, dtype=torch.bfloat16),
        f"{prefix}.shared_experts.gate_proj.weight": torch.full((4, 8), 7, dtype=torch.uint8),
        f"{prefix}.shared_expert.up_proj.weight": torch.full((4, 8), 3, dtype=torch.uint8),
        f"{prefix}.gate.weight": torch.ones(3, 8, dtype=torch.float32),
        f"{prefix}.gate.e_score_correction_bias": torch.ones(3, dtype=torch.float32),
    }


def without(tensors: Tensors, drop: Callable[[str], bool]) -> Tensors:
    """All tensors but those whose name is to be dropped."""
    return {name: tensor for name, tensor in tensors.items() if not drop(name)}


def merged(parts: Iterable[Tensors]) -> Tensors:
    """The union."""
    return {name: tensor for part in parts for name, tensor in part.items()}
