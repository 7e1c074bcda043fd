"""The weight layouts of FlashInfer's NVFP4 fused-MoE kernels, CuteDSL and TRTLLM-gen.

A :class:`MoeLayout` is a small frozen value that knows which shapes one MoE layer takes in storage, how the
bytes of one expert get there (:meth:`MoeLayout.apply`) and how they come back (:meth:`MoeLayout.invert`). Both
directions work on one expert (or on a batch of experts through leading dimensions), so nothing ever needs a whole
layer in memory. This torch code is normative: the Triton kernels must give the same bytes.

Notation: E experts, H hidden size, I intermediate size of one expert, Hp and Ip the padded sizes,
N1 = 2*Ip for gated experts (gate and up fused) and Ip otherwise. Codes are ``uint8`` with two e2m1 values a byte (low
nibble is the even column); block scales are e4m3 bytes viewed as ``uint8``, one for 16 columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from nvfp4_prep_kernels.layer_tensors import (
    BLOCK_COLS,
    SCALE_VECTORS,
    UP_SCALE_VECTOR,
    LayoutError,
    MoeDims,
    PreparedTensor,
    Projection,
)
from nvfp4_prep_kernels.memory import Empty, new_empty
from nvfp4_prep_kernels.padding import pad_matrix, roundup, unpad_matrix
from nvfp4_prep_kernels.row_order import (
    BlockRows,
    HalfRows,
    PlainRows,
    RowOrder,
    ShuffledRows,
    join_rows,
    split_rows,
)
from nvfp4_prep_kernels.scale_swizzle import swizzle_scales, unswizzle_scales

__all__ = [
    "BLOCK_COLS",
    "SCALE_VECTORS",
    "UP_SCALE_VECTOR",
    "LayoutError",
    "MoeDims",
    "MoeLayout",
    "PreparedTensor",
    "Projection",
]


@dataclass(frozen=True)
class MoeLayout:
    """One way of storing the experts of an MoE layer.

    Attributes:
        rows: the order of the rows; tells gated experts (SwiGLU family: gate and up) from others (relu2: up alone).
        hidden_alignment: H is padded with zeros to a multiple of this.
        moe_tp: tensor-parallel size for which I is padded. Each of the ``moe_tp`` slices of I is padded on its own;
            where nothing needs padding the value has no influence.
    """

    rows: RowOrder
    hidden_alignment: int = 256
    moe_tp: int = 1

    def __post_init__(self) -> None:
        if self.moe_tp < 1:
            raise LayoutError(f"tensor-parallel size {self.moe_tp}: must be at least 1")
        if self.hidden_alignment < 1 or self.hidden_alignment % 128:
            raise LayoutError(f"hidden alignment {self.hidden_alignment}: must keep swizzle tiles of 128 rows whole")

    @classmethod
    def cutedsl(cls, *, gated: bool, gate_up_block: int = 64, moe_tp: int = 1) -> MoeLayout:
        """Return the layout of ``cute_dsl_fused_moe`` (vLLM's FLASHINFER_CUTEDSL backend)."""
        if not gated:
            return cls(PlainRows(), moe_tp=moe_tp)
        return cls(BlockRows(gate_up_block), moe_tp=moe_tp)

    @classmethod
    def cutedsl_batched(cls, *, moe_tp: int = 1) -> MoeLayout:
        """Return the batched kernel's layout (vLLM's FLASHINFER_CUTEDSL_BATCHED backend): gated, nothing interleaved.

        The kernel pads nothing: :meth:`check` refuses I that 64 does not divide and H that 128 does not divide.
        """
        return cls(HalfRows(), hidden_alignment=128, moe_tp=moe_tp)

    @classmethod
    def trtllm(cls, *, gated: bool, moe_tp: int = 1) -> MoeLayout:
        """Return the layout of the TRTLLM-gen kernels (vLLM's FLASHINFER_TRTLLM backend)."""
        return cls(ShuffledRows(gated), moe_tp=moe_tp)

    @classmethod
    def named(cls, name: str, *, gated: bool, gate_up_block: int = 64, moe_tp: int = 1) -> MoeLayout:
        """Return the layout of a :attr:`name`; ``gate_up_block`` is ignored by layouts without such blocks.

        Raises:
            LayoutError: if there is no such layout, or it has no such layers.
        """
        if name == "cutedsl":
            return cls.cutedsl(gated=gated, gate_up_block=gate_up_block, moe_tp=moe_tp)
        if name == "trtllm":
            return cls.trtllm(gated=gated, moe_tp=moe_tp)
        if name != "cutedsl-batched":
            raise LayoutError(f"unknown layout {name!r}")
        if not gated:
            raise LayoutError("the batched kernel computes SiLU-gated experts only; use the standard layout (cutedsl)")
        return cls.cutedsl_batched(moe_tp=moe_tp)

    @property
    def name(self) -> str:
        """The name that :meth:`named` takes."""
        if self.shuffled:
            return "trtllm"
        return "cutedsl-batched" if self.concatenated else "cutedsl"

    def for_moe_tp(self, moe_tp: int) -> MoeLayout:
        """Return the same layout, padded for another tensor-parallel size."""
        return replace(self, moe_tp=moe_tp)

    @property
    def gated(self) -> bool:
        """Whether experts have a gate and an up projection, else up alone."""
        return self.rows.gated

    @property
    def intermediate_alignment(self) -> int:
        """I (per tensor-parallel rank) is padded with zeros to a multiple of this: whole swizzle tiles of w13."""
        return 64 if self.gated else 128

    @property
    def halves(self) -> int:
        """Projections fused in w13: 2 gated, 1 otherwise."""
        return 2 if self.gated else 1

    @property
    def concatenated(self) -> bool:
        """Whether w13 is ``[gate; up]``, one half after the other, as the batched kernel reads it."""
        return isinstance(self.rows, HalfRows)

    @property
    def shuffled(self) -> bool:
        """Whether rows are shuffled in blocks of 32, as the TRTLLM-gen kernels read them; those of w2 too."""
        return self.rows.shuffled

    @property
    def interleaved(self) -> bool:
        """Whether gate and up rows alternate."""
        return self.rows.block > 0

    @property
    def interleaved_rows(self) -> int:
        """Rows of gate or up that lie together where the two alternate, else 0."""
        return self.rows.block

    @property
    def gate_up_block(self) -> int:
        """The CuteDSL layout's block height; its default for layouts without one."""
        return self.rows.block if isinstance(self.rows, BlockRows) else BlockRows().block

    @property
    def takes_two_w13_scales(self) -> bool:
        """Whether the kernel takes one global scale for gate and one for up: :data:`UP_SCALE_VECTOR` can be stored."""
        return self.shuffled and self.gated

    @property
    def scale_vectors(self) -> tuple[str, ...]:
        """Names of the float32 ``[E]`` tensors that are stored beside the four big ones."""
        return (*SCALE_VECTORS, UP_SCALE_VECTOR) if self.takes_two_w13_scales else SCALE_VECTORS

    def check(self, dims: MoeDims) -> None:
        """Raise :class:`LayoutError` if a layer of these sizes cannot be stored in this layout."""
        if dims.experts < 1 or dims.intermediate < 1 or dims.hidden < 1:
            raise LayoutError(f"experts, intermediate and hidden sizes must be positive, got {dims}")
        if dims.hidden % BLOCK_COLS or dims.intermediate % BLOCK_COLS:
            raise LayoutError(
                f"hidden size {dims.hidden} and intermediate size {dims.intermediate} must be multiples of the scale"
                f" block of {BLOCK_COLS}"
            )
        rank_intermediate = dims.intermediate // self.moe_tp
        if dims.intermediate % self.moe_tp or rank_intermediate % BLOCK_COLS:
            raise LayoutError(
                f"intermediate size {dims.intermediate} cannot be split over {self.moe_tp} tensor-parallel ranks in"
                f" whole scale blocks of {BLOCK_COLS}"
            )
        if self.concatenated and (rank_intermediate % 64 or dims.hidden % 128):
            raise LayoutError(
                f"the batched kernel pads nothing: intermediate size per rank {rank_intermediate} must be a multiple"
                f" of 64 and hidden size {dims.hidden} of 128; use the standard layout (cutedsl)"
            )
        if self.concatenated and self.moe_tp > 1 and rank_intermediate % 128:
            raise LayoutError(
                f"the batched layout keeps [gate; up]: {self.moe_tp} tensor-parallel ranks can share it only in whole"
                f" swizzle tiles of 128 rows, and intermediate size per rank {rank_intermediate} is not a multiple of"
                " it; use the standard layout (cutedsl) or expert parallelism"
            )

    def padded_hidden(self, hidden: int) -> int:
        """Return Hp."""
        return roundup(hidden, self.hidden_alignment)

    def padded_intermediate(self, intermediate: int) -> int:
        """Return Ip of the whole layer: the sum over ``moe_tp`` ranks of their padded sizes."""
        return self.moe_tp * roundup(intermediate // self.moe_tp, self.intermediate_alignment)

    def expert_shape(self, tensor: PreparedTensor, dims: MoeDims) -> tuple[int, int]:
        """Return ``(rows, bytes per row)`` of one expert in a prepared tensor; stored with E in front."""
        hidden, inter = self.padded_hidden(dims.hidden), self.padded_intermediate(dims.intermediate)
        rows, cols = (self.halves * inter, hidden) if tensor.is_w13 else (hidden, inter)
        return rows, cols // tensor.cols_per_byte

    def stored_shape(self, tensor: PreparedTensor, dims: MoeDims) -> tuple[int, int, int]:
        """Return ``(E, rows, bytes per row)``: the shape of a prepared tensor in a file, whose elements are bytes."""
        return (dims.experts, *self.expert_shape(tensor, dims))

    def source_shape(self, tensor: PreparedTensor, dims: MoeDims) -> tuple[int, int]:
        """Return ``(rows, bytes per row)`` of one projection of one expert, without padding."""
        rows, cols = (dims.intermediate, dims.hidden) if tensor.is_w13 else (dims.hidden, dims.intermediate)
        return rows, cols // tensor.cols_per_byte

    def expert_nbytes(self, tensor: PreparedTensor, dims: MoeDims) -> int:
        """Return the bytes of one expert in a prepared tensor."""
        rows, row_nbytes = self.expert_shape(tensor, dims)
        return rows * row_nbytes

    def projections(self, tensor: PreparedTensor) -> tuple[Projection, ...]:
        """Return the projections that a prepared tensor holds, in the order of :meth:`apply`'s arguments."""
        if not tensor.is_w13:
            return (Projection.DOWN,)
        return (Projection.GATE, Projection.UP) if self.gated else (Projection.UP,)

    def tp_sizes(self, dims: MoeDims, limit: int = 64) -> tuple[int, ...]:
        """Return tensor-parallel sizes up to ``limit``, and ``moe_tp``, that a file in this layout serves bit-exactly.

        A rank's share of the prepared whole equals the preparation of the rank's share if the share needs no padding,
        or if the file was padded for exactly that size.
        """
        whole = self.padded_intermediate(dims.intermediate) == dims.intermediate
        # [gate; up] is cut in each half by itself, and a share of the swizzled scales must be whole tiles of 128 rows.
        alignment = 128 if self.concatenated else self.intermediate_alignment

        def serves(size: int) -> bool:
            if size == self.moe_tp:
                return True  # made for it, and checked
            share, rest = divmod(dims.intermediate, size)
            return whole and rest == 0 and share % alignment == 0

        found = [size for size in range(1, limit + 1) if serves(size)]
        return tuple(found) if self.moe_tp <= limit else (*found, self.moe_tp)

    def apply(self, tensor: PreparedTensor, *parts: torch.Tensor, empty: Empty = new_empty) -> torch.Tensor:
        """Prepare source bytes of experts.

        Args:
            tensor: which prepared tensor to make.
            parts: one tensor for each of :meth:`projections`, ``uint8 [..., rows, bytes per row]`` as
                :meth:`source_shape` gives them; row-major block scales for the scale tensors.
            empty: makes the memory of results.

        Returns:
            ``uint8 [..., rows, bytes per row]`` as :meth:`expert_shape` gives them. May share memory with the input
            where nothing moves.

        Raises:
            LayoutError: if the number of parts is wrong or a part cannot be split over ``moe_tp`` ranks.
            ValueError: if the parts' shapes differ or are not multiples of what the layout needs.
        """
        names = self.projections(tensor)
        if len(parts) != len(names):
            raise LayoutError(f"{tensor.value} takes {len(names)} projections ({', '.join(names)}), got {len(parts)}")
        padded = tuple(self._pad(tensor, part, empty) for part in parts)
        fused = join_rows(self.rows, padded, empty)
        return swizzle_scales(fused, empty) if tensor.is_scale else fused

    def invert(
        self, tensor: PreparedTensor, prepared: torch.Tensor, dims: MoeDims, empty: Empty = new_empty
    ) -> tuple[torch.Tensor, ...]:
        """Return the inverse of :meth:`apply`.

        Args:
            tensor: which prepared tensor ``prepared`` is.
            prepared: ``uint8 [..., rows, bytes per row]`` as :meth:`expert_shape` gives them.
            dims: the layer's sizes without padding.
            empty: makes the memory of results.

        Returns:
            One tensor for each of :meth:`projections`, ``uint8`` in :meth:`source_shape`.

        Raises:
            ValueError: if the shape is wrong or a padding byte is not zero.
        """
        if tuple(prepared.shape[-2:]) != self.expert_shape(tensor, dims):
            raise ValueError(f"{tensor.value}: shape {list(prepared.shape)} does not fit {dims}")
        fused = unswizzle_scales(prepared, empty) if tensor.is_scale else prepared
        parts = split_rows(self.rows, fused, fused=tensor.is_w13, empty=empty)
        return tuple(self._unpad(tensor, part, dims) for part in parts)

    def _padded(self, tensor: PreparedTensor, rows: int, cols: int) -> tuple[int, int]:
        """Return the rows and columns of one projection with padding."""
        if tensor.is_w13:
            return self.padded_intermediate(rows), self.padded_hidden(cols)
        return self.padded_hidden(rows), self.padded_intermediate(cols)

    def _pad(self, tensor: PreparedTensor, part: torch.Tensor, empty: Empty) -> torch.Tensor:
        """Pad I on each rank's slice and H once; I is the rows of w13 and the columns of w2."""
        per_byte = tensor.cols_per_byte
        *lead, rows, cols = part.shape
        if (rows if tensor.is_w13 else cols) % self.moe_tp:
            raise LayoutError(f"{tensor.value}: {[rows, cols]} cannot be split over {self.moe_tp} ranks")
        padded_rows, padded_cols = self._padded(tensor, rows, cols * per_byte)
        padded_cols //= per_byte
        if (rows, cols) == (padded_rows, padded_cols):
            return part
        ranks = self.moe_tp
        if tensor.is_w13:
            split = part.reshape(*lead, ranks, rows // ranks, cols)
            padded = pad_matrix(split, padded_rows // ranks, padded_cols, empty)
        else:
            split = part.reshape(*lead, rows * ranks, cols // ranks)
            padded = pad_matrix(split, padded_rows * ranks, padded_cols // ranks, empty)
        return padded.reshape(*lead, padded_rows, padded_cols)

    def _unpad(self, tensor: PreparedTensor, part: torch.Tensor, dims: MoeDims) -> torch.Tensor:
        rows, cols = self.source_shape(tensor, dims)
        *lead, padded_rows, padded_cols = part.shape
        if (padded_rows, padded_cols) == (rows, cols):
            return part
        if tensor.is_w13:
            split = part.reshape(*lead, self.moe_tp, padded_rows // self.moe_tp, padded_cols)
            return unpad_matrix(split, rows // self.moe_tp, cols).reshape(*lead, rows, cols)
        split = part.reshape(*lead, padded_rows * self.moe_tp, padded_cols // self.moe_tp)
        return unpad_matrix(split, rows * self.moe_tp, cols // self.moe_tp).reshape(*lead, rows, cols)
