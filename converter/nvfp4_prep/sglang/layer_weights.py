"""The parameters of one prepared layer in SGLang: their shapes, the rank's share, and what arrived."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch

from nvfp4_prep.errors import ServingError
from nvfp4_prep.prepared.sglang_rules import takes_hidden, takes_padding
from nvfp4_prep.prepared.stamp import Stamp
from nvfp4_prep.serving.completeness import Completeness
from nvfp4_prep.serving.placement import STORED_TENSORS, Placement, relayout_to
from nvfp4_prep.serving.prepared_weights import PreparedWeights
from nvfp4_prep.sglang.arrivals import stored_layer_of
from nvfp4_prep_kernels import MoeDims
from nvfp4_prep_kernels.layout import UP_SCALE_VECTOR

__all__ = [
    "LayerWeights",
    "check_padding",
    "demanding",
    "finish",
    "placement_of",
    "refuse_two_scales",
    "set_loader",
    "taking",
]

_INPUT_SCALES = ("w13_input_scale", "w2_input_scale")
_W13_SCALE = "w13_weight_scale_2"
_demanded: contextvars.ContextVar[Completeness] = contextvars.ContextVar(
    "nvfp4_prep_demanded", default=Completeness.ALL
)


class LayerWeights(PreparedWeights):
    """Prepared weights in SGLang's shapes.

    SGLang keeps the global scales of gate and up in two columns, ``[E local, 2]``, and the input scales of all
    experts, ``[E global, 2]`` and ``[E global]``. Under EPLB the slots hold the experts of SGLang's current map, which
    is asked for anew at every load.

    Attributes:
        two_scales: whether the file that was loaded last has a vector of its own for up's global scales.
        taking: whether tensors may come: while the model is loaded, and inside :func:`taking`.
        stored_layers: names in the checkpoint of the layers whose tensors came.
        check_takes_two_scales: raises :class:`ServingError` if the kernel does not take a global scale each for gate
            and up.
    """

    def __init__(self, placement: Placement, layer: Any, check_takes_two_scales: Callable[[], None]) -> None:
        super().__init__(placement)
        self._layer = layer
        self.check_takes_two_scales = check_takes_two_scales
        self.two_scales = False
        self.taking = True
        self.stored_layers: set[str | None] = set()

    def forget(self) -> None:
        """Forget what came of a load that failed."""
        self.arrived.clear()
        self.stored_layers.clear()

    def is_running(self, name: str, param: torch.nn.Parameter) -> bool:
        """Return whether a tensor would come outside of the updates that are checked beforehand."""
        return not self.taking

    def finish(self) -> None:
        """Raise :class:`ServingError` if a tensor did not arrive; else forget what did."""
        self.two_scales = UP_SCALE_VECTOR in self.arrived
        super().finish()

    def fill(self, name: str, param: torch.Tensor, stored: torch.Tensor) -> None:
        """Copy the rank's share of a stored tensor into SGLang's parameter."""
        self.stored_layers.add(stored_layer_of(stored))
        local, everywhere = _slots(self._layer)
        self.placement = replace(self.placement, experts=local)
        if name == UP_SCALE_VECTOR:
            self.placement.fill(name, self._layer.w13_weight_scale_2.data[:, 1], stored)
            return
        if name in _INPUT_SCALES:
            columns = param.unsqueeze(-1) if param.dim() == 1 else param
            whole = replace(self.placement, experts=everywhere)
            for column in range(columns.shape[1]):
                whole.fill(name, columns[:, column], stored)
            return
        if name == _W13_SCALE and param.dim() == 2:
            for column in range(1 if UP_SCALE_VECTOR in self.arrived else 2):
                self.placement.fill(name, param[:, column], stored)
            return
        self.placement.fill(name, param, stored)

    def register(self, layer: Any) -> None:
        """Give the layer's parameters their stored shapes and these loaders.

        The parameters of block scales and codes are SGLang's own, made for the same sizes where nothing is padded.
        """
        for name in STORED_TENSORS:
            param = getattr(layer, name)
            if name not in (*_INPUT_SCALES, _W13_SCALE, "w2_weight_scale_2"):
                shape = self.placement.local_shape(name)
                if tuple(param.shape) != shape:
                    param.data = torch.empty(shape, dtype=param.dtype, device=param.device)
            set_loader(param, self.loader(name))
        if self.placement.layout.takes_two_w13_scales:
            up = torch.nn.Parameter(torch.empty(0, dtype=torch.float32), requires_grad=False)
            up.weight_loader = self.loader(UP_SCALE_VECTOR)  # type: ignore[attr-defined]
            layer.register_parameter(UP_SCALE_VECTOR, up)

    def check_scales(self) -> None:
        """Raise :class:`ServingError` if gate and up of an expert have different scales and the kernel takes one."""
        scales = self._layer.w13_weight_scale_2
        if self.two_scales and not torch.equal(scales[:, 0], scales[:, 1]):
            self.check_takes_two_scales()


def refuse_two_scales(where: str) -> NoReturn:
    """Raise :class:`ServingError` for a kernel that takes one global scale for gate and up."""
    raise ServingError(
        "gate and up have different global scales, but this kernel takes one for both",
        where=where,
        next_step=f"Serve with --moe-runner-backend flashinfer_trtllm, or {relayout_to('--layout cutedsl')}.",
    )


@contextlib.contextmanager
def taking(layers: Sequence[Any]) -> Iterator[None]:
    """While it is entered, these layers of a running model take tensors."""
    for layer in layers:
        layer.nvfp4_prep.taking = True
    try:
        yield
    finally:
        for layer in layers:
            layer.nvfp4_prep.taking = False


def set_loader(param: torch.nn.Parameter, loader: Callable[..., None]) -> None:
    """Give a parameter this loader; SGLang's own parameter classes have weight_loader as a property of another name."""
    setattr(param, "_weight_loader" if hasattr(param, "_weight_loader") else "weight_loader", loader)


def placement_of(layer: Any, stamp: Stamp, name: str, hidden: int, intermediate_per_rank: int) -> Placement:
    """Return the share of this rank in a layer.

    Raises:
        ServingError: if the layer has experts that the file does not have.
    """
    if layer.num_fused_shared_experts:
        raise ServingError(
            "shared experts fused into the routed experts cannot be served from a prepared checkpoint",
            where=name,
            next_step="Serve with --disable-shared-experts-fusion.",
        )
    local, _ = _slots(layer)
    tp = int(layer.moe_tp_size)
    return Placement(
        layer_name=name,
        layout=stamp.moe_layout(gated=bool(layer.moe_runner_config.is_gated)),
        dims=MoeDims(_stored_experts(layer), intermediate_per_rank * tp, hidden),
        tp_rank=int(layer.moe_tp_rank),
        tp_size=tp,
        experts=local,
        keep_hidden_padding=False,
    )


def check_padding(placement: Placement, *, trtllm: bool) -> None:
    """Raise :class:`ServingError` unless SGLang serves the file's padded sizes."""
    layout, dims = placement.layout, placement.dims
    if takes_padding(layout, dims, trtllm=trtllm):
        return
    padded = (layout.padded_hidden(dims.hidden), layout.padded_intermediate(dims.intermediate))
    raise ServingError(
        f"padded to hidden size {padded[0]} and intermediate size {padded[1]}, as SGLang does not for this kernel",
        where=placement.layer_name,
        expected="a hidden size that is a multiple of 128"
        + ("" if trtllm else f", and intermediate size {dims.intermediate}"),
        actual=f"hidden size {dims.hidden}, intermediate size {dims.intermediate}",
        next_step="Serve it with vLLM, or serve the source checkpoint (`nvfp4-prep restore` brings it back)."
        if not takes_hidden(dims.hidden)
        else "Serve with --moe-runner-backend flashinfer_trtllm, which pads the intermediate size as the file does.",
    )


def _metadata(layer: Any) -> Any:
    from sglang.srt.eplb.expert_location import get_global_expert_location_metadata

    return get_global_expert_location_metadata() if layer.uses_expert_location else None


def _stored_experts(layer: Any) -> int:
    metadata = _metadata(layer)
    return int(layer.num_global_routed_experts if metadata is None else metadata.num_logical_experts)


def _slots(layer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the stored experts of this rank's slots and of all slots."""
    metadata = _metadata(layer)
    physical = int(layer.num_global_routed_experts)
    stored = range(physical) if metadata is None else metadata.physical_to_logical_map[layer.layer_id].tolist()
    if len(stored) != physical:
        raise ServingError(
            f"SGLang's map of redundant experts has {len(stored)} slots, the layer {physical}",
            where=str(layer.layer_name),
            next_step="Serve without --init-expert-location.",
        )
    first, count = int(layer._expert_storage_rank) * int(layer._num_local_routed), int(layer._num_local_routed)
    return tuple(stored[first : first + count]), tuple(stored)


@contextlib.contextmanager
def demanding(completeness: Completeness) -> Iterator[None]:
    """While it is entered, this is demanded of layers in the place of all their tensors."""
    token = _demanded.set(completeness)
    try:
        yield
    finally:
        _demanded.reset(token)


def finish(weights: LayerWeights) -> bool:
    """Check what arrived of a layer, and return whether that is to be made ready for the kernel.

    A layer of a running model of which nothing came stays as it is: otherwise it would be permuted twice.

    Raises:
        ServingError: if tensors are missing.
    """
    demanded = _demanded.get()
    anything = bool(weights.arrived) or demanded is not Completeness.ALL_OR_NONE
    demanded.check(weights)
    weights.taking = False
    return anything
