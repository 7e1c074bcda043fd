"""Tensors that reach a running model without files: a trainer's, in process or broadcast.

SGLang 0.5.23 hands them to the model as they are: names that the model does not know are passed over in silence, an
original expert's tensor fails when others were written, and another layout's bytes fit. Here the tensor-parallel ranks
go through a call together, in three steps, and none takes the next before all have ended the last: they check it as a
whole (:mod:`nvfp4_prep.sglang.tensor_checks`), they load what is not of experts, which SGLang may fail with, and they
write the experts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nvfp4_prep.errors import NvfpPrepError, ServingError
from nvfp4_prep.sglang.arrivals import prepared_layers, tagged
from nvfp4_prep.sglang.layer_weights import taking
from nvfp4_prep.sglang.source_config import adopted_stamp
from nvfp4_prep.sglang.sources import serves_prepared
from nvfp4_prep.sglang.tensor_checks import NEXT, WHERE, Checked, Named, check_has_data, check_tensors
from nvfp4_prep.sglang.updates import End, agree, answer_alike, goes_on, note_tensors

__all__ = ["NotReceived", "load_broadcast", "load_tensors", "receive_broadcast", "refuse_ipc"]

logger = logging.getLogger(__name__)

Answer = tuple[bool, str]
_OTHERS_FAILED = (
    "No prepared experts were written. Of the other tensors some may be: send them all again, or update the whole model"
    " by update_weights_from_disk."
)


@dataclass(frozen=True)
class NotReceived:
    """The reason why a rank received nothing, in the place of the tensors."""

    reason: str


def load_tensors(original: Callable[..., Answer], updater: Any, named: Any, load_format: str | None) -> Answer:
    """Load what came in process (``update_weights_from_tensor``).

    Stock checkpoints pass through; beside a prepared model their ranks answer alike.

    Raises:
        ServingError, LoadError: as :func:`_load`.
    """
    if adopted_stamp(updater.model_config.hf_config) is None:
        return answer_alike(lambda: original(updater, named, load_format))
    if load_format == "flattened_bucket":
        return _load(lambda tensors: original(updater, tensors, None), updater, lambda: _out_of_bucket(named), None)
    return _load(
        lambda tensors: original(updater, tensors, load_format), updater, lambda: _own(updater, named), load_format
    )


def receive_broadcast(original: Callable[..., Any], updater: Any, *args: Any, **kwargs: Any) -> Any:
    """Receive a broadcast; where that fails, keep the reason for :func:`load_broadcast`.

    SGLang answers on such a rank at once. The others would wait for it.
    """
    if not serves_prepared():
        return original(updater, *args, **kwargs)
    try:
        return original(updater, *args, **kwargs)
    except Exception as error:
        logger.exception("A broadcast of weights was not received.")
        return NotReceived(f"Failed to receive weights: {error}")  # SGLang's words


def load_broadcast(
    original: Callable[..., Answer], updater: Any, named: Iterable[tuple[str, torch.Tensor]] | NotReceived
) -> Answer:
    """Load what was broadcast (``update_weights_from_distributed``).

    Stock checkpoints pass through; beside a prepared model their ranks answer alike.

    Raises:
        ServingError, LoadError: as :func:`_load`.
    """
    if adopted_stamp(updater.model_config.hf_config) is None:
        return answer_alike(
            lambda: (False, named.reason) if isinstance(named, NotReceived) else original(updater, named)
        )
    return _load(lambda tensors: original(updater, tensors), updater, lambda: _received(named), None)


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
    return False, goes_on(updater, str(error))


def _load(
    load: Callable[[Named], Answer], updater: Any, unpack: Callable[[], Named], load_format: str | None
) -> Answer:
    """Load the tensors of one call; all tensor-parallel ranks give the same answer.

    Args:
        load: SGLang's own.
        unpack: returns the tensors; whatever it raises on one rank is an answer on all.

    Raises:
        ServingError: if prepared experts were loaded in part. The server ends with it.
        LoadError: if a rank is missing.
    """
    end, message, checked = End.UPDATED, "", Checked([], [], frozenset())
    try:
        checked = check_tensors(updater, unpack(), load_format)
    except Exception as error:
        end, message = End.UNTOUCHED, _words(error)
    end, message = agree(end, message, checked.names)
    if end is not End.UPDATED:
        return False, goes_on(updater, message)
    note_tensors(updater.model_config)
    if checked.others or not checked.experts:
        end, message = _load_others(load, checked.others)
    end, message = agree(end, message)
    if end is not End.UPDATED:
        return False, f"{message.rstrip('.')}. {_OTHERS_FAILED}"
    return _load_experts(load, updater, checked) if checked.experts else (True, message)


def _load_others(load: Callable[[Named], Answer], others: Named) -> tuple[End, str]:
    """Load what is not of experts; SGLang answers or raises in the middle of them."""
    try:
        success, message = load(others)
    except Exception as error:
        logger.exception("SGLang could not load the tensors of an update that are not of prepared experts.")
        success, message = False, f"{type(error).__name__}: {error}"
    return End.UPDATED if success else End.BROKEN, message


def _load_experts(load: Callable[[Named], Answer], updater: Any, checked: Checked) -> Answer:
    cause: Exception | None = None
    try:
        end, message = _write_experts(load, updater, checked)
    except Exception as error:
        end, message, cause = End.BROKEN, str(error), error
    end, message = agree(end, message)
    if end is not End.UPDATED:
        raise ServingError(
            f"an update of prepared experts failed in the middle: {message}",
            where=str(updater.model_config.model_path),
            next_step="The server ends, because it would answer from a mixture. Start it again.",
        ) from cause
    return True, message


def _write_experts(load: Callable[[Named], Answer], updater: Any, checked: Checked) -> tuple[End, str]:
    from sglang.srt.model_loader.loader import device_loading_context

    layers, device = prepared_layers(updater.get_model()), torch.device(updater.device)
    with taking(layers):
        success, message = load([tagged(name, tensor) for name, tensor in checked.experts])
        if not success:
            return End.BROKEN, message
        arrived = [layer for layer in layers if layer.nvfp4_prep.arrived]
        for layer in arrived:
            with device_loading_context(layer, device):
                layer.quant_method.process_weights_after_loading(layer)
    untaken = checked.expected - {stored for layer in arrived for stored in layer.nvfp4_prep.stored_layers}
    if untaken:
        return End.BROKEN, f"SGLang's model class passed over {', '.join(sorted(untaken))}"
    return End.UPDATED, message


def _own(updater: Any, named: Sequence[tuple[str, Any]]) -> Named:
    """Return this rank's tensors on its device."""
    from sglang.srt.model_executor.model_runner_components.weight_updater import LocalSerializedTensor
    from sglang.srt.runtime_context import get_parallel
    from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions

    monkey_patch_torch_reductions()
    device, rank = torch.get_device_module(updater.device).current_device(), get_parallel().tp_rank
    own = [(name, t.get(rank) if isinstance(t, LocalSerializedTensor) else t) for name, t in named]
    for name, tensor in own:
        check_has_data(name, tensor)
    return [(name, tensor.to(device)) for name, tensor in own]


def _out_of_bucket(bucket: Any) -> Named:
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

    flat = bucket["flattened_tensor"]
    check_has_data("flattened_tensor", flat)
    named: Named = FlattenedTensorBucket(flattened_tensor=flat, metadata=bucket["metadata"]).reconstruct_tensors()
    return named


def _received(named: Iterable[tuple[str, torch.Tensor]] | NotReceived) -> Named:
    if isinstance(named, NotReceived):
        raise ServingError(named.reason)
    return list(named)


def _words(error: Exception) -> str:
    """Return the message of an error before a parameter was touched."""
    if not isinstance(error, NvfpPrepError):
        error = ServingError(
            f"an update cannot be unpacked or checked ({type(error).__name__}: {error})", where=WHERE, next_step=NEXT
        )
    return str(error)
