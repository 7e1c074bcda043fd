"""Outlines of all files that a plan writes."""

from __future__ import annotations

from nvfp4_prep.output.outline import Outline
from nvfp4_prep.pipeline.finish import made_outlines
from nvfp4_prep.planning.plan import Plan
from nvfp4_prep.prepared.stamp import config_bytes, stamped

__all__ = ["plan_outlines"]


def plan_outlines(plan: Plan) -> dict[str, Outline]:
    """Return the outlines of a plan's files, by name: those with tensors, the copied ones and the made ones."""
    index = plan.index
    gated = any(layer.source.gated for layer in plan.layers)
    made = made_outlines(
        lambda: (record for file in plan.files if file.served for record in file.records),
        lambda: config_bytes(stamped(index.config, index.hf_quant_config, plan.options, gated=gated)),
    )
    files = {file.name: Outline(file.nbytes, file.header) for file in plan.files}
    return files | {file.name: Outline(file.nbytes) for file in plan.side_files} | made
