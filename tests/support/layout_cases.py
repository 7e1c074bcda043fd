"""Any layout of the family with layers that it accepts, and random source matrices for them."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from nvfp4_prep_kernels import MoeDims, MoeLayout, PreparedTensor


@st.composite
def layers(draw: st.DrawFn) -> tuple[MoeLayout, MoeDims]:
    """Any layout of the family with any layer it accepts, small enough for a byte-by-byte oracle."""
    kind = draw(st.sampled_from(["standard", "relu2", "batched", "trtllm", "trtllm relu2"]))
    moe_tp = draw(st.integers(1, 3))
    if kind == "batched":
        dims = MoeDims(
            draw(st.integers(1, 3)),
            moe_tp * (64 if moe_tp == 1 else 128) * draw(st.integers(1, 2)),
            128 * draw(st.integers(1, 2)),
        )
        return MoeLayout.cutedsl_batched(moe_tp=moe_tp), dims
    gated = kind in ("standard", "trtllm")
    if kind.startswith("trtllm"):
        layout = MoeLayout.trtllm(gated=gated, moe_tp=moe_tp)
    else:
        block = draw(st.sampled_from([16, 32, 64])) if gated else 64
        layout = MoeLayout.cutedsl(gated=gated, gate_up_block=block, moe_tp=moe_tp)
    inter = moe_tp * 16 * draw(st.integers(1, 12 // moe_tp))
    return layout, MoeDims(draw(st.integers(1, 3)), inter, 16 * draw(st.integers(1, 20)))


def random_parts(layout: MoeLayout, tensor: PreparedTensor, dims: MoeDims, seed: int = 0) -> list[torch.Tensor]:
    """Non-zero random bytes, so that padding can never be taken for data."""
    generator = torch.Generator().manual_seed(seed)
    shape = layout.source_shape(tensor, dims)
    return [torch.randint(1, 256, shape, dtype=torch.uint8, generator=generator) for _ in layout.projections(tensor)]
