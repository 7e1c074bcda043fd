"""What stock vLLM makes of expert names and formats that the docs speak of (docs/supported-models.md).

Each test holds a statement of the docs about vLLM 0.33. One that fails with a newer vLLM says that a refusal, or a
sentence, has lost its reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from vllm.config import CompilationConfig, DeviceConfig, KernelConfig, VllmConfig
from vllm.model_executor.layers.fused_moe import layer as fused_moe
from vllm.model_executor.layers.fused_moe.config import FusedMoEParallelConfig
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config
from vllm.model_executor.layers.quantization.quark.quark import QuarkConfig
from vllm.model_executor.layers.quantization.quark.quark_moe import QuarkNvfp4MoEMethod

from support.serving.vllm_on_cpu import rank_of
from support.tiny_checkpoints import Tensors, TinyLayer

LAYER = TinyLayer()
EXPERTS = range(LAYER.experts)


def _fp4(*, dynamic: bool) -> list[dict[str, Any]]:
    return [
        {"dtype": "fp4", "qscheme": "per_group", "group_size": 16, "is_dynamic": dynamic},
        {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False},
    ]


QUARK = {
    "quant_method": "quark",
    "exclude": ["lm_head"],
    "layer_type_quant_config": {},
    "layer_quant_config": {},
    "export": {"kv_cache_group": [], "pack_method": "order"},
    "global_quant_config": {
        "weight": _fp4(dynamic=False),
        "input_tensors": _fp4(dynamic=True),
        "output_tensors": None,
        "bias": None,
    },
}
_SIDE = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "nvfp4-pack-quantized",
    "ignore": [],
    "config_groups": {
        "group_0": {
            "format": "nvfp4-pack-quantized",
            "targets": ["Linear"],
            "weights": _SIDE | {"dynamic": False},
            "input_activations": _SIDE | {"dynamic": "local"},
        }
    },
}
NUMBERS = iter(range(1000))


@pytest.fixture
def vllm_config() -> Iterator[None]:
    config = VllmConfig(
        device_config=DeviceConfig("cpu"),
        kernel_config=KernelConfig(moe_backend="flashinfer_cutedsl"),
        compilation_config=CompilationConfig(mode=0),
    )
    with rank_of(config):
        yield


def routed(quant_config: Any) -> Any:
    """A layer of vLLM's for :data:`LAYER`, its parameters filled with what no test writes."""
    parallel = FusedMoEParallelConfig.make_no_parallel()
    with mock.patch.object(fused_moe, "make_parallel_config", lambda **_: parallel):
        runner = fused_moe.FusedMoEFactory(
            num_experts=LAYER.experts,
            top_k=1,
            hidden_size=LAYER.hidden,
            intermediate_size=LAYER.intermediate,
            params_dtype=torch.bfloat16,
            quant_config=quant_config,
            activation="silu",
            ckpt_names=("gate_proj", "down_proj", "up_proj"),
            prefix=f"model.layers.{next(NUMBERS)}.mlp.experts",
        )
    for param in runner.routed_experts.parameters():
        param.data.view(torch.uint8).fill_(0xA5)
    return runner.routed_experts


def modelopt() -> ModelOptNvFp4Config:
    return ModelOptNvFp4Config(is_checkpoint_nvfp4_serialized=True)


def below(tensors: Tensors) -> Tensors:
    return {name.removeprefix(f"{LAYER.path}."): tensor for name, tensor in tensors.items()}


def test_quark_leaves_the_activation_scales_out_of_the_kernels_alphas(vllm_config: None) -> None:
    layer = routed(QuarkConfig.from_config(QUARK))
    assert isinstance(layer.quant_method, QuarkNvfp4MoEMethod)
    made = {name.replace("input_scale", "input_scale_2"): it for name, it in below(LAYER.tensors()).items()}
    list(layer.load_weights(made.items()))
    # up's input scale, loaded last, stands for gate's too
    up = torch.stack([made[f"{expert}.up_proj.input_scale_2"] for expert in EXPERTS])
    assert torch.equal(layer.w13_input_scale_2.data, torch.stack([up, up], dim=1))
    layer.quant_method.process_weights_after_loading(layer)
    experts = layer.quant_method.moe_kernel.fused_experts
    gate = torch.stack([made[f"{expert}.gate_proj.weight_scale_2"] for expert in EXPERTS])
    assert type(experts).__name__ == "FlashInferCuteDSLExperts"
    assert torch.equal(experts.quant_config.g1_alphas.data, gate)  # ModelOpt: gate times the input scale
    with pytest.raises(AttributeError, match="w13_input_scale"):
        experts.process_weights_after_loading(layer)


@pytest.mark.parametrize("leaf", ["weight", "weight_scale"])
def test_gate_and_up_fused_in_an_expert_are_halves(vllm_config: None, leaf: str) -> None:
    layer, tensors = routed(modelopt()), below(LAYER.tensors())
    both = {
        f"{expert}.gate_up_proj.{leaf}": torch.cat(
            [tensors[f"{expert}.{name}.{leaf}"].view(torch.uint8) for name in ("gate_proj", "up_proj")]
        ).view(tensors[f"{expert}.gate_proj.{leaf}"].dtype)
        for expert in EXPERTS
    }
    list(layer.load_weights(both.items()))
    want = torch.stack([tensor.view(torch.uint8) for tensor in both.values()])
    assert torch.equal(getattr(layer, f"w13_{leaf}").data.view(torch.uint8), want)


def test_one_scale_for_gate_and_up_cannot_be_split(vllm_config: None) -> None:
    with pytest.raises(RuntimeError, match="at least a 1-dimensional tensor"):
        list(routed(modelopt()).load_weights([("0.gate_up_proj.weight_scale_2", torch.tensor(1.0))]))


@pytest.mark.parametrize("leaf", ["weight_scale_2", "input_scale"])
def test_two_scales_of_a_fused_tensor_are_gates_and_ups(vllm_config: None, leaf: str) -> None:
    layer = routed(modelopt())
    pairs = [torch.tensor([1.0 + expert, 20.0 + expert]) for expert in EXPERTS]
    list(layer.load_weights((f"{expert}.gate_up_proj.{leaf}", pair) for expert, pair in enumerate(pairs)))
    assert torch.equal(getattr(layer, f"w13_{leaf}").data, torch.stack(pairs))


def test_the_projection_before_the_number_is_not_read(vllm_config: None) -> None:
    codes = below(LAYER.tensors())["0.gate_proj.weight"]
    layer = routed(modelopt())
    assert list(layer.load_weights([("gate_proj.0.weight", codes)])) == []
    with pytest.raises(AttributeError, match="has no parameter"):
        list(layer.load_weights([("down_proj.0.weight", codes)]))


def test_global_scales_of_a_compressed_tensors_stack_are_not_read(vllm_config: None) -> None:
    layer = routed(CompressedTensorsConfig.from_config(COMPRESSED))
    stack = torch.ones(LAYER.experts, 1)
    with pytest.raises(RuntimeError, match="is invalid for input of size 3"):
        list(layer.load_weights([("gate_up_proj_global_scale", stack)]))
