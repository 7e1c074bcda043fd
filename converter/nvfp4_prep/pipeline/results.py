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
from nvfp4_prep.moe.model_config import quantization_configs
from nvfp4_prep.moe.policy_errors import PolicyErrors
from nvfp4_prep.output.experts_fact import ExpertsFact, ReconciledExpert
from nvfp4_prep.pipeline.jobs import JobResult
from nvfp4_prep.planning.plan import LayerPlan, OutputFile, Plan
from nvfp4_prep.prepared.manifest import FileRecord, GateUpRecord, LayerRecord, Manifest
from nvfp4_prep.prepared.manifest_values import SIDE
from nvfp4_prep_kernels import PreparedTensor

__all__ = ["draft_manifest", "gate_up_record", "layer_record", "make_index", "reconciled_sides"]


def draft_manifest(plan: Plan, results: Mapping[str, JobResult]) -> Manifest:
    """Return the manifest of a conversion, without the files that are made at its end.

    Args:
        plan: the whole plan.
        results: of all its files, by name.
    """
    kinds = {file.name: file.kind.value for file in plan.files}
    rescaled = any(layer.reconciled for layer in plan.layers)
    return Manifest(
        tool_version=__version__,
        options=plan.options,
        source=plan.source_label,
        revision=plan.source_revision,
        texts=plan.index.texts,
        quantization=quantization_configs(plan.index.config, plan.index.hf_quant_config),
        layers=tuple(layer_record(plan, position, results) for position in range(len(plan.layers))),
        passed={finding.experts_path: finding.reason for finding in plan.others},
        files={
            name: FileRecord(result.nbytes, result.sha256 or "", kinds.get(name, SIDE))
            for name, result in sorted(results.items())
        },
        verified=(
            {
                "check": "inverse transform while converting",
                "result": "every prepared byte was inverted and compared with the source before it was written"
                + (", rescaled block scales with the rescaled ones" if rescaled else ""),
                "experts": sum(layer.dims.experts for layer in plan.layers),
                "nbytes": sum(layer.prepared_nbytes for layer in plan.layers),
            },
        ),
    )


def layer_record(plan: Plan, position: int, results: Mapping[str, JobResult]) -> LayerRecord:
    """Return the manifest's record of a layer.

    Args:
        plan: the plan.
        position: of the layer in it.
        results: finished jobs by file name; the layer's files must be there.
    """
    layer = plan.layers[position]
    files = _layer_files(plan, position)
    facts = _facts(plan, position, results)
    crc32: dict[str, list[int]] = {tensor.value: [] for tensor in PreparedTensor}
    for fact in facts:
        crc32[fact.tensor.value] += fact.crc32
    digests = {key: digest for file in files for key, digest in results[file.name].digests.items()}
    digests |= {key: hashlib.sha256(raw).hexdigest() for key, raw in layer.scalars.raw.items()}
    return LayerRecord(
        source=_without_records(layer),
        layout=layer.layout,
        activation=layer.activation,
        files=tuple(file.name for file in files),
        gate_up=_gate_up_of_facts(layer, facts),
        source_sha256=digests,
        expert_crc32={name: tuple(values) for name, values in crc32.items()},
    )


def reconciled_sides(plan: Plan, position: int, results: Mapping[str, JobResult]) -> dict[int, str]:
    """Return, for each reconciled expert of a layer, the side whose block scales changed."""
    facts = _facts(plan, position, results)
    return {item.expert: item.side.value for fact in facts for item in fact.reconciled}


def _layer_files(plan: Plan, position: int) -> list[OutputFile]:
    return [file for file in plan.files if file.kind is FileKind.EXPERTS and file.layer_position == position]


def _facts(plan: Plan, position: int, results: Mapping[str, JobResult]) -> list[ExpertsFact]:
    return [fact for file in _layer_files(plan, position) for fact in results[file.name].facts]


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
    """Return ``model.safetensors.index.json`` over these tensors."""
    served = list(records)
    value = {
        "metadata": {"total_size": sum(record.nbytes for record in served)},
        "weight_map": {record.name: record.file for record in sorted(served, key=lambda record: record.name)},
    }
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
