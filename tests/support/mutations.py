"""Every way in which a prepared layer can be wrong, as a change to one that is right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from nvfp4_prep_kernels import PreparedTensor
from nvfp4_prep_kernels.moe_types import PreparedExperts
from nvfp4_prep_kernels.row_order import BlockRows, RowOrder, join_rows, shuffle_rows, split_rows, unshuffle_rows
from nvfp4_prep_kernels.scale_swizzle import swizzle_scales, unswizzle_scales

__all__ = ["MUTATIONS", "PADDING_MUTATIONS", "TRTLLM_MUTATIONS"]

Mutation = Callable[[PreparedExperts], PreparedExperts]


def _w13(
    experts: PreparedExperts, change: Callable[[torch.Tensor, torch.Tensor, RowOrder], torch.Tensor]
) -> PreparedExperts:
    """Rebuilds w13 from (gate, up, row order), codes and scales alike."""
    rows = experts.layout.rows
    weight = change(*split_rows(rows, experts.w13_weight, fused=True), rows)
    scales = change(*split_rows(rows, unswizzle_scales(experts.w13_weight_scale), fused=True), rows)
    return replace(experts, w13_weight=weight, w13_weight_scale=swizzle_scales(scales))


def _w2(experts: PreparedExperts, change: Callable[[torch.Tensor], torch.Tensor]) -> PreparedExperts:
    """Changes the rows of w2, codes and scales alike."""
    scales = swizzle_scales(change(unswizzle_scales(experts.w2_weight_scale)))
    return replace(experts, w2_weight=change(experts.w2_weight), w2_weight_scale=scales)


def gate_and_up_swapped(experts: PreparedExperts) -> PreparedExperts:
    return _w13(experts, lambda gate, up, rows: join_rows(rows, (up, gate)))


def rows_not_interleaved(experts: PreparedExperts) -> PreparedExperts:
    return _w13(experts, lambda gate, up, rows: torch.cat((gate, up), dim=-2))


def wrong_block_height(experts: PreparedExperts) -> PreparedExperts:
    block = 32 if experts.layout.gate_up_block == 64 else 64
    return _w13(experts, lambda gate, up, rows: join_rows(BlockRows(block), (gate, up)))


def w13_rows_not_shuffled(experts: PreparedExperts) -> PreparedExperts:
    return _w13(experts, lambda gate, up, rows: unshuffle_rows(join_rows(rows, (gate, up))))


def w2_rows_not_shuffled(experts: PreparedExperts) -> PreparedExperts:
    return _w2(experts, unshuffle_rows)


def w2_rows_shuffled_twice(experts: PreparedExperts) -> PreparedExperts:
    return _w2(experts, shuffle_rows)


def w2_codes_not_shuffled(experts: PreparedExperts) -> PreparedExperts:
    """Codes of the CuteDSL layout with scales of this one."""
    return replace(experts, w2_weight=unshuffle_rows(experts.w2_weight))


def ups_scale_from_gate(experts: PreparedExperts) -> PreparedExperts:
    """What a server computes that takes gate's factor for both."""
    return replace(experts, w13_weight_scale_2_up=experts.w13_weight_scale_2)


def gate_and_up_scales_swapped(experts: PreparedExperts) -> PreparedExperts:
    up = experts.w13_weight_scale_2_up
    return (
        experts
        if up is None
        else replace(experts, w13_weight_scale_2=up, w13_weight_scale_2_up=experts.w13_weight_scale_2)
    )


def w13_scales_not_swizzled(experts: PreparedExperts) -> PreparedExperts:
    return replace(experts, w13_weight_scale=unswizzle_scales(experts.w13_weight_scale))


def w2_scales_not_swizzled(experts: PreparedExperts) -> PreparedExperts:
    return replace(experts, w2_weight_scale=unswizzle_scales(experts.w2_weight_scale))


def w13_scales_swizzled_twice(experts: PreparedExperts) -> PreparedExperts:
    return replace(experts, w13_weight_scale=swizzle_scales(experts.w13_weight_scale))


def w2_scales_swizzled_twice(experts: PreparedExperts) -> PreparedExperts:
    return replace(experts, w2_weight_scale=swizzle_scales(experts.w2_weight_scale))


def two_experts_exchanged(experts: PreparedExperts) -> PreparedExperts:
    order = list(range(len(experts.w13_weight)))
    order[1], order[2] = order[2], order[1]
    return replace(experts, **{tensor.value: getattr(experts, tensor.value)[order] for tensor in PreparedTensor})


def scales_from_the_neighbour(experts: PreparedExperts) -> PreparedExperts:
    scales = experts.w2_weight_scale.clone()
    scales[1] = scales[2]
    return replace(experts, w2_weight_scale=scales)


def scale_2_holds_the_input_scale(experts: PreparedExperts) -> PreparedExperts:
    return replace(experts, w13_weight_scale_2=experts.w13_weight_scale_2 * experts.w13_input_scale)


def w2_scale_2_holds_the_input_scale(experts: PreparedExperts) -> PreparedExperts:
    return replace(experts, w2_weight_scale_2=experts.w2_weight_scale_2 * experts.w2_input_scale)


def input_scale_of_one_expert(experts: PreparedExperts) -> PreparedExperts:
    return replace(experts, w13_input_scale=experts.w13_input_scale * 0.83)


def w2_input_scale_of_one_expert(experts: PreparedExperts) -> PreparedExperts:
    return replace(experts, w2_input_scale=experts.w2_input_scale * 0.83)


def _zero_block(codes: torch.Tensor) -> torch.Tensor:
    """Sixteen columns of one row of expert 1 become zero."""
    changed = codes.clone()
    rows, nbytes = codes.shape[1:]
    # a block that is not zero already, well inside
    place = (rows // 3, nbytes // 16 * 8)
    changed[1, place[0], place[1] : place[1] + 8] = 0
    return changed


def a_zeroed_block_in_w13(experts: PreparedExperts) -> PreparedExperts:
    return replace(experts, w13_weight=_zero_block(experts.w13_weight))


def a_zeroed_block_in_w2(experts: PreparedExperts) -> PreparedExperts:
    return replace(experts, w2_weight=_zero_block(experts.w2_weight))


def _swap_nibbles(codes: torch.Tensor) -> torch.Tensor:
    return codes >> 4 | codes << 4


def nibbles_shifted_in_w13(experts: PreparedExperts) -> PreparedExperts:
    return replace(experts, w13_weight=_swap_nibbles(experts.w13_weight))


def nibbles_shifted_in_w2(experts: PreparedExperts) -> PreparedExperts:
    return replace(experts, w2_weight=_swap_nibbles(experts.w2_weight))


def _dirty(experts: PreparedExperts, tensor: PreparedTensor) -> PreparedExperts:
    """One padding byte of expert 1 becomes 0x22: two codes of 1, or a scale."""
    layout, dims = experts.layout, experts.dims
    stored = getattr(experts, tensor.value)
    ones = torch.ones(layout.source_shape(tensor, dims), dtype=torch.uint8, device=stored.device)
    padding = (layout.apply(tensor, *[ones for _ in layout.projections(tensor)]) == 0).nonzero()
    row, col = padding[len(padding) // 2].tolist()
    changed = stored.clone()
    changed[1, row, col] = 0x22
    return replace(experts, **{tensor.value: changed})


def one_code_in_w13(experts: PreparedExperts) -> PreparedExperts:
    """A single e2m1 code of expert 1 changes its lowest bit: the smallest change there is."""
    changed = experts.w13_weight.clone()
    changed[1, 77, 9] ^= 0x10
    return replace(experts, w13_weight=changed)


def one_code_in_w2(experts: PreparedExperts) -> PreparedExperts:
    changed = experts.w2_weight.clone()
    changed[1, 77, 9] ^= 0x10
    return replace(experts, w2_weight=changed)


MUTATIONS: dict[str, Mutation] = {
    "gate and up swapped": gate_and_up_swapped,
    "rows not interleaved": rows_not_interleaved,
    "wrong block height": wrong_block_height,
    "w13 scales not swizzled": w13_scales_not_swizzled,
    "w2 scales not swizzled": w2_scales_not_swizzled,
    "w13 scales swizzled twice": w13_scales_swizzled_twice,
    "w2 scales swizzled twice": w2_scales_swizzled_twice,
    "two experts exchanged": two_experts_exchanged,
    "one expert's scales from its neighbour": scales_from_the_neighbour,
    "w13 scale_2 multiplied with the input scale": scale_2_holds_the_input_scale,
    "w2 scale_2 multiplied with the input scale": w2_scale_2_holds_the_input_scale,
    "w13 input scale of one expert, not the maximum": input_scale_of_one_expert,
    "w2 input scale of one expert, not the maximum": w2_input_scale_of_one_expert,
    "one zeroed block of 16 in w13": a_zeroed_block_in_w13,
    "one zeroed block of 16 in w2": a_zeroed_block_in_w2,
    "nibble order shifted in w13": nibbles_shifted_in_w13,
    "nibble order shifted in w2": nibbles_shifted_in_w2,
    "a single code in w13": one_code_in_w13,
    "a single code in w2": one_code_in_w2,
}
"""For a gated layer without padding."""

TRTLLM_MUTATIONS: dict[str, Mutation] = {
    **MUTATIONS,
    "w13 rows not shuffled": w13_rows_not_shuffled,
    "w2 rows not shuffled": w2_rows_not_shuffled,
    "w2 rows shuffled twice": w2_rows_shuffled_twice,
    "w2 codes not shuffled, scales shuffled": w2_codes_not_shuffled,
    "up's global scale taken from gate": ups_scale_from_gate,
    "gate's and up's global scales swapped": gate_and_up_scales_swapped,
}
"""For a gated TRTLLM-gen layer without padding, with two global scales."""

PADDING_MUTATIONS: dict[str, Mutation] = {
    f"padding of {tensor.value} not zero": lambda experts, tensor=tensor: _dirty(experts, tensor)  # type: ignore[misc]
    for tensor in PreparedTensor
}
"""For a layer with padding in every tensor."""
