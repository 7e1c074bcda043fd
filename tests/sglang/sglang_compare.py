"""Loads a source checkpoint and its prepared form in one rank and compares everything that a kernel would see."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from sglang_on_cpu import load_for_updates, load_model, make_server_args, rank_of
from sglang_states import differences, expert_layers, snapshot

from support.serving.failures import failing

POISON = 0x3B
"""Byte that fills every parameter before loading, so that what never arrives is neither zero nor right by luck."""
RAW_SCALES = ("/w13_input_scale", "/w2_input_scale")
"""SGLang keeps one an expert and takes the maximum; a prepared checkpoint has the maximum."""
RAW_COMPRESSED = (*RAW_SCALES, "_global_scale", "/w13_weight_scale_2", "/w2_weight_scale_2")
"""SGLang keeps the reciprocals of the source beside what it derives from them; a prepared file has multipliers."""
UNPADDED = ("/w13_weight_scale",)
"""Where SGLang's CuteDSL path pads experts without gate, its raw scales stay as they are beside those that are read."""
UNREAD = ("/g2_alphas", "/w2_input_scale_quant")
"""CuteDSL's standard kernel gets kernel.w2_alpha and kernel.fc2_input_scale instead, made from the maximum."""


@dataclass(frozen=True)
class Job:
    """One comparison: two directories under one configuration.

    Attributes:
        source, prepared: directories.
        backend: ``--moe-runner-backend`` for the source.
        asked: the same for the prepared checkpoint.
        options: ServerArgs fields for both.
        meetings: where the ranks meet, one for each load.
        left_out: endings of names that are not compared.
        load: LoadConfig fields for the prepared checkpoint.
        draft: whether the checkpoint's draft model is loaded in the place of its target.
        failing: how rank 1 fails when it loads the prepared checkpoint; a key of ``FAILURES``.
        update: a directory from which the weights are updated afterwards, while rank 1 fails once.
    """

    source: str
    prepared: str
    backend: str
    asked: str = "auto"
    options: dict[str, Any] = field(default_factory=dict)
    meetings: tuple[str, str] | None = None
    left_out: tuple[str, ...] = ()
    load: dict[str, Any] = field(default_factory=dict)
    draft: bool = False
    failing: str = ""
    update: str = ""


@dataclass
class Counts:
    """Work of one load: tensors out of the files, calls of expert weight loaders, bytes of experts by the rank-exact
    loader, bytes that it read for them, how many parameters it exchanged with other ranks, and bytes of whole tensors
    that are not experts.
    """

    tensors: int = 0
    calls: int = 0
    nbytes: int = 0
    read_nbytes: int = 0
    exchanged: int = 0
    whole_nbytes: int = 0


@dataclass
class Outcome:
    """Result of one job in one rank.

    Attributes:
        unsupported: SGLang's own reason not to load the SOURCE like this; nothing was compared then.
        differences: what is not bit-equal.
        compared: how many values were compared.
        layers: expert layers in this rank.
        answer: of the update.
    """

    unsupported: str | None = None
    differences: list[str] = field(default_factory=list)
    compared: int = 0
    source: Counts = field(default_factory=Counts)
    prepared: Counts = field(default_factory=Counts)
    layers: int = 0
    answer: tuple[bool, str] | None = None


@contextlib.contextmanager
def counting(counts: Counts) -> Iterator[None]:
    """Count tensors and expert loader calls, and poison all parameters before they are loaded."""
    from sglang.srt.layers.moe.fused_moe_triton import FusedMoE
    from sglang.srt.model_loader.loader import DefaultModelLoader

    from nvfp4_prep.load import ExpertLoader
    from nvfp4_prep.load.cooperative import CooperativeLoad
    from nvfp4_prep.serving.prepared_weights import PreparedWeights

    begin, finish, submit_whole = CooperativeLoad.begin, ExpertLoader.finish, ExpertLoader.submit_whole
    load, original, prepared = DefaultModelLoader.load_weights_only, FusedMoE.weight_loader, PreparedWeights.loader

    def load_weights_only(model: torch.nn.Module, weights: Any, target_device: Any) -> None:
        for name, param in model.named_parameters():
            if "input_scale" not in name:  # SGLang fills these with 1
                param.data.reshape(-1).view(torch.uint8).fill_(POISON)

        def counted() -> Iterator[Any]:
            for pair in weights:
                counts.tensors += 1
                yield pair

        load(model, counted(), target_device)

    def weight_loader(self: Any, *args: Any, **kwargs: Any) -> Any:
        counts.calls += 1
        return original(self, *args, **kwargs)

    def loader(self: Any, name: str) -> Any:
        inner = prepared(self, name)

        def prepared_weight_loader(*args: Any, **kwargs: Any) -> None:
            counts.calls += 1
            inner(*args, **kwargs)

        return prepared_weight_loader

    def finish_and_count(self: Any) -> Any:
        report = finish(self)
        counts.nbytes += report.nbytes
        counts.read_nbytes += report.counts.nbytes
        return report

    def submit_whole_and_count(self: Any, path: Path, record: Any, target: torch.Tensor) -> Any:
        counts.whole_nbytes += record.nbytes
        return submit_whole(self, path, record, target)

    def begin_and_count(self: Any, parameters: Any, own: Any) -> None:
        counts.exchanged += len(parameters)
        begin(self, parameters, own)

    with (
        mock.patch.object(ExpertLoader, "finish", finish_and_count),
        mock.patch.object(ExpertLoader, "submit_whole", submit_whole_and_count),
        mock.patch.object(CooperativeLoad, "begin", begin_and_count),
        mock.patch.object(DefaultModelLoader, "load_weights_only", staticmethod(load_weights_only)),
        mock.patch.object(FusedMoE, "weight_loader", weight_loader),
        mock.patch.object(PreparedWeights, "loader", loader),
    ):
        yield
    counts.nbytes -= counts.whole_nbytes
    counts.read_nbytes -= counts.whole_nbytes


@contextlib.contextmanager
def failing_once(times: int = 1) -> Iterator[None]:
    """While it is entered, the fourth prepared tensor that is loaded cannot be read, nor those that come next."""
    from nvfp4_prep.sglang.layer_weights import LayerWeights

    fill, calls = LayerWeights.fill, [0]

    def fail_or_fill(self: Any, *args: Any) -> None:
        calls[0] += 1
        if 4 <= calls[0] < 4 + times:
            raise OSError(5, "Input/output error")
        fill(self, *args)

    with mock.patch.object(LayerWeights, "fill", fail_or_fill):
        yield


SGLANG_REASONS = (NotImplementedError, ValueError, AssertionError, TypeError, RuntimeError, AttributeError, IndexError)
"""What SGLang raises where a model and a configuration do not go together."""


def source_method(source: Path) -> str:
    """The ``--quantization`` that SGLang wants for some models, whose architectures it does not look into."""
    config = json.loads((source / "config.json").read_text()).get("quantization_config", {})
    if config.get("quant_method") == "compressed-tensors":
        return "compressed-tensors"
    return "modelopt_mixed" if config.get("quant_algo") == "MIXED_PRECISION" else "modelopt_fp4"


class Comparison:
    """One job in one rank, in two steps, so that ranks stay together when only one of them can load the source."""

    def __init__(self, job: Job, rank: int = 0) -> None:
        self.job = job
        self.rank = rank
        self.outcome = Outcome()
        self._expected: dict[str, Any] = {}

    def load_source(self) -> str | None:
        """Load the source with the backend; return SGLang's reason if it cannot."""
        job, meeting = self.job, (self.job.meetings or (None, None))[0]
        try:
            asked = {"moe_runner_backend": job.backend, "quantization": source_method(Path(job.source))}
            args = make_server_args(Path(job.source), **asked, **job.options)
            with rank_of(args, self.rank, meeting), counting(self.outcome.source):
                self._expected = snapshot(load_model(args, draft=job.draft))
        except SGLANG_REASONS as error:
            return f"{type(error).__name__}: {str(error).strip()}"[:300]
        return None

    def load_prepared(self) -> Outcome:
        """Load the prepared checkpoint and compare."""
        job, outcome, meeting = self.job, self.outcome, (self.job.meetings or (None, None))[1]
        args = make_server_args(Path(job.prepared), moe_runner_backend=job.asked, **job.options)
        failure = failing(job.failing if self.rank == 1 else "")
        with rank_of(args, self.rank, meeting), counting(outcome.prepared), failure:
            model, updater = load_for_updates(args, draft=job.draft, **job.load)
            if job.update:
                with failing_once() if self.rank == 1 else contextlib.nullcontext():
                    outcome.answer = updater.update_weights_from_disk(job.update, "auto")
            actual = snapshot(model)
            outcome.layers = len(expert_layers(model))
        expected, actual = (
            {name: value for name, value in state.items() if not name.endswith(job.left_out or ("\0",))}
            for state in (self._expected, actual)
        )
        outcome.differences = differences(expected, actual)
        outcome.compared = len(expected)
        return outcome


def run(job: Job) -> Outcome:
    """One job in this process."""
    comparison = Comparison(job)
    reason = comparison.load_source()
    return Outcome(unsupported=reason) if reason else comparison.load_prepared()
