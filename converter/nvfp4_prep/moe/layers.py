"""The MoE layers of a checkpoint in one canonical form, whatever the source calls and stacks its tensors.

A layer is a set of :class:`TensorGroup`: all source tensors that play one role, one for each expert or one stack for
all. A group knows the byte range of each expert and both directions between the source's arrangement and canonical
matrices ``uint8 [rows, bytes per row]``, one for each projection.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nvfp4_prep.checkpoint.tensors import TensorRecord, TensorSpec
from nvfp4_prep.formats import Leaf
from nvfp4_prep_kernels import MoeDims, MoeLayout, PreparedTensor, Projection
from nvfp4_prep_kernels.gate_up import join_alternating_rows, split_alternating_rows

__all__ = ["SOURCE_BLOCK_SCALE", "ByteRange", "LayerWithLayout", "MoeLayer", "TensorGroup"]

SOURCE_BLOCK_SCALE = "source_block_scale"
"""The tensor of a layer's original block scales, beside :class:`~nvfp4_prep_kernels.PreparedTensor`."""


@dataclass(frozen=True, slots=True)
class ByteRange:
    """``nbytes`` bytes of ``file`` from ``offset_bytes``; ``tensor`` is for messages."""

    file: str
    offset_bytes: int
    nbytes: int
    tensor: str


@dataclass(frozen=True)
class TensorGroup:
    """All source tensors of one layer that play one role.

    Attributes:
        head, tail: the name of expert e's tensor is ``head + str(e) + tail``; a stack's is ``head + tail``.
        leaf: what they hold.
        projections: whose, in the order of the rows.
        dtype, shape: of each source tensor (of the stack, where stacked).
        stacked: one tensor for all experts.
        transposed: matrices are stored ``[in, out]``.
        alternating: gate and up rows alternate one by one.
        records: where they lie: one record for each expert, or one. Empty where only names are needed (restore).
    """

    head: str
    tail: str
    leaf: Leaf
    projections: tuple[Projection, ...]
    dtype: str
    shape: tuple[int, ...]
    stacked: bool = False
    transposed: bool = False
    alternating: bool = False
    records: tuple[TensorRecord, ...] = ()

    @property
    def key(self) -> str:
        """Unique within a checkpoint: the name without the expert's number."""
        return self.head + self.tail.removeprefix(".") if not self.stacked else self.head + self.tail

    @property
    def shared_scalar(self) -> bool:
        """Whether one scalar serves all experts."""
        return self.stacked and self.leaf.is_scalar and not any(size > 1 for size in self.shape)

    @property
    def scalars_per_expert(self) -> int:
        """Numbers in one expert's tensor: 1, or one for each of the projections that it holds."""
        return math.prod(self.shape) if self.leaf.is_scalar and not self.stacked else 1

    def name(self, expert: int) -> str:
        """Return the source name of the tensor that holds expert ``expert``."""
        return self.head + self.tail if self.stacked else f"{self.head}{expert}{self.tail}"

    def specs(self, experts: int) -> list[TensorSpec]:
        """Return the source tensors: one, or one for each of ``experts``."""
        count = 1 if self.stacked else experts
        return [TensorSpec(self.name(expert), self.dtype, self.shape) for expert in range(count)]

    def expert_range(self, expert: int, experts: int) -> ByteRange:
        """Return the bytes of one expert in the source."""
        record = self.records[0 if self.stacked else expert]
        nbytes = record.nbytes // experts if self.stacked else record.nbytes
        begin = record.offset_bytes + (expert * nbytes if self.stacked else 0)
        return ByteRange(record.file, begin, nbytes, record.name)

    def arrange(self, raw: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Arrange source bytes of one expert's codes or block scales as canonical matrices.

        Args:
            raw: ``uint8 [nbytes]``.

        Returns:
            One ``uint8 [rows, bytes per row]`` for each projection; views where nothing moves.
        """
        rows, cols = self.shape[-2:]
        matrix = raw.view(rows, cols)
        if self.transposed:
            # At once: every later copy of a transposed view would be seven times slower (0.08 GB/s against 0.59).
            matrix = matrix.t().contiguous()
        if len(self.projections) == 1:
            return (matrix,)
        return split_alternating_rows(matrix) if self.alternating else tuple(matrix.chunk(2, dim=0))

    def disarrange(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the inverse of :meth:`arrange`: ``uint8 [nbytes]``, contiguous."""
        if len(parts) == 1:
            matrix = parts[0]
        else:
            matrix = join_alternating_rows(parts[0], parts[1]) if self.alternating else torch.cat(list(parts), dim=0)
        if self.transposed:
            matrix = matrix.t()
        return matrix.contiguous().view(-1)


@dataclass(frozen=True)
class MoeLayer:
    """One MoE layer of the source.

    Attributes:
        experts_path: module path of the routed experts; prepared names are ``<experts_path>.routed_experts.<tensor>``.
        index: the model's layer number, for the file's name.
        dims: sizes.
        gated: gate and up, or up alone.
        format: name of the quantization format.
        naming: name of the tensor naming.
        groups: all source tensors of the layer.
    """

    experts_path: str
    index: int
    dims: MoeDims
    gated: bool
    format: str
    naming: str
    groups: tuple[TensorGroup, ...]

    @property
    def source_nbytes(self) -> int:
        """Bytes of all source tensors."""
        return sum(record.nbytes for group in self.groups for record in group.records)

    @property
    def shards(self) -> frozenset[str]:
        """The files that hold the layer."""
        return frozenset(record.file for group in self.groups for record in group.records)

    def prepared_name(self, tensor: str) -> str:
        """Return the name of a prepared tensor of this layer."""
        return f"{self.experts_path}.routed_experts.{tensor}"

    def groups_of(self, leaf: Leaf, projections: Sequence[Projection]) -> tuple[TensorGroup, ...]:
        """Return the groups that together hold a leaf of these projections, in the projections' order."""
        found = dict.fromkeys(
            group
            for projection in projections
            for group in self.groups
            if group.leaf is leaf and projection in group.projections
        )
        return tuple(found)

    def groups_for(self, layout: MoeLayout, tensor: PreparedTensor) -> tuple[TensorGroup, ...]:
        """Return the groups whose bytes go into a prepared tensor."""
        leaf = Leaf.BLOCK_SCALE if tensor.is_scale else Leaf.CODES
        return self.groups_of(leaf, layout.projections(tensor))


class LayerWithLayout:
    """A layer of the source together with the layout that it is prepared in; base of plans and manifest records.

    Attributes:
        source: the layer in the source.
        layout: of the prepared tensors.
    """

    source: MoeLayer
    layout: MoeLayout

    @property
    def dims(self) -> MoeDims:
        """Sizes of the layer, without padding."""
        return self.source.dims

    @property
    def index(self) -> int:
        """The model's layer number."""
        return self.source.index

    @property
    def experts_path(self) -> str:
        """Module path of the experts in the source."""
        return self.source.experts_path

    @property
    def gated(self) -> bool:
        """Whether the experts have a gate projection."""
        return self.source.gated

    @property
    def format(self) -> str:
        """Name of the source's quantization format."""
        return self.source.format

    @property
    def groups(self) -> tuple[TensorGroup, ...]:
        """The source's tensors, grouped."""
        return self.source.groups

    def groups_for(self, tensor: PreparedTensor) -> tuple[TensorGroup, ...]:
        """Return the source's groups that a prepared tensor is made of."""
        return self.source.groups_for(self.layout, tensor)

    def prepared_name(self, tensor: str) -> str:
        """Return the name of a prepared tensor of this layer."""
        return self.source.prepared_name(tensor)

    def stored_tensors(self) -> dict[str, TensorSpec]:
        """Return the tensors that a server reads, by their short names: the four big ones and the scale vectors."""
        layout, dims = self.layout, self.dims
        stored = {str(tensor): (tensor.dtype, layout.stored_shape(tensor, dims)) for tensor in PreparedTensor}
        vectors = dict.fromkeys(layout.scale_vectors, ("F32", (dims.experts,)))
        return {short: TensorSpec(self.prepared_name(short), *kind) for short, kind in (stored | vectors).items()}
