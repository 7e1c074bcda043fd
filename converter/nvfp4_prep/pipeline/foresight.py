"""The small files of a conversion, made before its first byte: what convert accepts, the readers of its output take.

Their sizes follow from the source and the options. Where the values are known only at the end (checksums, figures of
rescaled block scales), the largest ones stand in their place.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from nvfp4_prep.checkpoint.bounded_json import MAX_DEPTH, JsonBounds, check_bounds, dump_json
from nvfp4_prep.checkpoint.filenames import CONFIG, INDEX, MANIFEST, README, FileKind
from nvfp4_prep.checkpoint.index import TEXT_MAX_NBYTES
from nvfp4_prep.checkpoint.small_files import MAX_SMALL_NBYTES
from nvfp4_prep.errors import CheckpointError, SourceError
from nvfp4_prep.moe.policy_errors import PolicyErrors
from nvfp4_prep.output.experts_fact import ExpertsFact, ReconciledExpert
from nvfp4_prep.pipeline.jobs import JobResult
from nvfp4_prep.pipeline.results import draft_manifest, make_index
from nvfp4_prep.planning.plan import OutputFile, Plan
from nvfp4_prep.prepared.manifest import FileRecord, Manifest
from nvfp4_prep.prepared.manifest_values import MADE
from nvfp4_prep.prepared.model_card import make_model_card
from nvfp4_prep.prepared.served_config import converted_config
from nvfp4_prep_kernels import PreparedTensor, Projection

__all__ = ["check_readable"]

_DIGEST = "f" * 64
_CRC32 = 2**32 - 1
_FIGURE = -sys.float_info.max
"""No float is longer in JSON."""


def check_readable(plan: Plan, where: str) -> None:
    """Make config, manifest, index and model card of a whole conversion, and read them as their readers do.

    Memory: these files' texts, at most 256 MB each.

    Args:
        plan: the whole conversion's.
        where: its source's place, for errors.

    Raises:
        SourceError: if one of them would exceed a bound of its readers.
    """
    draft = draft_manifest(plan, {result.name: result for result in _results(plan)})
    metadata = {name: FileRecord(TEXT_MAX_NBYTES.get(name, 0), _DIGEST, MADE) for name in (INDEX, README, CONFIG)}
    manifest = Manifest(**{**vars(draft), "files": {**draft.files, **metadata}})
    try:
        name, limit = CONFIG, TEXT_MAX_NBYTES[CONFIG]
        check_bounds(dump_json(converted_config(manifest), limit, indent=2, ensure_ascii=False), MAX_DEPTH)
        name, limit = MANIFEST, MAX_SMALL_NBYTES
        Manifest.from_bytes(dump_json(manifest.to_dict(), limit, indent=1, sort_keys=True))
        name, limit = INDEX, TEXT_MAX_NBYTES[INDEX]
        index = make_index(record for file in plan.files if file.served for record in file.records)
        check_bounds(index, MAX_DEPTH)
        _check_size(index, limit)
        name, limit = README, TEXT_MAX_NBYTES[README]
        _check_size(make_model_card(manifest), limit)
    except JsonBounds as error:
        raise _refusal(where, name, error.what, f"at most {error.expected}", error.actual) from error
    except CheckpointError as error:
        raise _refusal(where, name, error.what, error.expected, error.actual) from error


def _check_size(text: bytes, most_nbytes: int) -> None:
    if len(text) > most_nbytes:
        raise JsonBounds("is too large", f"{most_nbytes:,} bytes", f"{len(text):,} bytes")


def _refusal(where: str, name: str, what: str, expected: str | None, actual: str | None) -> SourceError:
    return SourceError(
        f"cannot be converted: {name} of the output {what}",
        where=where,
        expected=expected,
        actual=actual,
        next_step="Its readers would refuse it. Look for what is out of proportion in the source's configs.",
    )


def _results(plan: Plan) -> Iterator[JobResult]:
    """Yield results as long as any that the jobs can give."""
    for file in plan.files:
        experts = file.kind is FileKind.EXPERTS and file.layer_position is not None
        yield _experts_result(plan, file) if experts else JobResult(file.name, file.nbytes, _DIGEST, {}, ())
    for side in plan.side_files:
        yield JobResult(side.name, side.nbytes, _DIGEST, {}, ())


def _experts_result(plan: Plan, file: OutputFile) -> JobResult:
    layer = plan.layers[file.layer_position or 0]
    digests = {group.key: _DIGEST for tensor in file.tensors for group in layer.groups_for(tensor)}
    facts = []
    for tensor in file.tensors:
        experts = layer.reconciled if tensor is PreparedTensor.W13_WEIGHT_SCALE else ()
        reconciled = (ReconciledExpert(expert, Projection.GATE, 2**50, 2**50, _FIGURE) for expert in experts)
        errors = PolicyErrors(1.0, 9.87654e299, 9.87654e299)
        facts.append(ExpertsFact(tensor, (_CRC32,) * layer.dims.experts, tuple(reconciled), (errors,)))
    return JobResult(file.name, file.nbytes, _DIGEST, digests, tuple(facts))
