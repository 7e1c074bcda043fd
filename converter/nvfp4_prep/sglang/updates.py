"""Weight updates of a running server: all ranks take the new weights, or all hold the former ones again.

SGLang 0.5.23 forgets the former directory before it reads the new one. After a failure it "rolls back" by reading the
new one again, and what that raises ends the server, for a mistyped path as for a damaged file; what succeeds at the
second attempt is served and called a failure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist

from nvfp4_prep.errors import ServingError
from nvfp4_prep.load.ranks import Ranks
from nvfp4_prep.serving.cooperation import WAIT
from nvfp4_prep.sglang.source_config import adopted_stamp

__all__ = ["begin_reading", "update_or_restore"]

_ATTEMPT, _FILTER = "nvfp4_prep_attempt", "weight_name_filter"
_TEXT_NBYTES = 2048

Update = Callable[..., tuple[bool, str]]


class _End(IntEnum):
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

    Stock checkpoints, and SGLang's own reload of single experts, pass through.

    Returns:
        SGLang's answer: whether the update succeeded, and why not.

    Raises:
        ServingError: if the former weights cannot be loaded again: nothing may be answered from what there is now.
        LoadError: if a rank is missing.
    """
    config = updater.model_config
    if adopted_stamp(config.hf_config) is None or kwargs.get(_FILTER) is not None:
        return original(updater, model_path, *args, **kwargs)
    former = config.model_path
    end, message = _attempt(original, updater, model_path, *args, **kwargs)
    worst, message = _agree(end, message)
    if worst is _End.UPDATED:
        return True, message
    if end is _End.UNTOUCHED:
        config.model_path = former
        restored, problem = _End.UPDATED, ""
    elif _stages() > 1:
        restored, problem = _End.BROKEN, "other pipeline stages may hold the new weights"
    else:
        restored, problem = _attempt(original, updater, former, *args, **kwargs)
    restored, problem = _agree(restored, problem)
    if restored is not _End.UPDATED:
        raise ServingError(
            f"an update of the weights failed ({message}), and the former ones cannot be loaded again: {problem}",
            where=str(former),
            next_step="The server ends, because it would answer from a mixture. Start it again.",
        )
    again = ", which were loaded again" if worst is _End.BROKEN else ""
    return False, f"{message.rstrip('.')}. The server goes on with the former weights{again}."


def _attempt(original: Update, updater: Any, path: str, *args: Any, **kwargs: Any) -> tuple[_End, str]:
    for module in updater.get_model().modules():
        if hasattr(module, "nvfp4_prep"):
            module.nvfp4_prep.forget()
    attempt = _Attempt()
    setattr(updater.model_config, _ATTEMPT, attempt)
    try:
        success, message = original(updater, path, *args, **kwargs)
    except Exception as error:
        cause = error.__context__  # of what SGLang raises in its own second attempt
        return _End.BROKEN if attempt.began or cause else _End.UNTOUCHED, f"{cause or error}"
    finally:
        delattr(updater.model_config, _ATTEMPT)
    if success:
        return _End.UPDATED, message
    return _End.BROKEN if attempt.began else _End.UNTOUCHED, message


def _agree(end: _End, message: str) -> tuple[_End, str]:
    """Return the worst end of all tensor-parallel ranks, and the message of the first of those."""
    from sglang.srt.runtime_context import get_parallel

    group = getattr(getattr(get_parallel(), "tp_group", None), "cpu_group", None)
    if not isinstance(group, dist.ProcessGroup) or group.size() == 1:
        return end, message
    ranks = Ranks(group, torch.device("cpu"), WAIT)
    packed = bytes([end]) + message.encode()[: _TEXT_NBYTES - 1]
    answers = ranks.gather(packed.ljust(_TEXT_NBYTES, b"\0"))
    worst = max(answer[0] for answer in answers)
    rank = next(rank for rank, answer in enumerate(answers) if answer[0] == worst)
    text = answers[rank][1:].rstrip(b"\0").decode(errors="replace")
    return _End(worst), text if worst == _End.UPDATED else f"Rank {rank} of {ranks.size}: {text}"


def _stages() -> int:
    from sglang.srt.runtime_context import get_parallel

    return int(get_parallel().pp_size)
