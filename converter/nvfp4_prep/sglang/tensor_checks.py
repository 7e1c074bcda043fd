"""Checks of a trainer's tensors for a running model, made as a whole before a parameter is touched.

What a call may hold of prepared experts is whole layers under the checkpoint's names, with the stamp that tells their
layout. Everything else is SGLang's own matter, but for names that come twice and for shapes that the checkpoint does
not have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nvfp4_prep._util.text import first_of
from nvfp4_prep.errors import ServingError
from nvfp4_prep.prepared.stamp import Stamp
from nvfp4_prep.serving.stamp_tensor import STAMP_TENSOR, config_of_stamp_tensor
from nvfp4_prep.serving.updates import Tensors, check_same_layout, check_same_tensors
from nvfp4_prep.sglang.arrivals import expected_layers, prepared_layer, prepared_layers
from nvfp4_prep.sglang.source_config import adopted_stamp
from nvfp4_prep.sglang.sources import served_by_any, served_tensors
from nvfp4_prep_kernels import UP_SCALE_VECTOR, PreparedTensor

__all__ = ["NEXT", "WHERE", "Checked", "Named", "check_has_data", "check_tensors"]

Named = list[tuple[str, torch.Tensor]]
WHERE = "tensors for a running model"
NEXT = (
    "Send all tensors of a prepared layer in one call, under the checkpoint's names, with that of"
    " nvfp4_prep.serving.stamp_tensor, or update the whole model by update_weights_from_disk."
)
_DTYPE_NAMES = {torch.float32: "F32", **{tensor.torch_dtype: str(tensor.dtype) for tensor in PreparedTensor}}
_QUANTIZE = "Look at the trainer's quantizer: `nvfp4-prep convert` writes no such scale."
_W13_SCALE, _INPUT_SCALE = "w13_weight_scale_2", "input_scale"


@dataclass(frozen=True)
class Checked:
    """Tensors of one call that may be loaded.

    Attributes:
        others: not of experts.
        experts: of prepared experts, in the checkpoint's names.
        expected: the stored layers that the model of this pipeline stage has to take.
    """

    others: Named
    experts: Named
    expected: frozenset[str]

    @property
    def names(self) -> str:
        """The names of the experts' tensors, as one text."""
        return "\n".join(sorted(name for name, _ in self.experts))


def check_tensors(updater: Any, named: Named, load_format: str | None) -> Checked:
    """Divide the tensors of one call.

    Tensors of experts that only another model of this server has (a draft model, or its target) are left to that one:
    SGLang gives one call to all of them.

    Raises:
        ServingError: if the call must not be loaded.
    """
    _check_sglang_updates(updater, load_format)
    config = updater.model_config
    served, by_any = served_tensors(config), served_by_any()
    stamps = [tensor for name, tensor in named if name == STAMP_TENSOR]
    tensors = [(name, tensor) for name, tensor in named if name != STAMP_TENSOR]
    _check_once(name for name, _ in tensors)
    known = served or {}
    experts = [(n, t) for n, t in tensors if _is_experts(n, known) and (n in known or n not in by_any)]
    others = [each for each in tensors if not _is_experts(each[0], known)]
    if experts:
        _check_is_served(load_format, served)
        _check_experts(known, experts)
        _check_stamps(Stamp.parse(adopted_stamp(config.hf_config) or {}), stamps)
        _check_scales(updater.get_model(), experts)
    if load_format == "direct":
        params = dict(updater.get_model().named_parameters())
        _check_shapes({name: tuple(param.shape) for name, param in params.items()}, others, strict=True)
    elif served is not None:
        _check_shapes({name: shape for name, (_, shape) in served.items()}, others, strict=False)
    return Checked(others, [(name, tensor.detach()) for name, tensor in experts], _expected(updater, experts))


def _check_sglang_updates(updater: Any, load_format: str | None) -> None:
    """Raise :class:`ServingError` for what SGLang refuses itself; with experts alone it is asked only to write them."""
    from sglang.srt.model_executor.model_runner_components import weight_updater

    problem = weight_updater._unsupported_derived_weight_cache_error(updater.get_model())
    if problem is not None:
        raise ServingError(problem, where=WHERE)
    updater._assert_weight_cache_inactive("an update by tensors")
    if load_format not in (None, "direct", *updater.custom_weight_loaders):
        raise ServingError(
            "unknown load_format",
            where=WHERE,
            expected=", ".join(("direct", "flattened_bucket", *updater.custom_weight_loaders)),
            actual=load_format,
            next_step="Leave it out, or name the loader by --custom-weight-loader.",
        )


def _check_once(names: Iterable[str]) -> None:
    """Raise :class:`ServingError` if a name comes twice.

    Which of two SGLang would serve depends on the model: some load in several threads, and some hold a tensor back
    until the other half of a fused parameter came.
    """
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ServingError(
            "tensors came twice", where=WHERE, actual=first_of(twice), next_step="Send each tensor once."
        )


def _is_experts(name: str, served: Tensors) -> bool:
    """Return whether a name is of experts that are, or may be, prepared.

    A checkpoint may have layers with unprepared experts, too, as of a draft model.
    """
    return prepared_layer(name) is not None or (name not in served and "experts" in name.split("."))


def _check_is_served(load_format: str | None, served: Tensors | None) -> None:
    if load_format is not None:
        raise ServingError(
            f"load_format {load_format} writes over parameters of prepared experts", where=WHERE, next_step=NEXT
        )
    if served is None:
        raise ServingError(
            "tensors of experts came, but the model was not loaded from local files whose names could be compared",
            where=WHERE,
            next_step="Start the server from a local directory, or update by update_weights_from_disk.",
        )


def _check_experts(served: Tensors, experts: Named) -> None:
    """Check that these are whole layers of the served checkpoint, in its names, dtypes and sizes."""
    names = {name for name, _ in experts}
    foreign = sorted(names - served.keys())
    if foreign:
        raise ServingError(
            "tensors of experts came that the served checkpoint does not have",
            where=WHERE,
            actual=first_of(foreign),
            next_step=NEXT,
        )
    layers = {prepared_layer(name) for name in names}
    whole = {name: stored for name, stored in served.items() if prepared_layer(name) in layers}
    missing = sorted(whole.keys() - names)
    if missing:
        raise ServingError(
            "a prepared layer came without some of its tensors",
            where=WHERE,
            actual=f"without {first_of(missing)}",
            next_step=NEXT,
        )
    for name, tensor in experts:
        _check_plain(name, tensor)
    found = {name: (_DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape)) for name, tensor in experts}
    check_same_tensors(whole, found, WHERE)


def check_has_data(name: str, tensor: torch.Tensor) -> None:
    """Raise :class:`ServingError` if a plain tensor has no memory, which to copy would end the process.

    A trainer frees the storage of shards that it does not need; their shapes stay.
    """
    if not _is_plain(tensor):
        return
    if not tensor.is_meta and tensor.untyped_storage().nbytes() >= _end_bytes(tensor):
        return
    raise ServingError(
        f"tensor {name} has no data",
        where=WHERE,
        actual="a tensor on the meta device" if tensor.is_meta else "a storage that was freed, or is too small",
        next_step="Gather the tensor's data before it is sent.",
    )


def _check_plain(name: str, tensor: torch.Tensor) -> None:
    if not _is_plain(tensor):
        raise ServingError(
            f"tensor {name} cannot be copied into a prepared layer",
            where=WHERE,
            expected="a plain dense tensor",
            actual=f"{type(tensor).__name__}, {getattr(tensor, 'layout', 'no tensor')}",
            next_step="Send the whole tensor as a torch.Tensor.",
        )


def _is_plain(tensor: torch.Tensor) -> bool:
    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided


def _end_bytes(tensor: torch.Tensor) -> int:
    """Return where a tensor ends in its storage."""
    if not tensor.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int(tensor.storage_offset() + last + 1) * tensor.element_size()


def _check_stamps(served: Stamp, stamps: list[torch.Tensor]) -> None:
    if not stamps:
        raise ServingError("prepared tensors came without the stamp of their layout", where=WHERE, next_step=NEXT)
    for stamp in stamps:
        check_same_layout(served, config_of_stamp_tensor(stamp), f"tensor {STAMP_TENSOR}")


def _check_scales(model: Any, experts: Named) -> None:
    """Check the vectors of scales: that `convert` could have written them, and that the kernel takes them."""
    vectors = {name: tensor for name, tensor in experts if tensor.dim() == 1}
    for name, values in vectors.items():
        bad = ~(values.isfinite() & (values >= 0))
        if bool(bad.any()):
            raise ServingError(
                f"tensor {name} has a value that is not a usable scale",
                where=WHERE,
                expected="finite numbers, not negative",
                actual=float(values[bad][0]),
                next_step=_QUANTIZE,
            )
        if name.endswith(_INPUT_SCALE) and not bool(values.any()):
            raise ServingError(f"all input scales of tensor {name} are 0", where=WHERE, next_step=_QUANTIZE)
    for name, up in vectors.items():
        stored = prepared_layer(name)
        if stored is None or not name.endswith(f".{UP_SCALE_VECTOR}"):
            continue
        gate = vectors[f"{name.removesuffix(UP_SCALE_VECTOR)}{_W13_SCALE}"]
        if not torch.equal(gate, up):
            _check_takes_two_scales(model, stored)


def _check_takes_two_scales(model: Any, stored: str) -> None:
    """Check that the kernel takes a scale each for gate and up; of a layer that another stage has, as those here do."""
    layers = prepared_layers(model)
    own = [layer for layer in layers if stored in layer.nvfp4_prep.stored_layers]
    for layer in own or layers:
        layer.nvfp4_prep.check_takes_two_scales()


def _check_shapes(known: dict[str, tuple[int, ...]], tensors: Named, *, strict: bool) -> None:
    """Check the shapes of tensors with known names, and with ``strict`` that all names are known.

    dtypes may differ: SGLang converts.
    """
    if strict and (foreign := sorted({name for name, _ in tensors} - known.keys())):
        raise ServingError("tensors came that the model has no parameters for", where=WHERE, actual=first_of(foreign))
    pairs = [(name, known[name], tuple(tensor.shape)) for name, tensor in tensors if name in known]
    served, found = ({pair[0]: ("", _no_scalar(pair[i])) for pair in pairs} for i in (1, 2))
    check_same_tensors(served, found, WHERE)


def _no_scalar(shape: Any) -> tuple[int, ...]:
    """Return a shape; SGLang takes ``[]`` and ``[1]`` for the same."""
    return tuple(shape) or (1,)


def _expected(updater: Any, experts: Named) -> frozenset[str]:
    came = {layer for name, _ in experts if (layer := prepared_layer(name))}
    if not came:
        return frozenset()
    folder = Path(str(updater.model_config.model_path))
    return frozenset(expected_layers(came, updater.get_model(), updater.model_config, folder))
