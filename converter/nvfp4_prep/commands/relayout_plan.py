"""Plan of a relayout: the new options, the layers in the new layout, and whether a directory is the result already."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from nvfp4_prep.checkpoint.filenames import CONFIG, MANIFEST
from nvfp4_prep.commands.finished_conversion import check_undamaged, read_manifest
from nvfp4_prep.errors import NvfpPrepError, UnsupportedCheckpointError, UsageError
from nvfp4_prep.layouts import LAYOUTS, LayoutName
from nvfp4_prep.options import ConvertOptions
from nvfp4_prep.output.target_checks import has_journal
from nvfp4_prep.planning.builder import check_batched
from nvfp4_prep.planning.plan import LayerPlan
from nvfp4_prep.prepared.checkpoint import PreparedCheckpoint
from nvfp4_prep.prepared.config_edits import edits_to_json, same_value
from nvfp4_prep.prepared.manifest import GateUpRecord, Manifest
from nvfp4_prep_kernels import LayoutError

__all__ = ["find_finished_relayout", "new_options", "other_edits", "plan_layers"]


def new_options(
    old: ConvertOptions, layout: LayoutName | None, gate_up_block: int | None, moe_tp: int | None, where: str
) -> ConvertOptions:
    """Return the checkpoint's options with what shall change; raise :class:`UsageError` if nothing does."""
    chosen = old.layout if layout is None else layout
    inherited = old.gate_up_block if LAYOUTS[chosen].has_blocks else ConvertOptions().gate_up_block
    options = replace(
        old,
        layout=chosen,
        gate_up_block=inherited if gate_up_block is None else gate_up_block,
        moe_tp=old.moe_tp if moe_tp is None else moe_tp,
    )
    if options == old:
        raise UsageError(
            "has this layout already",
            where=where,
            next_step="Specify what to change: --layout, --gate-up-block or --moe-tp.",
        )
    return options


def plan_layers(checkpoint: PreparedCheckpoint, options: ConvertOptions) -> tuple[LayerPlan, ...]:
    """Return the layers in the new layout; their groups have no records, because the source is not here."""
    plans = []
    for record in checkpoint.manifest.layers:
        layer = record.source
        check_batched(layer, record.activation, options)
        try:
            layout = options.layout_for(gated=layer.gated)
            layout.check(layer.dims)
        except (LayoutError, UsageError) as error:
            raise UnsupportedCheckpointError(
                str(error), where=layer.experts_path, next_step="Give another --layout or --moe-tp."
            ) from error
        scalars = checkpoint.scalars(record)
        plans.append(LayerPlan(layer, layout, record.activation, scalars, options.reconciled(scalars.differing)))
    return tuple(plans)


def find_finished_relayout(
    old: Manifest, options: ConvertOptions, plans: tuple[LayerPlan, ...], path: Path
) -> Manifest | None:
    """Return the target's manifest if the directory is the finished output already; ``None`` if it is anything else.

    So a run that was stopped in its very last steps ends well when repeated. Edits of the output's config that were
    recorded since then are part of it.

    Raises:
        VerificationError: if it is the output and damaged, by manifest, stamp, sizes, headers and index.
    """
    if has_journal(path) or not all((path / name).is_file() for name in (MANIFEST, CONFIG)):
        return None
    try:
        found = read_manifest(path)
    except NvfpPrepError:
        return None  # not ours: the target is refused
    expected = replace(
        old,
        tool_version=found.tool_version,
        options=options,
        layers=found.layers,
        files=found.files,
        verified=found.verified,
        config_edits=found.config_edits,
    )
    if found.to_bytes() != expected.to_bytes() or len(found.layers) != len(plans):
        return None
    for record, before, plan in zip(found.layers, old.layers, plans, strict=True):
        same = replace(
            before, layout=plan.layout, files=record.files, expert_crc32=record.expert_crc32, gate_up=record.gate_up
        )
        if record != same or not _follows(record.gate_up, before.gate_up, plan):
            return None
    check_undamaged(path)
    return found


def other_edits(old: Manifest, new: Manifest) -> tuple[str, ...]:
    """Return the places at which two manifests' recorded edits of the config differ."""
    before, after = ({edit.path: edit for edit in manifest.config_edits} for manifest in (old, new))
    return tuple(
        sorted(
            ".".join(path)
            for path in before.keys() | after.keys()
            if not same_value(*(edits_to_json([edits[path]] if path in edits else []) for edits in (before, after)))
        )
    )


def _follows(found: GateUpRecord, before: GateUpRecord, plan: LayerPlan) -> bool:
    """Return whether a record of gate and up scales is what the plan would make of the old one.

    Which side of an expert is rescaled, and what that costs, only its bytes tell: they are not read.
    """
    if plan.reconciled == before.reconciled_experts:
        return found == before
    kept = [(record.differing, record.worst_ratio, record.figures.get("relative_error")) for record in (found, before)]
    return kept[0] == kept[1] and found.reconciled_experts == plan.reconciled
