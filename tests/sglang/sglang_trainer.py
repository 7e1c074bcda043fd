"""A trainer and the server's ranks, which receive its tensors by a broadcast over gloo or in process."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from sglang_compare import failing_once
from sglang_on_cpu import load_for_updates, load_model, make_server_args, rank_of
from sglang_states import differences, snapshot

from nvfp4_prep.serving.stamp_tensor import STAMP_TENSOR, stamp_tensor

Named = dict[str, torch.Tensor]
GROUP = "trainer"
UNCHECKED = "model.layers.0.self_attn.q_norm.weight"
"""A tensor that is in no file: SGLang alone knows its shape."""


def tensors_in(directory: Path | str) -> Named:
    """The tensors that the index of a checkpoint lists."""
    folder = Path(directory)
    names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    found = {name: tensor for file in sorted(set(names.values())) for name, tensor in load_file(folder / file).items()}
    return {name: found[name] for name in names}


def sent_from(directory: Path | str) -> Named:
    """What a trainer sends of a prepared checkpoint."""
    return tensors_in(directory) | dict([stamp_tensor(directory)])


def experts_alone(named: Named) -> Named:
    return {name: tensor for name, tensor in named.items() if "routed_experts" in name or "stamp" in name}


def others_alone(named: Named) -> Named:
    return {name: tensor for name, tensor in named.items() if name not in experts_alone(named)}


def layer(named: Named, number: int) -> Named:
    return {name: tensor for name, tensor in named.items() if f"layers.{number}." in name or name == STAMP_TENSOR}


def without_scales_of_the_last_layer(named: Named) -> Named:
    return {name: tensor for name, tensor in named.items() if not (".1.mlp.experts." in name and "scale" in name)}


def without_the_last_layer(named: Named) -> Named:
    return {name: tensor for name, tensor in named.items() if ".1.mlp.experts." not in name}


SELECTIONS: dict[str, Callable[[Named], Any]] = {
    "all": dict,
    "others": others_alone,
    "torn": without_scales_of_the_last_layer,
    "a layer less": without_the_last_layer,
    "unreadable": lambda named: named | {"model.norm.weight": "no tensor"},
    "others fail": lambda named: named | {UNCHECKED: torch.zeros(3)},
    "experts fail": dict,
    "not received": lambda named: None,
}


@dataclass
class Received:
    """What became of the updates in one rank.

    Attributes:
        answers: of the updates, in order.
        changed: by each, whether the weights are others than before.
        experts_changed: the same of experts.
        differences: of the last state from the directory that was sent.
    """

    answers: list[tuple[bool, str]] = field(default_factory=list)
    changed: list[bool] = field(default_factory=list)
    experts_changed: list[bool] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)


def serve(
    rank: int, meetings: tuple[str, str], served: str, sent: str, selections: list[list[str]], port: int, **options: Any
) -> Received:
    """One rank of a server on ``served`` that is sent what each of ``selections`` takes of ``sent``.

    Args:
        selections: one list an update, one selection a rank. Without a port it comes in process, each rank's own; with
            one by a broadcast to all, in the bucket form for every second update.
        options: of the server.
    """
    with rank_of(make_server_args(Path(sent), **options), rank, meetings[0]):
        expected = snapshot(load_model(make_server_args(Path(sent), **options)))
    args, received, named = make_server_args(Path(served), **options), Received(), sent_from(sent)
    with rank_of(args, rank, meetings[1]):
        model, updater = load_for_updates(args)
        last = snapshot(model)
        if port:
            assert updater.init_weights_update_group("127.0.0.1", port, 1, 3, GROUP, backend="gloo")[0]
        for number, of_ranks in enumerate(selections):
            chosen = SELECTIONS[of_ranks[rank]](named)
            updater.begin_weight_update()
            if port:
                dtypes = [str(tensor.dtype).removeprefix("torch.") for tensor in chosen.values()]
                got = updater.receive_weights_from_distributed(
                    names=list(chosen),
                    dtypes=dtypes,
                    shapes=[list(tensor.shape) for tensor in chosen.values()],
                    group_name=GROUP,
                    load_format="flattened_bucket" if number % 2 else None,
                )
                received.answers.append(updater.load_weights_from_distributed(got))
            elif chosen is None:
                nothing = updater.receive_weights_from_distributed(
                    names=[], dtypes=[], shapes=[], group_name="nobody's"
                )
                received.answers.append(updater.load_weights_from_distributed(nothing))
            else:
                with failing_once() if of_ranks[rank] == "experts fail" else contextlib.nullcontext():
                    received.answers.append(updater.update_weights_from_tensor(list(chosen.items())))
            updater.end_weight_update(run_post_load=False)
            before, last = last, snapshot(model)
            changed = differences(before, last)
            received.changed.append(bool(changed))
            received.experts_changed.append(any("/" in name for name in changed))
        received.differences = differences(expected, last)
    return received


def update_from_disk(
    rank: int, meeting: str, served: str, directory: str, failures: int, **options: Any
) -> tuple[tuple[bool, str], list[str]]:
    """One rank of a server on ``served`` that is told to load a directory; its answer, and what is changed then.

    Args:
        directory: this rank's.
        failures: prepared tensors that it cannot read.
    """
    args = make_server_args(Path(served), **options)
    with rank_of(args, rank, meeting):
        model, updater = load_for_updates(args)
        first = snapshot(model)
        with failing_once(failures):
            answer = updater.update_weights_from_disk(directory, "auto")
        return answer, differences(first, snapshot(model))


def train(sent: str, selections: list[list[str]], port: int) -> None:
    """The trainer: rank 0 of the broadcast."""
    from sglang.srt.utils import init_custom_process_group
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

    group = init_custom_process_group(
        backend="gloo", init_method=f"tcp://127.0.0.1:{port}", world_size=3, rank=0, group_name=GROUP
    )
    for number, of_ranks in enumerate(selections):
        chosen = SELECTIONS[of_ranks[0]](sent_from(sent))
        if number % 2:
            flat = FlattenedTensorBucket(named_tensors=list(chosen.items())).get_flattened_tensor()
            torch.distributed.broadcast(flat, src=0, group=group)
            continue
        for tensor in chosen.values():
            torch.distributed.broadcast(tensor, src=0, group=group)


def serve_draft(rank: int, meeting: str, target: str, draft: str, **options: Any) -> dict[str, Any]:
    """One rank of a server with a stock target and a prepared draft model, whose updates fail in rank 1's target.

    Returns:
        What SGLang's scheduler answers to each of :data:`SCHEDULED`.
    """
    from sglang.srt.runtime_context import get_parallel

    args = make_server_args(Path(target), **options)
    with rank_of(args, rank, meeting):
        _, of_target = load_for_updates(args)
        _, of_draft = load_for_updates(args, draft=True, directory=Path(draft))
        answers = {}
        for way, update in SCHEDULED.items():
            answers[way] = update(rank, of_target, of_draft)
            torch.distributed.barrier(group=get_parallel().tp_group.cpu_group)
        return answers


def serve_draft_on_the_last_stage(
    rank: int, meeting: str, target: str, draft: str, sent: dict[str, int], **options: Any
) -> tuple[list[tuple[bool, str]], list[str]]:
    """One pipeline stage of two of a prepared target, whose draft model is on the last stage alone.

    Args:
        sent: checkpoints, of each of which one layer's experts come, in one call.

    Returns:
        What each model of this stage answers, and what is changed in them.
    """
    from sglang.srt.speculative.spec_utils import draft_pp_context

    named: Named = {}
    for directory, number in sent.items():
        named |= layer(experts_alone(sent_from(directory)), number)
    args = make_server_args(Path(target), pp_size=2, speculative_draft_model_path=draft, **options)
    with rank_of(args, rank, meeting):
        loaded = [load_for_updates(args)]
        if rank == 1:
            with draft_pp_context():
                loaded.append(load_for_updates(args, draft=True, directory=Path(draft)))
        before = [snapshot(model) for model, _ in loaded]
        answers = [updater.update_weights_from_tensor(list(named.items())) for _, updater in loaded]
        pairs = zip(before, loaded, strict=True)
        return answers, [name for first, (model, _) in pairs for name in differences(first, snapshot(model))]


def _of_both(call: Callable[[Any], tuple[bool, str]], *updaters: Any) -> Any:
    """As SGLang's scheduler: the draft model after its target, if that took the call."""
    answer = (True, "")
    for updater in updaters:
        try:
            answer = call(updater)
        except Exception as error:  # it ends the process
            return f"ends: {error}"
        if not answer[0]:
            break
    return answer


def _tensors(rank: int, target: Any, draft: Any) -> Any:
    named = [("model.norm.weight", torch.zeros(3 if rank else 256, dtype=torch.bfloat16))]
    return _of_both(lambda updater: updater.update_weights_from_tensor(named), target, draft)


def _broadcast(rank: int, target: Any, draft: Any) -> Any:
    named = [("model.norm.weight", torch.zeros(3 if rank else 256, dtype=torch.bfloat16))]
    return _of_both(lambda updater: updater.load_weights_from_distributed(named), target, draft)


def _not_received(rank: int, target: Any, draft: Any) -> Any:
    named: Any = []
    if rank:
        try:
            named = target.receive_weights_from_distributed(names=[], dtypes=[], shapes=[], group_name="nobody's")
        except Exception as error:
            return False, f"Failed to receive weights: {error}"  # as SGLang's scheduler
    return _of_both(lambda updater: updater.load_weights_from_distributed(named), target, draft)


def _disk(rank: int, target: Any, draft: Any) -> Any:
    path = "/no such directory" if rank else str(target.model_config.model_path)
    return _of_both(lambda updater: updater.update_weights_from_disk(path, "auto"), target, draft)


SCHEDULED: dict[str, Callable[[int, Any, Any], Any]] = {
    "tensors": _tensors,
    "broadcast": _broadcast,
    "not received": _not_received,
    "disk": _disk,
}
