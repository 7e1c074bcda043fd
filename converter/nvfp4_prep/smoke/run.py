"""The smoke run over a prepared checkpoint."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from nvfp4_prep._util.arguments import (
    CALLABLE,
    COUNT,
    PATH,
    SOURCE,
    TEXT,
    checked,
    either,
    instance,
    integer,
    one_of,
    optional,
    sequence,
)
from nvfp4_prep._util.torch_threads import one_torch_thread
from nvfp4_prep.checkpoint.source import Source
from nvfp4_prep.errors import UsageError
from nvfp4_prep.hub import opened_source
from nvfp4_prep.output.layer_selection import LayerSelection
from nvfp4_prep.prepared.checkpoint import PreparedCheckpoint
from nvfp4_prep.prepared.manifest import LayerRecord, Manifest
from nvfp4_prep.smoke.backend_names import BACKENDS
from nvfp4_prep.smoke.backends import ChosenBackend, choose_backend
from nvfp4_prep.smoke.inputs import CheckpointReader
from nvfp4_prep.smoke.layer import SmokeSettings, run_layer
from nvfp4_prep.smoke.read_ahead import ReadAhead
from nvfp4_prep.smoke.report import LayerReport, SmokeReport

__all__ = ["CPU_SAMPLE", "LAYER_NUMBERS", "check_layers", "check_smoke", "choose_layers", "run_smoke", "spread"]

LAYER_NUMBERS = sequence(integer(0), "numbers of layers")
CPU_SAMPLE = 8
"""Experts of each layer that are run without a GPU, unless told otherwise: each takes seconds on a CPU."""


@checked(
    prepared=either(PATH, instance(PreparedCheckpoint)),
    source=optional(SOURCE),
    layers=optional(either(LAYER_NUMBERS, TEXT)),
    sample=optional(either(COUNT, sequence(COUNT, "sizes of samples"))),
    backend=one_of(*BACKENDS),
    settings=optional(instance(SmokeSettings)),
    on_layer=optional(CALLABLE),
)
def run_smoke(
    prepared: str | Path | PreparedCheckpoint,
    source: str | Path | Source | None = None,
    *,
    layers: Sequence[int] | str | None = None,
    sample: int | Sequence[int] | None = None,
    backend: str = "auto",
    settings: SmokeSettings | None = None,
    on_layer: Callable[[LayerReport, int, int], None] | None = None,
) -> SmokeReport:
    """Run random tokens through prepared layers and compare with the source.

    Args:
        prepared: a prepared checkpoint; one that is given opened is closed.
        source: what it was made from. Without it the reference is computed from the inverted prepared tensors,
            which the report says; that still proves the kernel's view of the bytes, but not that they came from
            the source.
        layers: numbers of the layers to run, or a text of them (``1,4-6``, ``2/8``); all by default.
        sample: experts of each layer, evenly spread; by default all on a GPU and 8 on a CPU. Of several sizes, the
            experts of every one.
        backend: ``auto``, ``flashinfer``, ``triton`` or ``torch``.
        settings: numbers of tokens.
        on_layer: told of each finished layer, with its number and how many there are.

    Raises:
        CheckpointError, SourceError: if ``prepared`` is not a complete prepared checkpoint, or a file cannot be read.
        UsageError: if a layer does not exist or the backend cannot run here.
    """
    reports = []
    with contextlib.ExitStack() as held:
        held.enter_context(one_torch_thread())
        opening = prepared if isinstance(prepared, PreparedCheckpoint) else PreparedCheckpoint.open(prepared)
        checkpoint = held.enter_context(opening)
        records = choose_layers(checkpoint.manifest, layers)
        chosen = choose_backend(backend, {record.layout for record in records})
        opened = None
        if source is not None:
            opened = held.enter_context(opened_source(source, by_ranges=True, leave_open=True))
        reader = CheckpointReader(checkpoint, opened, chosen.device, held.enter_context(ReadAhead()))
        if sample is None and chosen.device.type == "cpu":
            sample = CPU_SAMPLE
        sizes = (sample,) if sample is None or isinstance(sample, int) else tuple(sample)
        for number, record in enumerate(records, 1):
            report = _run_one(reader, record, chosen, sizes, settings)
            reports.append(report)
            if on_layer is not None:
                on_layer(report, number, len(records))
    return SmokeReport(
        checkpoint=checkpoint.manifest.source,
        reference="restored" if source is None else "source",
        backend=chosen.facts,
        layers_total=len(checkpoint.manifest.layers),
        layers=tuple(reports),
    )


@checked(prepared=PATH, layers=optional(TEXT), backend=one_of(*BACKENDS))
def check_smoke(prepared: str | Path, *, layers: str | None = None, backend: str = "auto") -> None:
    """Raise what :func:`run_smoke` would raise for its arguments, before any long work; reads the manifest only."""
    with PreparedCheckpoint.open(prepared) as opened:
        choose_backend(backend, {record.layout for record in choose_layers(opened.manifest, layers)})


def choose_layers(manifest: Manifest, layers: Sequence[int] | str | None) -> list[LayerRecord]:
    """Return the layers with these numbers, by default all; raise :class:`UsageError` if one does not exist."""
    if layers is None:
        return list(manifest.layers)
    there = {record.index for record in manifest.layers}
    if isinstance(layers, str):
        layers = LayerSelection.parse(layers).choose_present(there)
    check_layers(layers, there)
    return [record for record in manifest.layers if record.index in set(layers)]


def check_layers(wanted: Iterable[int], there: Collection[int]) -> None:
    """Raise :class:`UsageError` for the number of a layer that does not exist."""
    missing = sorted(set(wanted) - set(there))
    if missing:
        raise UsageError(
            f"no prepared layer {', '.join(map(str, missing))}",
            expected=f"layers among {min(there)} to {max(there)}" if there else "a checkpoint with prepared layers",
        )


def spread(experts: int, sample: int | None) -> list[int]:
    """Return ``sample`` experts, evenly spread, first and last among them; all without or where there are not more."""
    if sample is not None and sample < 1:
        raise UsageError("an empty sample proves nothing", expected="--sample of at least 1", actual=sample)
    if sample is None or sample >= experts:
        return list(range(experts))
    if sample == 1:
        return [0]
    return sorted({round(i * (experts - 1) / (sample - 1)) for i in range(sample)})


def _run_one(
    reader: CheckpointReader,
    record: LayerRecord,
    chosen: ChosenBackend,
    sizes: Sequence[int | None],
    settings: SmokeSettings | None,
) -> LayerReport:
    on_gpu = chosen.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    experts = {expert for size in sizes for expert in spread(record.dims.experts, size)}
    layer = reader.layer(record, sorted(experts))
    report = run_layer(layer, chosen.backend, settings)
    if on_gpu:
        torch.cuda.synchronize()
    return replace(
        report,
        seconds=time.perf_counter() - begin,
        peak_nbytes=torch.cuda.max_memory_allocated() if on_gpu else 0,
    )
