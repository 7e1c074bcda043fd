"""Check of the layout that the installed vLLM prepares: its own code, run on small fixed layers, against ours.

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
from dataclasses import dataclass
from types import SimpleNamespace
from unittest import mock

import torch
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import NvFp4MoeBackend, convert_to_nvfp4_moe_kernel_format
from vllm.model_executor.layers.quantization.utils.flashinfer_utils import align_fp4_moe_weights_for_fi

from nvfp4_prep.errors import ServingError
from nvfp4_prep.layouts import GATE_UP_BLOCKS, LAYOUTS, LayoutName, layout_of_backend
from nvfp4_prep.prepared.stamp import Stamp
from nvfp4_prep_kernels import MoeDims, MoeLayout, PreparedTensor
from nvfp4_prep_kernels.fingerprint import fingerprint_layer
from nvfp4_prep_kernels.scale_swizzle import swizzle_scales

__all__ = ["InstalledLayout", "check_installed_layout", "installed_layout"]

Parts = Mapping[PreparedTensor, tuple[torch.Tensor, ...]]
"""For each prepared tensor the projections' bytes, ``uint8 [E, rows, bytes per row]`` each."""


@dataclass(frozen=True)
class InstalledLayout:
    """The layout in which the installed vLLM prepares experts for one kernel.

    Attributes:
        layout: ours that gives the same bytes, for one rank; ``None`` if none does.
        pads: whether layers whose sizes the kernel cannot take are padded (for CuteDSL from vLLM 0.32 on). ``None`` if
            they are, but in another way than ours.
    """

    layout: MoeLayout | None
    pads: bool | None


def check_installed_layout(stamp: Stamp, backend: NvFp4MoeBackend, *, gated: bool, padded: bool) -> MoeLayout:
    """Compare what the stamp says with our layouts, and our layouts with what the installed vLLM prepares.

    Args:
        stamp: of the checkpoint.
        backend: whose kernel will run.
        gated: whether the experts have a gate.
        padded: whether the layer's sizes need padding.

    Returns:
        The layout that the installed kernel reads, for the stamp's tensor-parallel size.

    Raises:
        ServingError: if the stamp's fingerprint is not that of its layout, none of our layouts is what the installed
            vLLM prepares, or it does not pad and the layer needs it.
    """
    stamp.check_fingerprint(gated=gated)
    installed = installed_layout(backend, gated=gated)
    if installed.layout is None or installed.pads is None:
        raise ServingError(
            "the installed vLLM prepares experts in a layout that this version of nvfp4-prep does not know",
            next_step="Install a vLLM that the plugin was tested with, or a newer nvfp4-prep; do not serve this.",
        )
    if padded and not installed.pads:
        raise ServingError(
            "the experts' sizes need padding, which the installed vLLM does not know for this kernel",
            next_step="Install vLLM 0.32 or newer, or serve the source checkpoint with another --moe-backend.",
        )
    return installed.layout.for_moe_tp(stamp.moe_tp)


@functools.cache
def installed_layout(backend: NvFp4MoeBackend, *, gated: bool) -> InstalledLayout:
    """Return which of our layouts gives the bytes of the installed vLLM's preparation for a kernel.

    It runs on the CPU, where FlashInfer's ``nvfp4_block_scale_interleave`` (a CUDA kernel, for TRTLLM-gen) does not:
    our swizzle stands in for that one function, so that a changed swizzle of that kernel would not be noticed here.
    """
    layouts = _candidates(backend, gated=gated)
    parts = fingerprint_layer(layouts[0])
    with torch.device("cpu"), _quiet(), _interleave_on_cpu() if layouts[0].shuffled else contextlib.nullcontext():
        made = _prepare(parts, gated=gated, backend=backend)
        layout = next((layout for layout in layouts if _equal(layout, parts, made)), None)
        if layout is None:
            return InstalledLayout(None, pads=None)
        return InstalledLayout(layout, pads=True if layout.concatenated else _pads(layout, backend))


def _candidates(backend: NvFp4MoeBackend, *, gated: bool) -> list[MoeLayout]:
    name = layout_of_backend(backend.value) or LayoutName.CUTEDSL
    blocks = GATE_UP_BLOCKS if gated and LAYOUTS[name].has_blocks else GATE_UP_BLOCKS[:1]
    return [MoeLayout.named(name, gated=gated, gate_up_block=block) for block in blocks]


def _pads(layout: MoeLayout, backend: NvFp4MoeBackend) -> bool | None:
    parts = _padded_layer(layout)
    try:
        made = _prepare(parts, gated=layout.gated, backend=backend)
    except (RuntimeError, ValueError, AssertionError):
        return False  # sizes that cannot be interleaved
    if _equal(layout, parts, made):
        return True
    rows = {tensor: sum(part.shape[1] for part in parts[tensor]) for tensor in PreparedTensor}
    codes = [tensor for tensor in PreparedTensor if not tensor.is_scale]
    return False if all(made[tensor].shape[1] == rows[tensor] for tensor in codes) else None


@contextlib.contextmanager
def _interleave_on_cpu() -> Iterator[None]:
    import flashinfer

    def interleave(scales: torch.Tensor) -> torch.Tensor:
        return swizzle_scales(scales).reshape(-1)

    with mock.patch.object(flashinfer, "nvfp4_block_scale_interleave", interleave):
        yield


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
    """Without vLLM's messages about padding, which would speak of the fixed layers, and on a machine without a GPU.

    vLLM's swizzle ends in ``.cuda()``, whatever the device of its input.
    """
    noisy = logging.getLogger(align_fp4_moe_weights_for_fi.__module__)
    before, noisy.disabled = noisy.disabled, True
    try:
        with contextlib.ExitStack() as stack:
            if not torch.cuda.is_available():
                stack.enter_context(mock.patch.object(torch.Tensor, "cuda", lambda tensor, *_, **__: tensor))
            yield
    finally:
        noisy.disabled = before


def _prepare(parts: Parts, *, gated: bool, backend: NvFp4MoeBackend) -> dict[PreparedTensor, torch.Tensor]:
    """Return the four big tensors as the installed vLLM prepares them, as bytes on the CPU."""
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
