"""Triton kernels for preparing a layer and for the way back: row order, padding and scale swizzle in one pass.

Each prepared byte is written once and each source byte read once. Both directions evaluate the same index map,
from the place of a byte in the prepared tensor to its place in the source;
:class:`~nvfp4_prep_kernels.layout.MoeLayout` is normative and the bytes must be the same for every shape. For
prepared row ``n`` and column ``c`` (bytes for codes, scale columns for scales):

    n -> n            shuffled first: n = 32*(n // 32) + 4*(n % 8) + n % 32 // 8
    n -> (part, p)    interleaved: b = n // 2B, j = n % 2B: part = gate if j >= B else up, p = b*B + j % B
                      [gate; up]:  part = n // Ip, p = n % Ip;  one projection: p = n
    p -> row          rank = p // row_pad, i = p % row_pad: row = rank*row_src + i if i < row_src, else zero
    c -> col          the same with col_pad and col_src

and scales go through the 128x4 swizzle, a permutation of 32-bit words.

Memory beside source and output: one int64 address for each expert and projection, none where experts are stacked.
Triton is imported when a kernel is first used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from nvfp4_prep_kernels.launching import on_device
from nvfp4_prep_kernels.layout import LayoutError, MoeDims, MoeLayout, PreparedTensor
from nvfp4_prep_kernels.matrix_addresses import MatrixAddresses, Parts, divisor_pow2, find_addresses
from nvfp4_prep_kernels.scale_swizzle import ROW_TILE, WORD_COLS

__all__ = [
    "CODE_TILE_COLS",
    "CODE_TILE_UNITS",
    "CODE_WARPS",
    "SCALE_TILE_WORDS",
    "SCALE_WARPS",
    "IndexMap",
    "Launch",
    "index_map",
    "plan_launch",
    "prepare",
    "unprepare",
]

# Tile sizes. Measured on one H200 at Kimi dimensions; benchmarks/bench_prepare_kernels.py tries others.
CODE_TILE_UNITS = 1024  # 8-byte units of one program, 32 bytes a thread: 4.16 TB/s, larger tiles 4.09 to 4.13
CODE_TILE_COLS = 32  # 256-byte runs: 4.11 TB/s for w2, 64 columns 4.06
CODE_WARPS = 8
SCALE_TILE_WORDS = 16  # 64 bytes of a scale row, one DRAM burst
SCALE_WARPS = 8  # 3.65 TB/s for w13, 3.45 for w2; 4 warps 3.42 and 3.25


@dataclass(frozen=True)
class IndexMap:
    """The index map of one prepared tensor, in rows and bytes; see the module's docstring for the formula.

    Attributes:
        rows, cols: of one prepared expert.
        block: B, rows of gate or up that lie together; 0 where the halves stand one after the other.
        shuffled: whether blocks of 32 rows are shuffled.
        halves: projections in the tensor.
        row_pad, row_src: rows of one rank's share of a projection, with padding and without.
        col_pad, col_src: the same for columns.
    """

    rows: int
    cols: int
    block: int
    shuffled: bool
    halves: int
    row_pad: int
    row_src: int
    col_pad: int
    col_src: int

    @property
    def has_padding(self) -> bool:
        """Whether some prepared bytes have no source."""
        return self.row_pad != self.row_src or self.col_pad != self.col_src


def index_map(layout: MoeLayout, tensor: PreparedTensor, dims: MoeDims) -> IndexMap:
    """Return the index map of a layer of these sizes; raises :class:`LayoutError` if the layout cannot hold them."""
    layout.check(dims)
    rows, cols = layout.expert_shape(tensor, dims)
    per_byte = tensor.cols_per_byte
    inter_pad = layout.padded_intermediate(dims.intermediate) // layout.moe_tp
    inter_src = dims.intermediate // layout.moe_tp
    halves = layout.halves if tensor.is_w13 else 1
    block = layout.interleaved_rows if tensor.is_w13 else 0
    order = (rows, cols, block, layout.shuffled, halves)
    if tensor.is_w13:
        return IndexMap(*order, inter_pad, inter_src, cols, dims.hidden // per_byte)
    return IndexMap(*order, rows, dims.hidden, inter_pad // per_byte, inter_src // per_byte)


def prepare(
    layout: MoeLayout, tensor: PreparedTensor, dims: MoeDims, *parts: Parts, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Make prepared bytes of a whole layer's source bytes, on the device on which they are.

    Args:
        layout, tensor, dims: what to make; ``dims.experts`` is E.
        parts: for each of ``layout.projections(tensor)`` a stacked tensor or E matrices. Any alignment; rows may be
            strided (a half of a fused tensor, every second row), anything else not contiguous is copied first.
        out: ``uint8 [E, rows, bytes per row]`` on the parts' device, contiguous from a multiple of 8 bytes on;
            allocated if not given. Must not overlap the source.

    Returns:
        ``uint8 [E, rows, bytes per row]`` as ``layout.expert_shape`` gives them.

    Raises:
        LayoutError: if the sizes do not fit the layout, or parts or ``out`` do not fit the sizes or one device.
    """
    mapping = index_map(layout, tensor, dims)
    _check_parts(layout, tensor, dims, parts)
    source = find_addresses(parts)
    shape = (dims.experts, mapping.rows, mapping.cols)
    if out is None:
        out = torch.empty(shape, dtype=torch.uint8, device=source.device)
    _check_prepared("out", out, shape, source.device)
    _launch(mapping, tensor.is_scale, source, out, None)
    return out


def unprepare(
    layout: MoeLayout, tensor: PreparedTensor, prepared: torch.Tensor, dims: MoeDims
) -> tuple[torch.Tensor, ...]:
    """Return the inverse of :func:`prepare`.

    Args:
        prepared: ``uint8 [E, rows, bytes per row]``, contiguous from a multiple of 8 bytes on.

    Returns:
        For each of ``layout.projections(tensor)`` ``uint8 [E, rows, bytes per row]`` in ``layout.source_shape``.

    Raises:
        LayoutError: if shape, dtype, strides or address do not fit.
        ValueError: if a padding byte is not zero.
    """
    mapping = index_map(layout, tensor, dims)
    _check_prepared("prepared", prepared, (dims.experts, mapping.rows, mapping.cols), prepared.device)
    shape = (dims.experts, *layout.source_shape(tensor, dims))
    parts = tuple(torch.empty(shape, dtype=torch.uint8, device=prepared.device) for _ in layout.projections(tensor))
    dirty = torch.zeros(1, dtype=torch.int32, device=prepared.device)
    _launch(mapping, tensor.is_scale, find_addresses(parts), prepared, dirty)
    if mapping.has_padding and int(dirty.item()):
        raise ValueError(f"{tensor.value}: padding outside {list(shape[1:])} is not zero")
    return parts


def _check_parts(layout: MoeLayout, tensor: PreparedTensor, dims: MoeDims, parts: Sequence[Parts]) -> None:
    names = layout.projections(tensor)
    if len(parts) != len(names):
        raise LayoutError(f"{tensor.value} takes {len(names)} projections ({', '.join(names)}), got {len(parts)}")
    shape = layout.source_shape(tensor, dims)
    devices = set()
    for name, part in zip(names, parts, strict=True):
        if len(part) != dims.experts:
            raise LayoutError(f"{tensor.value}: {len(part)} experts of the {name.value} projection, not {dims.experts}")
        for matrix in part[:1] if isinstance(part, torch.Tensor) else part:
            if tuple(matrix.shape) != shape or matrix.dtype != torch.uint8:
                raise LayoutError(
                    f"{tensor.value}: {name.value} projection is {matrix.dtype} {list(matrix.shape)}, not torch.uint8"
                    f" {list(shape)}"
                )
            devices.add(str(matrix.device))
    if len(devices) > 1:
        raise LayoutError(f"{tensor.value}: parts are on {' and '.join(sorted(devices))}, must be on one device")


def _check_prepared(name: str, prepared: torch.Tensor, shape: tuple[int, int, int], device: torch.device) -> None:
    if tuple(prepared.shape) != shape or prepared.dtype != torch.uint8 or not prepared.is_contiguous():
        raise LayoutError(
            f"{name} is {prepared.dtype} {list(prepared.shape)} with strides {list(prepared.stride())}: must be"
            f" contiguous torch.uint8 {list(shape)}"
        )
    if prepared.device != device:
        raise LayoutError(f"{name} is on {prepared.device}, the parts are on {device}: must be on one device")
    # the kernels move words of 4 and 8 bytes there
    if prepared.storage_offset() % 8 or prepared.data_ptr() % 8:
        raise LayoutError(
            f"{name} begins at byte {prepared.storage_offset()} of its memory: must begin at a multiple of 8 bytes"
        )


class Launch(NamedTuple):
    """Launch of one kernel: its compile-time constants, programs for each expert, and warps of a program."""

    constants: dict[str, int | bool]
    programs: int
    warps: int


def plan_launch(mapping: IndexMap, is_scale: bool, row_stride: int, alignment: int, inverse: bool) -> Launch:
    """Plan the launch of the kernel of codes or scales.

    Args:
        row_stride, alignment: of the source, see :class:`~nvfp4_prep_kernels.matrix_addresses.MatrixAddresses`.
    """
    constants: dict[str, int | bool] = {
        "BLOCK": mapping.block,
        "SHUFFLED": mapping.shuffled,
        "HALVES": mapping.halves,
        "HALF_ROWS": mapping.rows // mapping.halves,
        "ROW_PAD": mapping.row_pad,
        "ROW_SRC": mapping.row_src,
        "INVERSE": inverse,
    }
    if is_scale:
        row_words = mapping.cols // WORD_COLS
        block_k = min(SCALE_TILE_WORDS, _pow2_up(row_words))
        constants |= {
            "ROW_WORDS": row_words,
            "ROW_STRIDE": row_stride,
            "COL_PAD": mapping.col_pad,
            "COL_SRC": mapping.col_src,
            # whole words can be moved if no word straddles the end of a row or of a rank's share
            "WORDS": alignment >= WORD_COLS and mapping.col_src % WORD_COLS == 0,
            "ALIGN": alignment,
            "BLOCK_K": block_k,
        }
        return Launch(constants, mapping.rows // ROW_TILE * -(-row_words // block_k), SCALE_WARPS)
    unit = _code_unit(mapping, alignment)
    cols = mapping.cols // unit
    block_c = divisor_pow2(CODE_TILE_COLS, cols) if cols % 16 == 0 else CODE_TILE_COLS
    block_r = CODE_TILE_UNITS // block_c
    constants |= {
        "ROWS": mapping.rows,
        "COLS": cols,
        "ROW_STRIDE": row_stride // unit,
        "COL_PAD": mapping.col_pad // unit,
        "COL_SRC": mapping.col_src // unit,
        "UNIT": unit,
        "ALIGN": max(1, alignment // unit),
        "BLOCK_R": block_r,
        "BLOCK_C": block_c,
    }
    return Launch(constants, -(-mapping.rows // block_r) * -(-cols // block_c), CODE_WARPS)


def _code_unit(mapping: IndexMap, alignment: int) -> int:
    """Return bytes that move together: 8 where everything is a multiple of 8, as the 16-column scale blocks make it."""
    return 8 if alignment >= 8 and mapping.col_src % 8 == 0 and mapping.col_pad % 8 == 0 else 1


def _launch(
    mapping: IndexMap, is_scale: bool, source: MatrixAddresses, prepared: torch.Tensor, dirty: torch.Tensor | None
) -> None:
    """Run one direction; with ``dirty`` the source is written, and the flag set where padding is not zero."""
    from nvfp4_prep_kernels import triton_prepare_kernels as kernels

    inverse = dirty is not None
    launch = plan_launch(mapping, is_scale, source.row_stride, source.alignment, inverse)
    if is_scale:
        kernel, units = kernels.scales, prepared.view(torch.int32)
    else:
        wide = _code_unit(mapping, source.alignment) == 8
        kernel, units = kernels.codes, prepared.view(torch.int64) if wide else prepared
    bases = source.bases or ((0, 0),)
    with on_device(prepared.device):
        kernel[(launch.programs * prepared.shape[0],)](
            # what a direction or a kind of source does not use is never touched: any tensor stands in for it
            prepared if source.table is None else source.table,
            units,
            prepared if dirty is None else dirty,
            *bases[0],
            *bases[-1],
            STACKED=source.bases is not None,
            num_warps=launch.warps,
            **launch.constants,
        )


def _pow2_up(value: int) -> int:
    return 1 << max(0, value - 1).bit_length()
