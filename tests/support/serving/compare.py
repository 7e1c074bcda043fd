"""Loads a source checkpoint and its prepared form in one rank and compares everything that a kernel would see."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from support.serving.failures import failing
from support.serving.stand_ins import trtllm_on_cpu
from support.serving.states import differences, snapshot
from support.serving.vllm_on_cpu import load_model, make_vllm_config, rank_of, routed_experts

POISON = 0x3B
"""Byte that fills every parameter before loading, so that what never arrives is neither zero nor right by luck."""


@dataclass(frozen=True)
class Job:
    """One comparison: two directories under one configuration.

    Attributes:
        source, prepared: directories.
        world: number of processes.
        options: see ``make_vllm_config``; used for both.
        meetings: where the ranks meet, one for each load.
        input_scales: compare the input scales and what is made of them. Off where vLLM itself takes another maximum.
        prepared_load: LoadConfig fields for the prepared directory only.
        kernel: --moe-backend for the source.
        prepared_kernel: --moe-backend for the prepared directory.
        failing: how the last rank fails when it loads the prepared directory; a key of ``FAILURES``.
    """

    source: str
    prepared: str
    world: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    meetings: tuple[str, str] | None = None
    input_scales: bool = True
    prepared_load: dict[str, Any] = field(default_factory=dict)
    kernel: str = "flashinfer_cutedsl"
    prepared_kernel: str = "auto"
    failing: str = ""

    def stand_ins(self) -> contextlib.AbstractContextManager[None]:
        """What the kernel needs to be accepted on a CPU."""
        return trtllm_on_cpu() if "trtllm" in self.kernel else contextlib.nullcontext()


@dataclass
class Counts:
    """Work of one load: tensors out of the files, calls of expert weight loaders, bytes that our loader read, and
    how many parameters it exchanged with other ranks.
    """

    tensors: int = 0
    calls: int = 0
    read_nbytes: int = 0
    exchanged: int = 0


@dataclass
class Outcome:
    """Result of one job in one rank.

    Attributes:
        unsupported: vLLM's own reason not to load the SOURCE like this; nothing was compared then.
        differences: what is not bit-equal, as text.
        compared: how many tensors were compared.
        source, prepared: counts.
        layers: expert layers in this rank.
    """

    unsupported: str | None = None
    differences: list[str] = field(default_factory=list)
    compared: int = 0
    source: Counts = field(default_factory=Counts)
    prepared: Counts = field(default_factory=Counts)
    layers: int = 0


@contextlib.contextmanager
def counting(counts: Counts) -> Iterator[None]:
    """Counts tensors and expert loader calls, and poisons all parameters before they are loaded."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    from nvfp4_prep.load import ExpertLoader
    from nvfp4_prep.load.cooperative import CooperativeLoad
    from nvfp4_prep.serving.prepared_weights import PreparedWeights

    begin, finish = CooperativeLoad.begin, ExpertLoader.finish
    read, load = DefaultModelLoader.get_all_weights, DefaultModelLoader.load_weights
    original, prepared = RoutedExperts.weight_loader, PreparedWeights.loader

    def get_all_weights(self: Any, *args: Any) -> Iterator[tuple[str, torch.Tensor]]:
        for pair in read(self, *args):
            counts.tensors += 1
            yield pair

    def load_weights(self: Any, model: torch.nn.Module, *args: Any) -> None:
        for param in model.parameters():
            param.data.reshape(-1).view(torch.uint8).fill_(POISON)
        load(self, model, *args)

    def weight_loader(self: Any, *args: Any, **kwargs: Any) -> Any:
        counts.calls += 1
        return original(self, *args, **kwargs)

    def loader(self: Any, name: str) -> Any:
        inner = prepared(self, name)

        def prepared_weight_loader(*args: Any, **kwargs: Any) -> None:
            counts.calls += 1
            inner(*args, **kwargs)

        return prepared_weight_loader

    def begin_and_count(self: Any, parameters: Any, own: Any) -> None:
        counts.exchanged += len(parameters)
        begin(self, parameters, own)

    def finish_and_count(self: Any) -> Any:
        report = finish(self)
        counts.read_nbytes += report.counts.nbytes
        return report

    weight_loader.supports_moe_loading = True  # type: ignore[attr-defined]
    with (
        mock.patch.object(DefaultModelLoader, "get_all_weights", get_all_weights),
        mock.patch.object(DefaultModelLoader, "load_weights", load_weights),
        mock.patch.object(RoutedExperts, "weight_loader", weight_loader),
        mock.patch.object(PreparedWeights, "loader", loader),
        mock.patch.object(CooperativeLoad, "begin", begin_and_count),
        mock.patch.object(ExpertLoader, "finish", finish_and_count),
    ):
        yield


VLLM_REASONS = (NotImplementedError, ValueError, AssertionError, TypeError, RuntimeError, AttributeError, IndexError)
"""What vLLM raises where a model and a configuration do not go together."""


class Comparison:
    """One job in one rank, in two steps, so that ranks stay together when only one of them can load the source."""

    def __init__(self, job: Job, rank: int = 0) -> None:
        self.job = job
        self.rank = rank
        self.outcome = Outcome()
        self._expected: dict[str, Any] = {}

    def load_source(self) -> str | None:
        """Loads the source with its --moe-backend; returns vLLM's reason if it cannot."""
        job, meeting = self.job, (self.job.meetings or (None, None))[0]
        try:
            config = make_vllm_config(Path(job.source), moe_backend=job.kernel, **job.options)
            with (
                rank_of(config, self.rank, job.world, meeting),
                counting(self.outcome.source),
                job.stand_ins(),
            ):
                self._expected = snapshot(load_model(config))
        except VLLM_REASONS as error:
            return f"{type(error).__name__}: {str(error).strip()}"[:300]
        return None

    def load_prepared(self) -> Outcome:
        """Loads the prepared checkpoint, without any flag unless the job has one, and compares."""
        job, outcome, meeting = self.job, self.outcome, (self.job.meetings or (None, None))[1]
        options = {**job.options, "load": {**job.options.get("load", {}), **job.prepared_load}}
        config = make_vllm_config(Path(job.prepared), moe_backend=job.prepared_kernel, **options)
        failure = failing(job.failing if self.rank == job.world - 1 else "")
        with rank_of(config, self.rank, job.world, meeting), counting(outcome.prepared), job.stand_ins(), failure:
            model = load_model(config)
            actual = snapshot(model)
            outcome.layers = len(routed_experts(model))
        expected = self._expected
        if not job.input_scales:
            left_out = ("_input_scale", "_weight_scale_2", "_alphas", "_gscale")
            expected, actual = (
                {name: value for name, value in state.items() if not name.endswith(left_out)}
                for state in (expected, actual)
            )
        outcome.differences = differences(expected, actual)
        outcome.compared = len(expected)
        return outcome


def run(job: Job) -> Outcome:
    """One job in this process."""
    comparison = Comparison(job)
    reason = comparison.load_source()
    return Outcome(unsupported=reason) if reason else comparison.load_prepared()
