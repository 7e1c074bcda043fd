"""The forward pass up to the kernel's launch: the arguments that would reach FlashInfer, and the layer's output.

The launch is replaced by the torch reference, which reads the very arguments: codes and scales of the tokens, weights,
6-D views of the scales, alphas. The quantization of the activations (a compiled op) is replaced by torch code too.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from nvfp4_prep_kernels import MoeLayout
from nvfp4_prep_kernels.moe_types import MoeActivation, MoeTokens
from nvfp4_prep_kernels.nvfp4 import encode_codes, quantize
from nvfp4_prep_kernels.torch_moe import TorchMoe
from support.serving.vllm_on_cpu import load_model, make_vllm_config, rank_of, routed_experts

TOKENS, TOP_K = 5, 2


def quantize_activations(x: torch.Tensor, scale: torch.Tensor, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """ops.scaled_fp4_quant with linear scales."""
    codes, scales = quantize(x.float(), float(scale.flatten()[0]))
    return encode_codes(codes), scales.to(torch.float8_e4m3fn)


def stored_scales(view: torch.Tensor) -> torch.Tensor:
    """The 3-D bytes [E, M, Ks] behind the kernel's 6-D view."""
    e, tiles, steps = view.shape[5], view.shape[2], view.shape[4]
    return view.permute(5, 2, 4, 0, 1, 3).reshape(e, tiles * 128, steps * 4).view(torch.uint8)


def reference(arguments: dict[str, Any]) -> torch.Tensor:
    """What the kernel would compute, from its arguments alone."""
    w1, w2 = arguments["w1_weight"], arguments["w2_weight"]
    gated = w1.shape[1] == 2 * w2.shape[2] * 2
    experts = SimpleNamespace(
        layout=MoeLayout.cutedsl(gated=gated),
        padded_hidden=w2.shape[1],
        padded_intermediate=w2.shape[2] * 2,
        w13_weight=w1,
        w13_weight_scale=stored_scales(arguments["w1_weight_sf"]),
        w2_weight=w2,
        w2_weight_scale=stored_scales(arguments["w2_weight_sf"]),
        w13_alpha=arguments["w1_alpha"],
        w13_alpha_up=arguments["w1_alpha"],
        w2_alpha=arguments["w2_alpha"],
        fc2_inverse_scale=arguments["fc2_input_scale"][0],
    )
    tokens = MoeTokens(
        codes=arguments["x"],
        block_scales=arguments["x_sf"].squeeze(-1).view(torch.uint8),
        expert_ids=arguments["token_selected_experts"],
        weights=arguments["token_final_scales"],
    )
    out = torch.empty(tokens.codes.shape[0], experts.padded_hidden)
    TorchMoe()(experts, tokens, MoeActivation() if gated else MoeActivation.relu2(), out)  # type: ignore[arg-type]
    return out


def run_layers(directory: Path, **options: Any) -> dict[str, Any]:
    """Every expert layer's forward: kernel arguments and output by layer."""
    import vllm.model_executor.layers.fused_moe.utils as fused_moe_utils
    from vllm.forward_context import set_forward_context
    from vllm.model_executor.layers.fused_moe.experts import flashinfer_cutedsl_moe

    calls: list[dict[str, Any]] = []

    def launch(**arguments: Any) -> None:
        arguments["moe_output"].copy_(reference(arguments))
        calls.append({name: v.clone() if isinstance(v, torch.Tensor) else v for name, v in arguments.items()})

    config = make_vllm_config(directory, **{"moe_backend": "auto", **options})
    found: dict[str, Any] = {}
    with (
        rank_of(config),
        mock.patch.object(flashinfer_cutedsl_moe, "flashinfer_cute_dsl_fused_moe_nvfp4", launch),
        mock.patch.object(fused_moe_utils.ops, "scaled_fp4_quant", quantize_activations),
    ):
        model = load_model(config)
        for number, (name, layer) in enumerate(routed_experts(model).items()):
            random = torch.Generator().manual_seed(number)
            x = torch.randn(TOKENS, layer.hidden_size, generator=random).to(torch.bfloat16)
            x = torch.nn.functional.pad(x, (0, layer.moe_config.hidden_dim - layer.hidden_size))  # as the runner does
            ids = torch.stack(
                [torch.randperm(layer.global_num_experts, generator=random)[:TOP_K] for _ in range(TOKENS)]
            )
            weights = torch.rand(TOKENS, TOP_K, generator=random)
            with set_forward_context(None, config), torch.inference_mode():
                found[f"{name}/output"] = layer.forward_modular(x, weights, ids.to(torch.int32)).clone()
            found |= {f"{name}/{key}": value for launched in calls[-1:] for key, value in launched.items()}
    return found
