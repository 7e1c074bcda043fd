"""Placement of a rank's part of a prepared layer in the rank's parameters. Needs torch alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nvfp4_prep.errors import ServingError
from nvfp4_prep.load import handle_of
from nvfp4_prep.serving.hidden_padding import drop_hidden_padding
from nvfp4_prep_kernels import SCALE_VECTORS, ExpertSlice, MoeDims, MoeLayout, PreparedTensor, rank_slice
from nvfp4_prep_kernels.slices import take_slice

__all__ = ["STORED_TENSORS", "Placement", "relayout_to"]

STORED_TENSORS = (*(tensor.value for tensor in PreparedTensor), *SCALE_VECTORS)
"""Tensors that a prepared layer has in every layout."""
_BIG = {tensor.value: tensor for tensor in PreparedTensor}


def relayout_to(options: str) -> str:
    """Return the advice to bring the checkpoint into another layout, as part of a sentence."""
    return f"run `nvfp4-prep relayout CHECKPOINT TARGET {options}`, which needs no source"


@dataclass(frozen=True)
class Placement:
    """The share of one rank.

    Attributes:
        layer_name: for messages.
        layout: of the file.
        dims: of the whole layer, unpadded.
        tp_rank, tp_size: share of I.
        experts: the stored (logical) expert of each local slot. Slots may repeat experts (EPLB) and follow any order.
        keep_hidden_padding: whether the parameters have the file's padding of H.
    """

    layer_name: str
    layout: MoeLayout
    dims: MoeDims
    tp_rank: int
    tp_size: int
    experts: tuple[int, ...]
    keep_hidden_padding: bool = True

    def check(self) -> None:
        """Raise :class:`ServingError` if a file in this layout cannot serve this share."""
        if self.tp_size in self.layout.tp_sizes(self.dims, limit=self.tp_size):
            return
        sizes = self.layout.tp_sizes(self.dims)
        alone = " or with expert parallelism" if 1 in sizes else ""
        raise ServingError(
            f"prepared for tensor-parallel sizes {', '.join(map(str, sizes))} of the experts, not for {self.tp_size}:"
            f" {self.dims.intermediate} / {self.tp_size} needs other padding",
            where=self.layer_name,
            next_step=f"Serve with one of these sizes{alone}, or, if {self.tp_size} divides {self.dims.intermediate},"
            f" {relayout_to(f'--moe-tp {self.tp_size}')}.",
        )

    @property
    def names(self) -> tuple[str, ...]:
        """All tensors of a prepared layer in this layout."""
        return (*_BIG, *self.layout.scale_vectors)

    @property
    def whole(self) -> bool:
        """Whether the rank takes experts as they are stored."""
        padded = self.layout.padded_hidden(self.dims.hidden) != self.dims.hidden
        return self.tp_size == 1 and (self.keep_hidden_padding or not padded)

    def part(self, tensor: PreparedTensor) -> ExpertSlice:
        """Return the rank's share of one expert."""
        part = rank_slice(self.layout, tensor, self.dims, self.tp_rank, self.tp_size)
        if self.keep_hidden_padding:
            return part
        hidden = self.dims.hidden
        return drop_hidden_padding(part, tensor, self.layout.padded_hidden(hidden), hidden)

    def stored_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor in the file."""
        if name in _BIG:
            return self.layout.stored_shape(_BIG[name], self.dims)
        return (self.dims.experts,)

    def stored(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Return dtype, as safetensors names it, and shape of a tensor in the file."""
        return _BIG[name].dtype if name in _BIG else "F32", self.stored_shape(name)

    def local_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the rank's parameter."""
        if name in _BIG:
            part = self.part(_BIG[name])
            return (len(self.experts), *part.shape)
        return (len(self.experts),)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor, in the file and in the parameter."""
        return _BIG[name].torch_dtype if name in _BIG else torch.float32

    def fill(self, name: str, param: torch.Tensor, stored: torch.Tensor) -> None:
        """Copy the rank's share of a stored tensor into its parameter, in place and with nothing else than ``copy_``.

        A tensor without data (:mod:`nvfp4_prep.load.lazy_tensor`) queues the read of that share instead.

        Raises:
            ServingError: if the stored tensor has another shape or dtype than the model's sizes ask for.
        """
        self._check_stored(name, stored)
        if name not in _BIG:
            param.copy_(stored[list(self.experts)])
            return
        handle = handle_of(stored)
        if handle is not None:
            part = self.part(_BIG[name])
            handle.load_into(param, part, self.experts)
            return
        first = self.experts[0]
        if self.whole and self.experts == tuple(range(first, first + len(self.experts))):
            param.view(torch.uint8).copy_(stored.view(torch.uint8)[first : first + len(self.experts)])
            return
        for slot, expert in enumerate(self.experts):
            whole = stored[expert].view(torch.uint8)
            share = take_slice(whole, self.part(_BIG[name]))
            param[slot].view(torch.uint8).copy_(share)

    def _check_stored(self, name: str, stored: torch.Tensor) -> None:
        expected = (self.stored_shape(name), self.dtype(name))
        actual = (tuple(stored.shape), stored.dtype)
        if actual == expected:
            return
        raise ServingError(
            f"tensor {name} of the checkpoint does not fit the model: {_difference(expected[0], actual[0])}",
            where=self.layer_name,
            expected=f"{list(expected[0])} {expected[1]}",
            actual=f"{list(actual[0])} {actual[1]}",
            next_step="The files do not belong to this config.json: run `nvfp4-prep verify` on the directory.",
        )


def _difference(expected: Sequence[int], actual: Sequence[int]) -> str:
    if expected == actual:
        return "another dtype"
    return "another number of experts" if list(expected[1:]) == list(actual[1:]) else "other sizes"
