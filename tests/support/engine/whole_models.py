"""Small NVFP4 MoE models that are whole: everything that a forward pass needs, with random weights of a fixed seed.

The models are transformers' own. The experts are quantized to ModelOpt's form, tensor by tensor.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from nvfp4_prep_kernels.nvfp4 import encode_codes, quantize
from support.nemotron_h import NEMOTRON_H_CONFIG

__all__ = ["DEEPSEEK_V3", "INPUT_SCALES", "NEMOTRON_H", "QWEN3_MOE", "WholeModel"]

VOCAB = 256
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "moe_intermediate_size": 128,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "dtype": "bfloat16",
}
INPUT_SCALES = {"gate_proj": 4.137 / (448 * 6), "up_proj": 4.137 / (448 * 6), "down_proj": 6.291 / (448 * 6)}
"""Largest activation that is expected, over the largest value that NVFP4 has.

Odd numbers, so that no bfloat16 activation falls on the border of two codes, where implementations may differ.
"""

_SCALES = {"embed": 1.0, "o_proj": 0.3, "down_proj": 0.5, "gate.weight": 3.0, "lm_head": 4.0}
"""Standard deviations by part of the name: of the embedding itself, else times 1 / sqrt(inputs)."""


@dataclass(frozen=True)
class WholeModel:
    """A model to build and quantize.

    Attributes:
        name: for messages.
        config: of transformers' config class.
        experts: path of the experts of layer ``{n}``.
        layers: MoE layers.
        ignore: modules that are not quantized.
        prefix: what stands in published checkpoints for the ``model.`` of transformers.
        gated: whether the experts have a gate.
    """

    name: str
    config: dict[str, Any]
    experts: str
    layers: tuple[int, ...]
    ignore: tuple[str, ...]
    prefix: str = "model."
    gated: bool = True

    def build(self, seed: int = 0) -> PreTrainedModel:
        """Return the model with random weights, scaled so that rounding does not decide what comes out.

        The embedding leads and the rest corrects it, as in a trained model; routing is decided, and so is the head. An
        ordinary random initialization is chaotic: one rounding sends a token to other experts, and bfloat16 against
        float32 then differ by whole units in transformers alone.
        """
        torch.manual_seed(seed)
        config = AutoConfig.for_model(**{key: value for key, value in self.config.items() if key != "architectures"})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, value in model.state_dict().items():
            if value.ndim >= 2:
                factors = [factor for part, factor in _SCALES.items() if part in name]
                value.normal_(std=factors[0] if "embed" in name else (factors or [1.0])[0] * value.shape[-1] ** -0.5)
        return model.to(torch.bfloat16).eval()

    def write(self, directory: Path, model: PreTrainedModel | None = None, *, exchanged: bool = False) -> Path:
        """Write the quantized checkpoint.

        Args:
            directory: to create.
            model: its weights, or None for :meth:`build`'s.
            exchanged: a model with wrong experts: gate under up's name and up under gate's, or, in a model without
            gate, the rows of up in reverse.
        """
        directory.mkdir(parents=True)
        tensors = dict(self._tensors(model if model is not None else self.build(), exchanged))
        save_file(tensors, directory / "model.safetensors")
        quantization = {
            "quant_method": "modelopt",
            "quant_algo": "NVFP4",
            "producer": {"name": "modelopt", "version": "0.47.0"},
            "config_groups": {
                "group_0": {
                    "input_activations": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16},
                    "weights": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16},
                    "targets": ["Linear"],
                }
            },
            "ignore": list(self.ignore),
        }
        config = {**self.config, "quantization_config": quantization}
        (directory / "config.json").write_text(json.dumps(config, indent=1))
        _tokenizer().save_pretrained(directory)
        return directory

    def _tensors(self, model: PreTrainedModel, exchanged: bool) -> Iterator[tuple[str, torch.Tensor]]:
        state = {name.replace("model.", self.prefix, 1): value for name, value in model.state_dict().items()}
        paths = [self.experts.format(n=number) for number in self.layers]
        for name, value in state.items():
            if not any(name.startswith(f"{path}.") for path in paths):
                yield name, value.clone().contiguous()
        for path in paths:
            for expert, down in enumerate(state[f"{path}.down_proj"]):
                if f"{path}.gate_up_proj" in state:
                    gate, up = state[f"{path}.gate_up_proj"][expert].chunk(2)
                    first = {"gate_proj": up, "up_proj": gate} if exchanged else {"gate_proj": gate, "up_proj": up}
                else:
                    up = state[f"{path}.up_proj"][expert]
                    first = {"up_proj": up.flip(0) if exchanged else up}
                shared = max(float(weight.abs().max()) for weight in first.values()) / (448 * 6)
                yield from _quantized(f"{path}.{expert}", first, shared)
                yield from _quantized(f"{path}.{expert}", {"down_proj": down}, float(down.abs().max()) / (448 * 6))


def _tokenizer() -> PreTrainedTokenizerFast:
    """Return one word for each token, so that servers have something to show."""
    words = {f"t{number}": number for number in range(VOCAB)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="t0")), unk_token="t0")


def _quantized(path: str, weights: dict[str, torch.Tensor], scale: float) -> Iterator[tuple[str, torch.Tensor]]:
    for projection, weight in weights.items():
        codes, scales = quantize(weight.float(), 1 / scale)
        yield f"{path}.{projection}.weight", encode_codes(codes)
        yield f"{path}.{projection}.weight_scale", scales.to(torch.float8_e4m3fn)
        yield f"{path}.{projection}.weight_scale_2", torch.tensor(scale)
        yield f"{path}.{projection}.input_scale", torch.tensor(INPUT_SCALES[projection])


QWEN3_MOE = WholeModel(
    "qwen3_moe",
    {
        **_COMMON,
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_key_value_heads": 2,
        # Not a multiple of 32: so vLLM takes no AMX attention, an illegal instruction on some virtual machines.
        "head_dim": 80,
        "num_experts": 8,
        "intermediate_size": 256,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "hidden_act": "silu",
    },
    "model.layers.{n}.mlp.experts",
    (0, 1),
    ("lm_head", "*self_attn*", "model.layers.*.mlp.gate"),
)
DEEPSEEK_V3 = WholeModel(
    "deepseek_v3",
    {
        **_COMMON,
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "intermediate_size": 256,
        "kv_lora_rank": 512,
        "q_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 64,  # with 512, the one size that MLA has on a CPU
        "v_head_dim": 32,
        "n_group": 2,
        "topk_group": 2,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "n_shared_experts": 1,
        "moe_layer_freq": 1,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 0,
        "hidden_act": "silu",
    },
    "model.layers.{n}.mlp.experts",
    (1, 2),
    ("lm_head", "*self_attn*", "model.layers.0*", "*shared_experts*", "model.layers.*.mlp.gate"),
)
NEMOTRON_H = WholeModel(
    "nemotron_h",
    {
        **_COMMON,
        **NEMOTRON_H_CONFIG,
        "num_key_value_heads": 2,
        "head_dim": 80,  # as above
        "n_routed_experts": 8,
    },
    "backbone.layers.{n}.mixer.experts",
    (1, 3),
    ("lm_head", "backbone.layers.0.*", "backbone.layers.2.*", "*shared_experts*", "backbone.layers.*.mixer.gate"),
    prefix="backbone.",
    gated=False,
)
