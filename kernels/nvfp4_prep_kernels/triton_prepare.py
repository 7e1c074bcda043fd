"""Triton kernels for preparing a layer and for the way back: row order, padding and scale swizzle in one pass.

Each prepared byte is written once and each source byte read once. Both directions evaluate the same index map,
from the place of a byte in the prepared tensor to its place in the source;
:class:`~nvfp4_prep_kernels.layout.MoeLayout` is normative and the bytes must be the same for every shape. For
prepared row ``n`` and column ``c`` (bytes for codes, scale columns for scales):

    n -> (part, p)    interleaved: b = n // 2B, j = n % 2B: part = gate if j >= B else up, p = b*B + j % B
                      [gate; up]:  part = n // Ip, p = n % Ip;  one projection: p = n
    p -> row          rank = p // row_pad, i = p % row_pad: row = rank*row_src + i if i < row_src, else zero
    c -> col          the same with col_pad and col_src

and scales go through the 128x4 swizzle, a permutation of 32-bit words.

Memory beside source and output: one int64 address for each expert and projection, none where experts are stacked.
Triton is imported when a kernel is first used.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nvfp4_prep_kernels.launching import on_device
from nvfp4_prep_kernels.layout import LayoutError, MoeDims, MoeLayout, PreparedTensor
from nvfp4_prep_kernels.scale_swizzle import ROW_TILE, WORD_COLS

__all__ = ["IndexMap", "index_map", "launch_constants", "prepare", "unprepare"]

# Tile sizes. Measured on one H200 at Kimi dimensions, see benchmarks/bench_prepare_kernels.py.
CODE_TILE_UNITS = 1024  # 8-byte units of one program, 32 bytes a thread: 4.16 TB/s, larger tiles 4.09 to 4.13
CODE_TILE_COLS = 32  # 256-byte runs: 4.11 TB/s for w2, 64 columns 4.06
CODE_WARPS = 8
SCALE_TILE_WORDS = 16  # 64 bytes of a scale row, one DRAM burst
SCALE_WARPS = 8  # 3.65 TB/s for w13, 3.45 for w2; 4 warps 3.42 and 3.25

Parts = torch.Tensor | Sequence[torch.Tensor]
"""One projection of all experts: stacked ``uint8 [E, rows, bytes per row]`` or E matrices of that."""


@dataclass(frozen=True)
class IndexMap:
    """The index map of one prepared tensor, in rows and bytes; see the module's docstring for the formula.

    Attributes:
        rows, cols: of one prepared expert.
        block: B, rows of gate or up that lie together; 0 where the halves stand one after the other.
        halves: projections in the tensor.
        row_pad, row_src: rows of one rank's share of a projection, with padding and without.
        col_pad, col_src: the same for columns.
    """

    rows: int
    cols: int
    block: int
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
    """The index map of a layer of these sizes; raises :class:`LayoutError` if the layout cannot hold them."""
    layout.check(dims)
    rows, cols = layout.expert_shape(tensor, dims)
    per_byte = tensor.cols_per_byte
    inter_pad = layout.padded_intermediate(dims.intermediate) // layout.moe_tp
    inter_src = dims.intermediate // layout.moe_tp
    halves = layout.halves if tensor.is_w13 else 1
    block = layout.interleaved_rows if tensor.is_w13 else 0
    if tensor.is_w13:
        return IndexMap(rows, cols, block, halves, inter_pad, inter_src, cols, dims.hidden // per_byte)
    return IndexMap(rows, cols, block, halves, rows, dims.hidden, inter_pad // per_byte, inter_src // per_byte)


def prepare(
    layout: MoeLayout, tensor: PreparedTensor, dims: MoeDims, *parts: Parts, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Source bytes of a whole layer to prepared bytes, on the device on which they are.

    Args:
        layout, tensor, dims: what to make; ``dims.experts`` is E.
        parts: for each of ``layout.projections(tensor)`` a stacked tensor or E matrices. Any alignment; rows may be
            strided (a half of a fused tensor, every second row), anything else not contiguous is copied first.
        out: ``uint8 [E, rows, bytes per row]``, contiguous; allocated if not given. Must not overlap the source.

    Returns:
        ``uint8 [E, rows, bytes per row]`` as ``layout.expert_shape`` gives them.

    Raises:
        LayoutError: if the sizes do not fit the layout or the parts do not fit the sizes.
    """
    mapping = index_map(layout, tensor, dims)
    _check_parts(layout, tensor, dims, parts)
    source = _gather(parts)
    shape = (dims.experts, mapping.rows, mapping.cols)
    if out is None:
        out = torch.empty(shape, dtype=torch.uint8, device=source.device)
    _check_matrix("out", out, shape)
    _launch(mapping, tensor.is_scale, source, out, None)
    return out


def unprepare(
    layout: MoeLayout, tensor: PreparedTensor, prepared: torch.Tensor, dims: MoeDims
) -> tuple[torch.Tensor, ...]:
    """Inverse of :func:`prepare`.

    Args:
        prepared: ``uint8 [E, rows, bytes per row]``, contiguous.

    Returns:
        For each of ``layout.projections(tensor)`` ``uint8 [E, rows, bytes per row]`` in ``layout.source_shape``.

    Raises:
        LayoutError: if the shape does not fit.
        ValueError: if a padding byte is not zero.
    """
    mapping = index_map(layout, tensor, dims)
    _check_matrix("prepared", prepared, (dims.experts, mapping.rows, mapping.cols))
    shape = (dims.experts, *layout.source_shape(tensor, dims))
    parts = tuple(torch.empty(shape, dtype=torch.uint8, device=prepared.device) for _ in layout.projections(tensor))
    dirty = torch.zeros(1, dtype=torch.int32, device=prepared.device)
    _launch(mapping, tensor.is_scale, _gather(parts), prepared, dirty)
    if mapping.has_padding and int(dirty.item()):
        raise ValueError(f"{tensor.value}: padding outside {list(shape[1:])} is not zero")
    return parts


@dataclass(frozen=True)
class _Source:
    """Addresses of the source matrices, in the order of ``layout.projections``.

    Attributes:
        bases: address of expert 0 and bytes to the next expert for each projection, where they are stacked.
        table: int64 ``[E, projections]`` on the device, where they are not.
        row_stride, alignment: see :func:`launch_constants`.
        keep: the tensors behind the addresses: they must live until the kernel is queued.
    """

    bases: tuple[tuple[int, int], ...] | None
    table: torch.Tensor | None
    row_stride: int
    alignment: int
    device: torch.device
    keep: tuple[Parts, ...]


def _check_parts(layout: MoeLayout, tensor: PreparedTensor, dims: MoeDims, parts: Sequence[Parts]) -> None:
    names = layout.projections(tensor)
    if len(parts) != len(names):
        raise LayoutError(f"{tensor.value} takes {len(names)} projections ({', '.join(names)}), got {len(parts)}")
    shape = layout.source_shape(tensor, dims)
    for name, part in zip(names, parts, strict=True):
        if len(part) != dims.experts:
            raise LayoutError(f"{tensor.value}: {len(part)} experts of the {name.value} projection, not {dims.experts}")
        for matrix in part[:1] if isinstance(part, torch.Tensor) else part:
            if tuple(matrix.shape) != shape or matrix.dtype != torch.uint8:
                raise LayoutError(
                    f"{tensor.value}: {name.value} projection is {matrix.dtype} {list(matrix.shape)}, not torch.uint8"
                    f" {list(shape)}"
                )


def _gather(parts: Sequence[Parts]) -> _Source:
    """Addresses of checked parts, which are copied first unless one row stride holds for all of them."""
    row_strides = {_row_stride(part) for part in parts}
    row_stride = row_strides.pop() if len(row_strides) == 1 else None
    if row_stride is None:
        parts = [_contiguous(part) for part in parts]
        row_stride = parts[0][0].shape[1]
    device = parts[0][0].device
    alignment = _gcd_pow2(16, row_stride)
    stacks = [part for part in parts if isinstance(part, torch.Tensor)]
    if len(stacks) == len(parts):
        bases = tuple((part.data_ptr(), part.stride(0)) for part in stacks)
        alignment = functools.reduce(_gcd_pow2, (number for pair in bases for number in pair), alignment)
        return _Source(bases, None, row_stride, alignment, device, tuple(parts))
    addresses = [[part[expert].data_ptr() for part in parts] for expert in range(len(parts[0]))]
    alignment = functools.reduce(_gcd_pow2, (address for row in addresses for address in row), alignment)
    table = torch.tensor(addresses, dtype=torch.int64, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    return _Source(None, table, row_stride, alignment, device, tuple(parts))


def _row_stride(part: Parts) -> int | None:
    """Bytes between rows, the same for all experts; None if they differ or the bytes of a row are apart."""
    matrices = part[:1] if isinstance(part, torch.Tensor) else part
    strides = {matrix.stride(0) if matrix.stride(1) == 1 else None for matrix in matrices}
    return strides.pop() if len(strides) == 1 else None


def _contiguous(part: Parts) -> Parts:
    return part.contiguous() if isinstance(part, torch.Tensor) else [matrix.contiguous() for matrix in part]


def _gcd_pow2(alignment: int, value: int) -> int:
    """The largest power of two up to ``alignment`` that divides ``value``."""
    while value % alignment:
        alignment //= 2
    return alignment


def _check_matrix(name: str, matrix: torch.Tensor, shape: tuple[int, int, int]) -> None:
    if tuple(matrix.shape) != shape or matrix.dtype != torch.uint8 or not matrix.is_contiguous():
        raise LayoutError(
            f"{name} is {matrix.dtype} {list(matrix.shape)} with strides {list(matrix.stride())}: must be contiguous"
            f" torch.uint8 {list(shape)}"
        )


def launch_constants(
    mapping: IndexMap, is_scale: bool, row_stride: int, alignment: int, inverse: bool
) -> tuple[dict[str, int | bool], int, int]:
    """Compile-time constants of a launch, programs for each expert, and warps.

    Args:
        row_stride: bytes between source rows.
        alignment: power of two up to 16 that divides all source addresses and the row stride.
    """
    constants: dict[str, int | bool] = {
        "BLOCK": mapping.block,
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
        return constants, mapping.rows // ROW_TILE * -(-row_words // block_k), SCALE_WARPS
    unit = _code_unit(mapping, alignment)
    cols = mapping.cols // unit
    block_c = _gcd_pow2(CODE_TILE_COLS, cols) if cols % 16 == 0 else CODE_TILE_COLS
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
    return constants, -(-mapping.rows // block_r) * -(-cols // block_c), CODE_WARPS


def _code_unit(mapping: IndexMap, alignment: int) -> int:
    """Bytes that move together: 8 where everything is a multiple of 8, as the 16-column scale blocks make it."""
    return 8 if alignment >= 8 and mapping.col_src % 8 == 0 and mapping.col_pad % 8 == 0 else 1


def _launch(
    mapping: IndexMap, is_scale: bool, source: _Source, prepared: torch.Tensor, dirty: torch.Tensor | None
) -> None:
    """Runs one direction; with ``dirty`` the source is written, and the flag set where padding is not zero."""
    from nvfp4_prep_kernels import triton_prepare_kernels as kernels

    inverse = dirty is not None
    constants, programs, warps = launch_constants(mapping, is_scale, source.row_stride, source.alignment, inverse)
    if is_scale:
        kernel, units = kernels.scales, prepared.view(torch.int32)
    else:
        wide = _code_unit(mapping, source.alignment) == 8
        kernel, units = kernels.codes, prepared.view(torch.int64) if wide else prepared
    bases = source.bases or ((0, 0),)
    with on_device(prepared.device):
        kernel[(programs * prepared.shape[0],)](
            # what a direction or a kind of source does not use is never touched: any tensor stands in for it
            prepared if source.table is None else source.table,
            units,
            prepared if dirty is None else dirty,
            *bases[0],
            *bases[-1],
            STACKED=source.bases is not None,
            num_warps=warps,
            **constants,
        )


def _pow2_up(value: int) -> int:
    return 1 << max(0, value - 1).bit_length()
