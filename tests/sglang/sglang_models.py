"""The tiny models of the vLLM tests with input scales as real checkpoints have them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from nvfp4_prep.commands.convert import convert
from nvfp4_prep.options import ConvertOptions, LayoutName
from nvfp4_prep_kernels import MoeDims
from support.serving.families import COMPRESSED, FAMILIES, MTP
from support.serving.tiny_models import TinyModel

__all__ = ["COMPRESSED_MTP", "COMPRESSED_QWEN", "DRAFTED", "MODELS", "Checkpoints", "Model", "dims_of"]


@dataclass(frozen=True)
class Model(TinyModel):
    """A tiny model whose gate and up projections have one input scale, as they have one input.

    Attributes:
        one_input_scale: one for all experts of a layer, too.
    """

    one_input_scale: bool = False

    def _quantization_config(self) -> dict[str, Any]:
        found = super()._quantization_config()
        # Without this key SGLang looks for hf_quant_config.json beside the config of a mixed checkpoint.
        return {**found, "kv_cache_quant_algo": None} if self.quant == "modelopt_mixed" else found

    def _expert_tensors(self, path: str, number: int) -> Iterator[tuple[str, torch.Tensor]]:
        found = dict(super()._expert_tensors(path, number))
        up = self.projections[-2]
        for name, tensor in found.items():
            prefix, expert, projection, leaf = name.rsplit(".", 3)
            if leaf in ("input_scale", "input_global_scale"):
                of_expert = "0" if self.one_input_scale else expert
                of = up if projection in self.projections[:-1] else projection
                tensor = found[f"{prefix}.{of_expert}.{of}.{leaf}"].clone()
            yield name, tensor


def model(tiny: TinyModel, **changes: Any) -> Model:
    """The same model with such input scales."""
    values = {each.name: getattr(tiny, each.name) for each in fields(tiny)}
    return Model(**{**values, **changes})


DEEPSEEK = FAMILIES["deepseek_v3"]
_YARN = {
    "rope_type": "yarn",
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
_KIMI = FAMILIES["kimi_k25"]
KIMI_K25 = model(
    _KIMI,
    config={
        **_KIMI.config,
        "text_config": {**_KIMI.config["text_config"], "rope_scaling": _YARN},
        # as in the real config.json: SGLang's projector reads both
        "vision_config": {**_KIMI.config["vision_config"], "vt_hidden_size": 64, "text_hidden_size": 256},
    },
    others={
        **_KIMI.others,
        "vision_tower.encoder.final_layernorm.weight": (64,),
        "mm_projector.pre_norm.weight": (64,),
        "mm_projector.proj.0.weight": (256, 256),
    },
)
MODELS = {
    # SGLang's MLA on a CPU wants scaled positions, as real checkpoints of this family have them.
    "deepseek_v3": model(DEEPSEEK, config={**DEEPSEEK.config, "rope_scaling": _YARN}),
    **{name: model(FAMILIES[name]) for name in ("qwen3_moe", "mixtral", "glm4_moe", "minimax_m2", "nemotron_h")},
    "kimi_k25": KIMI_K25,
    # SGLang's loader of stacked Llama-4 experts does not know NVFP4's scales: the same weights, one by one.
    "llama4": model(FAMILIES["llama4"], stacked=False, one_scalar=True),
}
COMPRESSED_QWEN = model(COMPRESSED)
DRAFTED = {
    "deepseek_v3": model(MTP, config={**MTP.config, "rope_scaling": _YARN}),
    "glm4_moe": model(
        FAMILIES["glm4_moe"],
        family="glm4_moe_mtp",
        config={**FAMILIES["glm4_moe"].config, "num_nextn_predict_layers": 1},
        layers=MTP.layers,
        others={
            **FAMILIES["glm4_moe"].others,
            **{k: v for k, v in MTP.others.items() if k.startswith("model.layers.3.")},
        },
        ignore=MTP.ignore,
    ),
}
"""Models with a layer for multi-token prediction, all experts in NVFP4."""
COMPRESSED_MTP = replace(
    DRAFTED["deepseek_v3"],
    quant="compressed-tensors",
    ignore=(
        "lm_head",
        *(f"re:.*{part}.*" for part in ("self_attn", "layers.0", "shared_experts", "eh_proj", "shared_head")),
        "re:.*mlp.gate$",
    ),
)


@dataclass
class Checkpoints:
    """Sources and their prepared forms, made once a session by the real converter."""

    root: Path
    made: dict[tuple[str, str], tuple[Path, Path]] = field(default_factory=dict)

    def get(self, tiny: TinyModel, options: ConvertOptions | None = None, *, trtllm: bool = False) -> tuple[Path, Path]:
        """(source, prepared) of a model."""
        if trtllm:
            options = replace(options or ConvertOptions(), layout=LayoutName.TRTLLM)
        key = (repr(tiny), repr(options))
        if key not in self.made:
            folder = self.root / f"{len(self.made):03d}-{tiny.family}"
            source = tiny.write(folder / "source")
            convert(source, folder / "prepared", options)
            self.made[key] = (source, folder / "prepared")
        return self.made[key]


def dims_of(tiny: TinyModel) -> MoeDims:
    """The sizes of its layers."""
    experts, hidden, intermediate = tiny.sizes
    return MoeDims(experts, intermediate, hidden)
