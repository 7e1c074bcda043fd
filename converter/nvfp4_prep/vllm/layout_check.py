"""Which layout the installed vLLM prepares: its own code, run on small fixed layers, against ours.

A kernel that reads other bytes than the file holds gives garbage and no error. So before the first prepared layer is
created, the installed vLLM prepares the fingerprint's layer and a smaller one that needs padding, and the results must
be what our layout package makes of them.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
from collections.abc import Iterator, Mapping
from types import SimpleNamespace

import torch
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import NvFp4MoeBackend, convert_to_nvfp4_moe_kernel_format
from vllm.model_executor.layers.quantization.utils.flashinfer_utils import align_fp4_moe_weights_for_fi

from nvfp4_prep.errors import ServingError
from nvfp4_prep.serving.stamped import Stamp
from nvfp4_prep_kernels import MoeDims, MoeLayout, PreparedTensor
from nvfp4_prep_kernels.fingerprint import fingerprint_layer
from nvfp4_prep_kernels.scale_swizzle import swizzle_scales

__all__ = ["check_installed_layout", "installed_gate_up_block", "installed_trtllm_is_ours"]

_BLOCKS = (64, 32, 16)
Parts = Mapping[PreparedTensor, tuple[torch.Tensor, ...]]
"""For each prepared tensor the projections' bytes, ``uint8 [E, rows, bytes per row]`` each."""


def check_installed_layout(stamp: Stamp, backend: NvFp4MoeBackend, *, gated: bool) -> MoeLayout:
    """Compare what the stamp says with our layouts, and our layouts with what the installed vLLM prepares.

    Args:
        stamp: of the checkpoint.
        backend: whose kernel will run.
        gated: whether the experts have a gate.

    Returns:
        The layout that the installed kernel reads, for the stamp's tensor-parallel size.

    Raises:
        ServingError: if the stamp's fingerprint is not that of its layout, or none of our layouts is what the installed
            vLLM prepares.
    """
    stamp.check_fingerprint(gated=gated)
    if backend == NvFp4MoeBackend.FLASHINFER_TRTLLM:
        layout = MoeLayout.trtllm(gated=gated, moe_tp=stamp.moe_tp) if installed_trtllm_is_ours(gated=gated) else None
    else:
        batched = backend == NvFp4MoeBackend.FLASHINFER_CUTEDSL_BATCHED
        block = installed_gate_up_block(gated=gated, batched=batched)
        layout = None
        if block and batched:
            layout = MoeLayout.cutedsl_batched(moe_tp=stamp.moe_tp)
        elif block:
            layout = MoeLayout.cutedsl(gated=gated, gate_up_block=block, moe_tp=stamp.moe_tp)
    if layout is None:
        raise ServingError(
            "the installed vLLM prepares experts in a layout that this version of nvfp4-prep does not know",
            next_step="Install a vLLM that the plugin was tested with, or a newer nvfp4-prep; do not serve this.",
        )
    return layout


@functools.cache
def installed_trtllm_is_ours(*, gated: bool) -> bool:
    """Return whether our TRTLLM-gen layout gives the bytes of the installed vLLM's preparation for that kernel.

    It runs on the CPU, where FlashInfer's ``nvfp4_block_scale_interleave`` (a CUDA kernel) does not: our swizzle stands
    in for that one function, so that a changed swizzle of that kernel would not be noticed here.
    """
    layout = MoeLayout.trtllm(gated=gated)
    layers: list[Parts] = [fingerprint_layer(layout), _padded_layer(layout)]
    backend = NvFp4MoeBackend.FLASHINFER_TRTLLM
    with torch.device("cpu"), _quiet(), _interleave_on_cpu():
        return all(_equal(layout, parts, _prepare(parts, gated=gated, backend=backend)) for parts in layers)


@contextlib.contextmanager
def _interleave_on_cpu() -> Iterator[None]:
    import flashinfer

    def interleave(scales: torch.Tensor) -> torch.Tensor:
        return swizzle_scales(scales).reshape(-1)

    name = "nvfp4_block_scale_interleave"
    before = getattr(flashinfer, name)
    setattr(flashinfer, name, interleave)
    try:
        yield
    finally:
        setattr(flashinfer, name, before)


@functools.cache
def installed_gate_up_block(*, gated: bool, batched: bool) -> int:
    """The block height with which our layout gives the bytes of the installed vLLM's preparation; 0 if none does."""
    layouts = (
        [MoeLayout.cutedsl_batched()]
        if batched
        else [MoeLayout.cutedsl(gated=gated, gate_up_block=block) for block in (_BLOCKS if gated else _BLOCKS[:1])]
    )
    backend = NvFp4MoeBackend.FLASHINFER_CUTEDSL_BATCHED if batched else NvFp4MoeBackend.FLASHINFER_CUTEDSL
    layers: list[Parts] = [fingerprint_layer(layouts[0])]
    if not batched:
        layers.append(_padded_layer(layouts[0]))
    with torch.device("cpu"), _quiet():  # layers are created with the GPU as default device
        made = [_prepare(parts, gated=gated, backend=backend) for parts in layers]
    for layout in layouts:
        if all(_equal(layout, parts, done) for parts, done in zip(layers, made, strict=True)):
            return layout.gate_up_block
    return 0


def _equal(layout: MoeLayout, parts: Parts, made: Mapping[PreparedTensor, torch.Tensor]) -> bool:
    return all(torch.equal(layout.apply(tensor, *parts[tensor]), made[tensor]) for tensor in PreparedTensor)


def _padded_layer(layout: MoeLayout) -> Parts:
    """Hash bytes without the NaNs of e4m3, in sizes that need padding: what the fingerprint's layer does not cover."""
    dims = MoeDims(experts=2, intermediate=224, hidden=272)

    def make(name: str, shape: tuple[int, int]) -> torch.Tensor:
        raw = hashlib.shake_256(name.encode()).digest(dims.experts * shape[0] * shape[1])
        flat = torch.frombuffer(bytearray(raw), dtype=torch.uint8).reshape(dims.experts, *shape)
        return torch.where((flat & 0x7F) == 0x7F, torch.full_like(flat, 0x38), flat)

    return {
        tensor: tuple(
            make(f"{tensor.value}.{projection.value}", layout.source_shape(tensor, dims))
            for projection in layout.projections(tensor)
        )
        for tensor in PreparedTensor
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without vLLM's messages about padding, which would speak of the fixed layers."""
    noisy = logging.getLogger(align_fp4_moe_weights_for_fi.__module__)
    before, noisy.disabled = noisy.disabled, True
    try:
        yield
    finally:
        noisy.disabled = before


def _prepare(parts: Parts, *, gated: bool, backend: NvFp4MoeBackend) -> dict[PreparedTensor, torch.Tensor]:
    """The four big tensors as the installed vLLM prepares them, as bytes on the CPU."""
    fused = {tensor: torch.cat(list(found), dim=1).contiguous() for tensor, found in parts.items()}
    experts, _, half_hidden = fused[PreparedTensor.W13_WEIGHT].shape
    moe_config = SimpleNamespace(
        moe_parallel_config=SimpleNamespace(enable_eplb=False),
        intermediate_size_per_partition=fused[PreparedTensor.W2_WEIGHT].shape[2] * 2,
        hidden_dim=half_hidden * 2,
        hidden_dim_unpadded=None,
    )
    activation = MoEActivation.SILU if gated else MoEActivation.RELU2_NO_MUL
    ones = torch.ones(experts)
    w13, w13_scale, _, _, w2, w2_scale, _, _ = convert_to_nvfp4_moe_kernel_format(
        nvfp4_backend=backend,
        layer=SimpleNamespace(activation=activation, moe_config=moe_config),
        w13=fused[PreparedTensor.W13_WEIGHT],
        w13_scale=fused[PreparedTensor.W13_WEIGHT_SCALE].view(torch.float8_e4m3fn),
        w13_scale_2=ones,
        a13_scale=ones,
        w2=fused[PreparedTensor.W2_WEIGHT],
        w2_scale=fused[PreparedTensor.W2_WEIGHT_SCALE].view(torch.float8_e4m3fn),
        w2_scale_2=ones,
        a2_scale=ones,
        is_act_and_mul=gated,
    )
    tensors = zip(PreparedTensor, (w13, w13_scale, w2, w2_scale), strict=True)
    return {tensor: made.view(torch.uint8).cpu() for tensor, made in tensors}
