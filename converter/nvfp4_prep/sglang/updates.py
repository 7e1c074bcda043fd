"""Weight updates of a running server: all ranks take the new weights, or all hold the former ones again.

SGLang 0.5.23 forgets the former directory before it reads the new one. After a failure it "rolls back" by reading the
new one again, and what that raises ends the server, for a mistyped path as for a damaged file; what succeeds at the
second attempt is served and called a failure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from hashlib import sha256
from typing import Any

import torch
import torch.distributed as dist

from nvfp4_prep.errors import ServingError
from nvfp4_prep.load.ranks import Ranks, message_bytes, message_of
from nvfp4_prep.serving.completeness import Completeness
from nvfp4_prep.serving.cooperation import WAIT
from nvfp4_prep.serving.placement import STORED_TENSORS
from nvfp4_prep.sglang.arrivals import prepared_layers
from nvfp4_prep.sglang.layer_weights import demanding, taking
from nvfp4_prep.sglang.source_config import adopted_stamp
from nvfp4_prep.sglang.sources import serves_prepared
from nvfp4_prep_kernels import UP_SCALE_VECTOR

__all__ = ["End", "agree", "answer_alike", "begin_reading", "goes_on", "note_tensors", "update_or_restore"]

_ATTEMPT, _TENSORS_CAME, _FILTER = "nvfp4_prep_attempt", "nvfp4_prep_tensors_came", "weight_name_filter"
_TEXT_NBYTES = 2048

Update = Callable[..., tuple[bool, str]]


class End(IntEnum):
    """State of a rank's weights after an update; the greatest of all ranks counts."""

    UPDATED = 0
    UNTOUCHED = 1
    BROKEN = 2


@dataclass
class _Attempt:
    """One reading of one directory into the parameters.

    Attributes:
        began: whether parameters may have been written.
    """

    began: bool = False


def begin_reading(source: Any) -> None:
    """Note that a model's parameters are about to be written.

    Raises:
        ServingError: if an update began to read already: SGLang would read what has just failed once more.
    """
    attempt: _Attempt | None = getattr(getattr(source, "model_config", None), _ATTEMPT, None)
    if attempt is None:
        return
    if attempt.began:
        raise ServingError("the update failed and is not read again", where=str(source.model_or_path))
    attempt.began = True


def update_or_restore(original: Update, updater: Any, model_path: str, *args: Any, **kwargs: Any) -> tuple[bool, str]:
    """Update a stamped checkpoint's model on all tensor-parallel ranks, or load the former weights again on all.

    Stock checkpoints pass through; beside a prepared model their ranks answer alike.

    Returns:
        SGLang's answer: whether the update succeeded, and why not.

    Raises:
        ServingError: if the former weights cannot be loaded again: nothing may be answered from what there is now.
        LoadError: if a rank is missing.
    """
    config = updater.model_config
    if adopted_stamp(config.hf_config) is None:
        update = partial(original, updater, model_path, *args, **kwargs)
        return update() if kwargs.get(_FILTER) is not None else answer_alike(update)
    if kwargs.get(_FILTER) is not None:
        return _reload_layers(original, updater, *args, **kwargs)
    former = config.model_path
    end, message = _attempt(original, updater, model_path, *args, **kwargs)
    worst, message = agree(end, message)
    if worst is End.UPDATED:
        setattr(config, _TENSORS_CAME, False)
        return True, message
    if end is End.UNTOUCHED:
        config.model_path = former
        restored, problem = End.UPDATED, ""
    elif _stages() > 1:
        restored, problem = End.BROKEN, "other pipeline stages may hold the new weights"
    elif getattr(config, _TENSORS_CAME, False):
        restored, problem = End.BROKEN, "some of them came as tensors and are in no file"
    else:
        restored, problem = _attempt(original, updater, former, *args, **kwargs)
    restored, problem = agree(restored, problem)
    if restored is not End.UPDATED:
        raise ServingError(
            f"an update of the weights failed ({message}), and the former ones cannot be loaded again: {problem}",
            where=str(former),
            next_step="The server ends, because it would answer from a mixture. Start it again.",
        )
    again = ", which were loaded again" if worst is End.BROKEN else ""
    return False, goes_on(updater, message, again)


def goes_on(updater: Any, message: str, again: str = "") -> str:
    """Return the answer to an update that leaves a model as it was."""
    who = "The draft model" if updater.model_config.is_draft_model else "The server"
    return f"{message.rstrip('.')}. {who} goes on with the former weights{again}."


def answer_alike(update: Callable[[], tuple[bool, str]]) -> tuple[bool, str]:
    """Update a stock checkpoint's model; beside a prepared model all tensor-parallel ranks give the same answer.

    SGLang gives a call to a draft model where its target took it. The ranks of a prepared draft model would wait for
    one whose stock target did not.

    Raises:
        LoadError: if a rank is missing.
        Exception: what SGLang raises on this rank, as it does without this package.
    """
    if not serves_prepared():
        return update()
    cause: Exception | None = None
    try:
        success, message = update()
    except Exception as error:
        success, message, cause = False, f"{type(error).__name__}: {error}", error
    end, message = agree(End.UPDATED if success else End.BROKEN, message)
    if cause is not None:
        raise cause
    return end is End.UPDATED, message


def note_tensors(model_config: Any) -> None:
    """Note that the model's directory no longer holds all of the weights that are served."""
    setattr(model_config, _TENSORS_CAME, True)


def _reload_layers(original: Update, updater: Any, *args: Any, **kwargs: Any) -> tuple[bool, str]:
    """Load whole layers again where SGLang asks for some of their experts, which a rank that failed took along.

    A prepared tensor holds all experts of its layer, and each slot takes the one that SGLang's map now gives it.

    Raises:
        ServingError: if the served weights are in no directory.
    """
    config, asked = updater.model_config, kwargs.pop(_FILTER)
    if getattr(config, _TENSORS_CAME, False):
        raise ServingError(
            "experts are to be loaded again, but some of the served weights came as tensors and are in no file",
            where=str(config.model_path),
            next_step="Start the server again.",
        )
    layers = prepared_layers(updater.get_model())
    experts = max((layer.nvfp4_prep.placement.dims.experts for layer in layers), default=0)

    def asked_of_layer(name: str) -> bool:
        layer, _, tensor = name.rpartition(".")
        if not layer.endswith(".experts") or tensor not in (*STORED_TENSORS, UP_SCALE_VECTOR):
            return bool(asked(name))
        return any(asked(f"{layer}.{expert}.{tensor}") for expert in range(experts))

    with taking(layers), demanding(Completeness.ALL_OR_NONE):
        return original(updater, config.model_path, *args, **{**kwargs, _FILTER: asked_of_layer})


def _attempt(original: Update, updater: Any, path: str, *args: Any, **kwargs: Any) -> tuple[End, str]:
    layers = prepared_layers(updater.get_model())
    for layer in layers:
        layer.nvfp4_prep.forget()
    attempt = _Attempt()
    setattr(updater.model_config, _ATTEMPT, attempt)
    try:
        with taking(layers):
            success, message = original(updater, path, *args, **kwargs)
    except Exception as error:
        cause = error.__context__  # of what SGLang raises in its own second attempt
        return End.BROKEN if attempt.began or cause else End.UNTOUCHED, f"{cause or error}"
    finally:
        delattr(updater.model_config, _ATTEMPT)
    if success:
        return End.UPDATED, message
    return End.BROKEN if attempt.began else End.UNTOUCHED, message


def agree(end: End, message: str, same: str = "") -> tuple[End, str]:
    """Return the worst end of all tensor-parallel ranks, and the message of the first of those.

    Args:
        end, message: of this rank.
        same: a text that ranks must have in common; where one has another, and none has failed, all are untouched.

    Raises:
        LoadError: if a rank is missing.
    """
    from sglang.srt.runtime_context import get_parallel

    group = getattr(getattr(get_parallel(), "tp_group", None), "cpu_group", None)
    if not isinstance(group, dist.ProcessGroup) or group.size() == 1:
        return end, message
    ranks = Ranks(group, torch.device("cpu"), WAIT)
    digest = sha256(same.encode(errors="backslashreplace")).digest()
    answers = ranks.gather(bytes([end]) + digest + message_bytes(message, _TEXT_NBYTES))
    worst = End(max(answer[0] for answer in answers))
    rank = next(rank for rank, answer in enumerate(answers) if answer[0] == worst)
    text = message_of(answers[rank][1 + len(digest) :])
    if worst is not End.UPDATED:
        return worst, f"Rank {rank} of {ranks.size}: {text}"
    digests = [answer[1 : 1 + len(digest)] for answer in answers]
    other = next((rank for rank, found in enumerate(digests) if found != digests[0]), None)
    if other is not None:
        return End.UNTOUCHED, f"Rank {other} of {ranks.size} got other prepared tensors than rank 0"
    return worst, text


def _stages() -> int:
    from sglang.srt.runtime_context import get_parallel

    return int(get_parallel().pp_size)
