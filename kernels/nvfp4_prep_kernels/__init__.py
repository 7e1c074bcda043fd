"""NVFP4 fused-MoE weight layouts, CuteDSL and TRTLLM-gen: torch reference, rank slices, kernels. Needs torch alone."""

from nvfp4_prep_kernels.layout import (
    BLOCK_COLS,
    SCALE_VECTORS,
    UP_SCALE_VECTOR,
    LayoutError,
    MoeDims,
    MoeLayout,
    PreparedTensor,
    Projection,
)
from nvfp4_prep_kernels.slices import ExpertSlice, rank_slice, take_rank

__all__ = [
    "BLOCK_COLS",
    "SCALE_VECTORS",
    "UP_SCALE_VECTOR",
    "ExpertSlice",
    "LayoutError",
    "MoeDims",
    "MoeLayout",
    "PreparedTensor",
    "Projection",
    "rank_slice",
    "take_rank",
]
