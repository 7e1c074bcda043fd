"""Experts computed from the source's own tensors, in float32, by nothing that this project has a part in.

The tensors are read with safetensors and decoded by the functions that vLLM has for emulating NVFP4 in torch. What is
computed replaces the experts of a loaded model, so that all the rest of two forward passes is the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from support.engine.whole_models import WholeModel

__all__ = ["SourceLayers"]


@dataclass
class SourceLayers:
    """The experts of a source checkpoint.

    Attributes:
        model: what the checkpoint was written from.
        directory: the checkpoint.
        wrong: gate and up exchanged, or without a gate the rows of up in reverse.
        calls: input, routing and output of each call.
    """

    model: WholeModel
    directory: Path
    wrong: bool = False
    calls: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._tensors = load_file(self.directory / "model.safetensors")

    def forward(self) -> Callable[..., torch.Tensor]:
        """What stands in for ``RoutedExperts.forward_modular``."""

        def forward_modular(
            layer: Any, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, **_: Any
        ) -> torch.Tensor:
            found = self.compute(layer.layer_name, x, topk_weights, topk_ids)
            self.calls.append(found)
            return found

        return forward_modular

    def compute(self, layer_name: str, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """One layer's output, in the dtype of ``x``."""
        number = re.search(r"layers\.(\d+)\.", layer_name)
        assert number is not None, layer_name
        path = self.model.experts.format(n=number[1])
        total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for expert in sorted(set(ids.flatten().tolist())):
            token, slot = torch.where(ids == expert)
            parts = {name: self._linear(f"{path}.{expert}.{name}", x[token].float()) for name in self._first()}
            if self.model.gated:
                gate, up = parts["gate_proj"], parts["up_proj"]
                inner = torch.nn.functional.silu(up if self.wrong else gate) * (gate if self.wrong else up)
            else:
                up = parts["up_proj"]
                inner = torch.relu(up.flip(-1) if self.wrong else up).square()
            down = self._linear(f"{path}.{expert}.down_proj", inner)
            total.index_add_(0, token, down * weights[token, slot, None].float())
        return total.to(x.dtype)

    def _first(self) -> tuple[str, ...]:
        return ("gate_proj", "up_proj") if self.model.gated else ("up_proj",)

    def _linear(self, path: str, x: torch.Tensor) -> torch.Tensor:
        """NVFP4 activations times NVFP4 weights."""
        from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import (
            dequantize_to_dtype,
            ref_nvfp4_quant,
        )

        stored = {name: self._tensors[f"{path}.{name}"] for name in ("weight", "weight_scale", "weight_scale_2")}
        weight = dequantize_to_dtype(*stored.values(), torch.float32, 16, swizzle=False)  # on the CPU: in torch
        inverse = 1.0 / self._tensors[f"{path}.input_scale"].to(x.device)
        codes, scales = ref_nvfp4_quant(x, inverse, 16)
        blocks = codes.view(len(x), -1, 16) * (scales / inverse).unsqueeze(-1)
        return blocks.view(len(x), -1) @ weight.to(x.device).T
