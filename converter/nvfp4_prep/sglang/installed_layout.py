"""Layouts that the installed SGLang prepares: its own functions, run on a small fixed layer, against ours."""

from __future__ import annotations

import functools

import torch

from nvfp4_prep.errors import ServingError
from nvfp4_prep_kernels import MoeLayout, PreparedTensor, Projection
from nvfp4_prep_kernels.fingerprint import fingerprint_layer

__all__ = ["check_installed_layout"]


@functools.cache
def check_installed_layout(layout: MoeLayout) -> None:
    """Raise :class:`ServingError` unless the installed SGLang prepares this layout for its kernel.

    A kernel that reads other bytes than it gets gives garbage and no error.
    """
    layout = layout.for_moe_tp(1)
    parts = fingerprint_layer(layout)
    made = _prepare(layout, {tensor: _fused(layout, tensor, found) for tensor, found in parts.items()})
    if all(torch.equal(layout.apply(tensor, *parts[tensor]), made[tensor]) for tensor in PreparedTensor):
        return
    raise ServingError(
        "the installed SGLang prepares experts in a layout that this version of nvfp4-prep does not know",
        next_step="Install an SGLang that the plugin was tested with, or a newer nvfp4-prep; do not serve this.",
    )


def _fused(layout: MoeLayout, tensor: PreparedTensor, parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return the projections one below the other as SGLang loads them: up first, but gate first for the batched one."""
    named = dict(zip(layout.projections(tensor), parts, strict=True))
    up_first = [Projection.UP, Projection.GATE, Projection.DOWN]
    order = list(Projection) if layout.concatenated else up_first
    return torch.cat([named[name] for name in order if name in named], dim=1).contiguous()


def _prepare(layout: MoeLayout, fused: dict[PreparedTensor, torch.Tensor]) -> dict[PreparedTensor, torch.Tensor]:
    """Return the four big tensors as the installed SGLang prepares them, as bytes on the CPU."""
    from sglang.srt.layers.moe.moe_runner.flashinfer_cutedsl import interleave_w13_halves
    from sglang.srt.layers.quantization.modelopt_quant import swizzle_blockscale
    from sglang.srt.layers.quantization.utils import prepare_static_weights_for_trtllm_fp4_moe

    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    w13, w13_scale, w2, w2_scale = (fused[tensor].to(device) for tensor in PreparedTensor)
    w13_scale, w2_scale = w13_scale.view(torch.float8_e4m3fn), w2_scale.view(torch.float8_e4m3fn)
    if layout.shuffled:
        experts, hidden, half = w2.shape
        w13, w13_scale, w2, w2_scale = prepare_static_weights_for_trtllm_fp4_moe(
            w13, w2, w13_scale, w2_scale, hidden, half * 2, experts, is_gated=layout.gated
        )
    else:
        if layout.interleaved:
            w13 = interleave_w13_halves(w13, group_size=64, dim=1)
            w13_scale = interleave_w13_halves(w13_scale, group_size=64, dim=1)
        w13_scale, w2_scale = swizzle_blockscale(w13_scale.contiguous()), swizzle_blockscale(w2_scale)
    tensors = zip(PreparedTensor, (w13, w13_scale, w2, w2_scale), strict=True)
    return {tensor: made.contiguous().view(torch.uint8).cpu() for tensor, made in tensors}
