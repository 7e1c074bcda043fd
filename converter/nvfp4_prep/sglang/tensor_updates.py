"""Tensors that reach a running model without files: a trainer's, in process or broadcast.

SGLang 0.5.23 hands them to the model as they are: names that the model does not know are passed over in silence, an
original expert's tensor fails when others were written, and another layout's bytes fit. Here a call is checked as a
whole before a parameter is touched, on all tensor-parallel ranks. What it may hold of prepared experts is whole layers
under the checkpoint's names, with the stamp that tells their layout. Everything else is SGLang's own matter, but for
shapes that the checkpoint does not have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from nvfp4_prep._util.text import first_of
from nvfp4_prep.errors import NvfpPrepError, ServingError
from nvfp4_prep.prepared.stamp import Stamp
from nvfp4_prep.serving.completeness import Completeness
from nvfp4_prep.serving.stamp_tensor import STAMP_TENSOR, config_of_stamp_tensor
from nvfp4_prep.serving.updates import Tensors, check_same_layout, check_same_tensors
from nvfp4_prep.sglang.arrivals import expected_layers, prepared_layer, prepared_layers, tagged
from nvfp4_prep.sglang.layer_weights import demanding, taking
from nvfp4_prep.sglang.source_config import adopted_stamp
from nvfp4_prep.sglang.sources import served_tensors
from nvfp4_prep.sglang.updates import End, agree, note_tensors
from nvfp4_prep_kernels import PreparedTensor

__all__ = ["load_broadcast", "load_tensors", "refuse_ipc"]

Named = list[tuple[str, torch.Tensor]]
Answer = tuple[bool, str]
_DTYPE_NAMES = {torch.float32: "F32", **{tensor.torch_dtype: str(tensor.dtype) for tensor in PreparedTensor}}
_WHERE = "tensors for a running model"
_NEXT = (
    "Send all tensors of a prepared layer in one call, under the checkpoint's names, with that of"
    " nvfp4_prep.serving.stamp_tensor, or update the whole model by update_weights_from_disk."
)


def load_tensors(original: Callable[..., Answer], updater: Any, named: Any, load_format: str | None) -> Answer:
    """Load what came in process (``update_weights_from_tensor``); stock checkpoints pass through."""
    if adopted_stamp(updater.model_config.hf_config) is None:
        return original(updater, named, load_format)
    if load_format == "flattened_bucket":
        named, load_format = _out_of_bucket(named), None
    else:
        named = _own(updater, named)
    return _load(lambda tensors: original(updater, tensors, load_format), updater, named, load_format)


def load_broadcast(original: Callable[..., Answer], updater: Any, named: Iterable[tuple[str, torch.Tensor]]) -> Answer:
    """Load what was broadcast (``update_weights_from_distributed``); stock checkpoints pass through."""
    if adopted_stamp(updater.model_config.hf_config) is None:
        return original(updater, named)
    return _load(lambda tensors: original(updater, tensors), updater, list(named), None)


def refuse_ipc(original: Callable[..., Answer], updater: Any, request: Any) -> Answer:
    """Refuse updates by checkpoint-engine; stock checkpoints pass through.

    Its tensors come in buckets that divide layers, and SGLang logs what goes wrong after the last one.
    """
    if adopted_stamp(updater.model_config.hf_config) is None:
        return original(updater, request)
    error = ServingError(
        "update_weights_from_ipc cannot be checked before parameters are written, as prepared experts need it",
        next_step="Use update_weights_from_disk, update_weights_from_tensor or update_weights_from_distributed.",
    )
    return False, _refused(updater, str(error))


def _load(load: Callable[[Named], Answer], updater: Any, named: Named, load_format: str | None) -> Answer:
    """Load the tensors of one call, those that are not of prepared experts first: SGLang may fail with them.

    Raises:
        ServingError: if prepared experts were loaded in part. The server ends with it.
    """
    others: Named = []
    experts: Named = []
    end, message = End.UPDATED, ""
    try:
        others, experts = _checked(updater, named, load_format)
    except NvfpPrepError as error:
        end, message = End.UNTOUCHED, str(error)
    end, message = agree(end, message)
    if end is not End.UPDATED:
        return False, _refused(updater, message)
    note_tensors(updater.model_config)
    if others or not experts:
        success, message = load(others)
        if not success or not experts:
            return success, message
    return _load_experts(load, updater, experts)


def _load_experts(load: Callable[[Named], Answer], updater: Any, experts: Named) -> Answer:
    from sglang.srt.model_loader.loader import device_loading_context

    model = updater.get_model()
    layers, device = prepared_layers(model), torch.device(updater.device)
    with taking(layers), demanding(Completeness.ALL_OR_NONE):
        try:
            success, message = load([tagged(name, tensor) for name, tensor in experts])
            arrived = [layer for layer in layers if success and layer.nvfp4_prep.arrived]
            for layer in arrived:
                with device_loading_context(layer, device):
                    layer.quant_method.process_weights_after_loading(layer)
        except Exception as error:
            raise _mixture(updater, str(error)) from error
    if not success:
        raise _mixture(updater, message)
    taken = {stored for layer in arrived for stored in layer.nvfp4_prep.stored_layers}
    folder = Path(str(updater.model_config.model_path))
    came = {layer for name, _ in experts if (layer := prepared_layer(name))}
    untaken = set(expected_layers(came, model, updater.model_config, folder)) - taken
    if untaken:
        raise _mixture(updater, f"SGLang's model class passed over {', '.join(sorted(untaken))}")
    return success, message


def _checked(updater: Any, named: Named, load_format: str | None) -> tuple[Named, Named]:
    """Return what is not of experts, and what is, of a call that may be loaded.

    Raises:
        ServingError: if it may not.
    """
    config = updater.model_config
    served = served_tensors(config)
    tensors = [(name, tensor) for name, tensor in named if name != STAMP_TENSOR]
    if config.is_draft_model:  # SGLang gives it the target model's tensors, too
        tensors = [each for each in tensors if prepared_layer(each[0]) is None or each[0] in (served or ())]
    experts = [each for each in tensors if _is_experts(each[0], served or {})]
    others = [each for each in tensors if not _is_experts(each[0], served or {})]
    if experts:
        _check_experts(Stamp.parse(adopted_stamp(config.hf_config) or {}), served, named, experts, load_format)
    if load_format == "direct":
        params = dict(updater.get_model().named_parameters())
        _check_shapes({name: tuple(param.shape) for name, param in params.items()}, others, strict=True)
    elif served is not None:
        _check_shapes({name: shape for name, (_, shape) in served.items()}, others, strict=False)
    return others, experts


def _is_experts(name: str, served: Tensors) -> bool:
    """Return whether a name is of experts that are, or may be, prepared.

    A checkpoint may have layers with unprepared experts, too, as of a draft model.
    """
    return prepared_layer(name) is not None or (name not in served and "experts" in name.split("."))


def _check_experts(stamp: Stamp, served: Tensors | None, named: Named, experts: Named, load_format: str | None) -> None:
    if load_format is not None:
        raise ServingError(
            f"load_format {load_format} writes over parameters of prepared experts", where=_WHERE, next_step=_NEXT
        )
    if served is None:
        raise ServingError(
            "tensors of experts came, but the model was not loaded from local files whose names could be compared",
            where=_WHERE,
            next_step="Start the server from a local directory, or update by update_weights_from_disk.",
        )
    names = {name for name, _ in experts}
    if len(names) < len(experts):
        twice = [name for name, count in Counter(name for name, _ in experts).items() if count > 1]
        raise ServingError("tensors of experts came twice", where=_WHERE, actual=first_of(twice), next_step=_NEXT)
    foreign = sorted(names - served.keys())
    if foreign:
        raise ServingError(
            "tensors of experts came that the served checkpoint does not have",
            where=_WHERE,
            actual=first_of(foreign),
            next_step=_NEXT,
        )
    layers = {prepared_layer(name) for name in names}
    whole = {name: stored for name, stored in served.items() if prepared_layer(name) in layers}
    missing = sorted(whole.keys() - names)
    if missing:
        raise ServingError(
            "a prepared layer came without some of its tensors",
            where=_WHERE,
            actual=f"without {first_of(missing)}",
            next_step=_NEXT,
        )
    stamps = [tensor for name, tensor in named if name == STAMP_TENSOR]
    if not stamps:
        raise ServingError("prepared tensors came without the stamp of their layout", where=_WHERE, next_step=_NEXT)
    check_same_layout(stamp, config_of_stamp_tensor(stamps[-1]), f"tensor {STAMP_TENSOR}")
    found = {name: (_DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape)) for name, tensor in experts}
    check_same_tensors(whole, found, _WHERE)


def _check_shapes(known: dict[str, tuple[int, ...]], tensors: Named, *, strict: bool) -> None:
    """Check the shapes of tensors with known names, and with ``strict`` that all names are known.

    dtypes may differ: SGLang converts.
    """
    if strict and (foreign := sorted({name for name, _ in tensors} - known.keys())):
        raise ServingError("tensors came that the model has no parameters for", where=_WHERE, actual=first_of(foreign))
    pairs = [(name, known[name], tuple(tensor.shape)) for name, tensor in tensors if name in known]
    served, found = ({pair[0]: ("", _no_scalar(pair[i])) for pair in pairs} for i in (1, 2))
    check_same_tensors(served, found, _WHERE)


def _no_scalar(shape: Any) -> tuple[int, ...]:
    """Return a shape; SGLang takes ``[]`` and ``[1]`` for the same."""
    return tuple(shape) or (1,)


def _own(updater: Any, named: Sequence[tuple[str, Any]]) -> Named:
    """Return this rank's tensors on its device."""
    from sglang.srt.model_executor.model_runner_components.weight_updater import LocalSerializedTensor
    from sglang.srt.runtime_context import get_parallel
    from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions

    monkey_patch_torch_reductions()
    device, rank = torch.get_device_module(updater.device).current_device(), get_parallel().tp_rank
    return [
        (name, (tensor.get(rank) if isinstance(tensor, LocalSerializedTensor) else tensor).to(device))
        for name, tensor in named
    ]


def _out_of_bucket(bucket: Any) -> Named:
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

    named: Named = FlattenedTensorBucket(
        flattened_tensor=bucket["flattened_tensor"], metadata=bucket["metadata"]
    ).reconstruct_tensors()
    return named


def _refused(updater: Any, message: str) -> str:
    who = "The draft model" if updater.model_config.is_draft_model else "The server"
    return f"{message.rstrip('.')}. {who} goes on with the former weights."


def _mixture(updater: Any, problem: str) -> ServingError:
    return ServingError(
        f"an update of prepared experts failed in the middle: {problem}",
        where=str(updater.model_config.model_path),
        next_step="The server ends, because it would answer from a mixture. Start it again.",
    )
