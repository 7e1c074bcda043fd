"""Loaded parameters of one kernel's layout rearranged for another kernel, in place on their device.

Bytes that stay inside tiles of 128 rows are moved by one pass over the memory (Triton on a GPU, torch on a CPU) with
nothing beside it. Gate and up of the batched layout lie in different tiles: there each expert is inverted and prepared
again, with about three times one expert's bytes beside the parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nvfp4_prep.errors import ServingError
from nvfp4_prep_kernels import LayoutError, MoeDims, MoeLayout, PreparedTensor
from nvfp4_prep_kernels.tile_relayout import can_relayout, relayout_tiles

__all__ = ["RelayoutAtLoad"]


@dataclass(frozen=True)
class RelayoutAtLoad:
    """Conversion from the file's layout to the kernel's, for one rank's share of a layer.

    Attributes:
        source, target: layouts of the share alone.
        dims: of the share: I is the rank's, without padding.
    """

    source: MoeLayout
    target: MoeLayout
    dims: MoeDims

    @classmethod
    def of_share(cls, source: MoeLayout, target: MoeLayout, dims: MoeDims, tp_size: int) -> RelayoutAtLoad:
        """Return the conversion of one of ``tp_size`` ranks' shares of a layer with these sizes.

        A share is what its own sizes make in the same layout: that is what tensor-parallel sizes are served for.
        """
        share = MoeDims(dims.experts, dims.intermediate // tp_size, dims.hidden)
        return cls(source.for_moe_tp(1), target.for_moe_tp(1), share)

    def check(self, where: str, flag: str) -> None:
        """Raise :class:`ServingError` unless both layouts hold the share in the same sizes.

        Args:
            where: the layer's name.
            flag: the server's option for the kernel.
        """
        try:
            self.target.check(self.dims)
            problem = "the two kernels pad these sizes differently"
        except LayoutError as error:
            problem = str(error)
        else:
            if all(
                self.source.stored_shape(tensor, self.dims) == self.target.stored_shape(tensor, self.dims)
                for tensor in PreparedTensor
            ):
                return
        raise ServingError(
            f"weights prepared for one kernel cannot be rearranged for the other while they load: {problem}",
            where=where,
            next_step=f"Leave {flag} out, or write a checkpoint for that kernel with `nvfp4-prep relayout`.",
        )

    def convert(self, layer: torch.nn.Module) -> None:
        """Rearrange the four big parameters of a loaded layer, in place."""
        for tensor in PreparedTensor:
            self._convert(tensor, getattr(layer, tensor.value).data.view(torch.uint8))

    def _convert(self, tensor: PreparedTensor, loaded: torch.Tensor) -> None:
        if not can_relayout(self.source, self.target, tensor):
            for expert in loaded:
                expert.copy_(self.target.apply(tensor, *self.source.invert(tensor, expert, self.dims)))
        elif loaded.device.type == "cuda":
            from nvfp4_prep_kernels.triton_relayout import relayout

            relayout(tensor, loaded, self.source, self.target, out=loaded)
        else:
            relayout_tiles(tensor, loaded, self.source, self.target, out=loaded)
