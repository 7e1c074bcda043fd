"""From a plan and its jobs' results to the manifest's records."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from nvfp4_prep._version import __version__
from nvfp4_prep.checkpoint.filenames import FileKind
from nvfp4_prep.checkpoint.tensors import TensorRecord
from nvfp4_prep.moe.layers import MoeLayer
from nvfp4_prep.moe.policy_errors import PolicyErrors
from nvfp4_prep.output.experts_fact import ExpertsFact, ReconciledExpert
from nvfp4_prep.pipeline.jobs import JobResult
from nvfp4_prep.planning.plan import LayerPlan, OutputFile, Plan
from nvfp4_prep.prepared.manifest import FileRecord, GateUpRecord, LayerRecord, Manifest
from nvfp4_prep.prepared.manifest_values import SIDE
from nvfp4_prep.prepared.stamp import quantization_configs
from nvfp4_prep_kernels import PreparedTensor

__all__ = ["draft_manifest", "gate_up_record", "layer_record", "make_index", "reconciled_sides"]


def draft_manifest(made: Plan, results: Mapping[str, JobResult]) -> Manifest:
    """Return the manifest of a conversion, without the files that are made at its end.

    Args:
        made: the whole plan.
        results: of all its files, by name.
    """
    kinds = {file.name: file.kind.value for file in made.files}
    rescaled = any(plan.reconciled for plan in made.layers)
    return Manifest(
        tool_version=__version__,
        options=made.options,
        source=made.source_label,
        revision=made.source_revision,
        texts=made.index.texts,
        quantization=quantization_configs(made.index.config, made.index.hf_quant_config),
        layers=tuple(layer_record(made, position, results) for position in range(len(made.layers))),
        passed={finding.experts_path: finding.reason for finding in made.others},
        files={
            name: FileRecord(result.nbytes, result.sha256 or "", kinds.get(name, SIDE))
            for name, result in sorted(results.items())
        },
        verified=(
            {
                "check": "inverse transform while converting",
                "result": "every prepared byte turned back into the source's byte before it was written"
                + (", rescaled block scales into the rescaled ones" if rescaled else ""),
                "experts": sum(plan.dims.experts for plan in made.layers),
                "nbytes": sum(plan.prepared_nbytes for plan in made.layers),
            },
        ),
    )


def layer_record(made: Plan, position: int, results: Mapping[str, JobResult]) -> LayerRecord:
    """Return the manifest's record of a layer.

    Args:
        made: the plan.
        position: of the layer in it.
        results: finished jobs by file name; the layer's files must be there.
    """
    plan = made.layers[position]
    files = _layer_files(made, position)
    facts = _facts(made, position, results)
    crc32: dict[str, list[int]] = {tensor.value: [] for tensor in PreparedTensor}
    for fact in facts:
        crc32[fact.tensor.value] += fact.crc32
    digests = {key: digest for file in files for key, digest in results[file.name].digests.items()}
    digests |= {key: hashlib.sha256(raw).hexdigest() for key, raw in plan.scalars.raw.items()}
    return LayerRecord(
        source=_without_records(plan),
        layout=plan.layout,
        activation=plan.activation,
        files=tuple(file.name for file in files),
        gate_up=_gate_up_of_facts(plan, facts),
        source_sha256=digests,
        expert_crc32={name: tuple(values) for name, values in crc32.items()},
    )


def reconciled_sides(made: Plan, position: int, results: Mapping[str, JobResult]) -> dict[int, str]:
    """Return, for each reconciled expert of a layer, the side whose block scales changed."""
    facts = _facts(made, position, results)
    return {item.expert: item.side.value for fact in facts for item in fact.reconciled}


def _layer_files(made: Plan, position: int) -> list[OutputFile]:
    return [file for file in made.files if file.kind is FileKind.EXPERTS and file.layer_position == position]


def _facts(made: Plan, position: int, results: Mapping[str, JobResult]) -> list[ExpertsFact]:
    return [fact for file in _layer_files(made, position) for fact in results[file.name].facts]


def _without_records(plan: LayerPlan) -> MoeLayer:
    """Return the layer as the manifest has it: names and shapes, no places."""
    return replace(plan.source, groups=tuple(replace(group, records=()) for group in plan.groups))


def _gate_up_of_facts(plan: LayerPlan, facts: list[ExpertsFact]) -> GateUpRecord:
    outcomes = [item for fact in facts for item in fact.reconciled]
    if not plan.scalars.differing:
        return gate_up_record(plan, outcomes, None)
    # over the gate and up weights of the experts that differ; the others have no error under any policy
    errors = PolicyErrors.total(errors for fact in facts for errors in fact.errors)
    return gate_up_record(plan, outcomes, errors.relative())


def gate_up_record(
    plan: LayerPlan, outcomes: Sequence[ReconciledExpert], relative_error: Mapping[str, float] | None
) -> GateUpRecord:
    """Return the record of a layer's gate and up scales.

    Args:
        plan: of the layer.
        outcomes: what was done to each reconciled expert, in the experts' order.
        relative_error: of the weights by policy, where any scales differ; no layout changes it.
    """
    figures: dict[str, Any] = {} if relative_error is None else {"relative_error": dict(relative_error)}
    if outcomes:
        figures |= {
            "rounded": sum(item.rounded for item in outcomes),
            "underflowed": sum(item.underflowed for item in outcomes),
            "worst_relative": max(item.worst_relative for item in outcomes),
        }
    return GateUpRecord(
        differing=len(plan.scalars.differing),
        worst_ratio=plan.scalars.worst_ratio,
        reconciled=tuple((item.expert, item.side.value) for item in outcomes),
        figures=figures,
    )


def make_index(records: Iterable[TensorRecord]) -> bytes:
    """``model.safetensors.index.json`` over these tensors."""
    served = list(records)
    value = {
        "metadata": {"total_size": sum(record.nbytes for record in served)},
        "weight_map": {record.name: record.file for record in sorted(served, key=lambda record: record.name)},
    }
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
