"""A conversion that is only looked at: its plan, the disk space it takes, and what it would find at its target."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from nvfp4_prep._util.arguments import SOURCE, checked, instance, optional
from nvfp4_prep.checkpoint.source import Source
from nvfp4_prep.commands.convert_request import ConvertRequest
from nvfp4_prep.commands.preflight import Outlook, TargetState, look_ahead
from nvfp4_prep.commands.speed_estimate import SpeedEstimate, estimate_speed
from nvfp4_prep.hub import opened_source
from nvfp4_prep.output.sink import KeepFiles, PublishedFiles
from nvfp4_prep.pipeline.device import choose_device
from nvfp4_prep.planning.builder import make_plan
from nvfp4_prep.planning.disk_space import Room, room_for
from nvfp4_prep.planning.plan import Plan

__all__ = ["Preview", "preview_conversion"]


@dataclass(frozen=True)
class Preview:
    """The outcome of a dry run.

    Attributes:
        plan: of the whole conversion, also where a part was asked for.
        room: disk space that a run into an empty target takes.
        outlook: what the run would find at its target, and why it would be refused, if it would be.
        speed: lower bounds of its time; ``None`` for a source that is not on this machine.
    """

    plan: Plan
    room: Room
    outlook: Outlook
    speed: SpeedEstimate | None = None


@checked(request=instance(ConvertRequest), source=optional(SOURCE))
def preview_conversion(request: ConvertRequest, source: str | Path | Source | None = None) -> Preview:
    """Go through everything that a conversion checks before its first byte; write nothing.

    Args:
        request: the conversion.
        source: an opened source to use instead of the request's.

    Raises:
        UsageError: if the request asks for what excludes each other.
        SourceError, UnsupportedCheckpointError: if there is nothing to plan; all other refusals are in the outlook.
    """
    request.check()
    choose_device(request.device)
    sink = PublishedFiles() if request.stream_out else KeepFiles()
    with opened_source(request.source if source is None else source) as opened:
        begun = time.perf_counter()
        plan = make_plan(opened, request.options)
        planning_s = time.perf_counter() - begun
        room = room_for(plan, (), opened, sink)
        outlook = look_ahead(
            plan,
            opened,
            request.target,
            sink,
            selection=request.selection,
            join=request.join,
            restart=request.restart,
            smoke=request.smoke and not request.stream_out,
        )
        runs = outlook.state in (TargetState.NEW, TargetState.CONTINUES)
        speed = estimate_speed(plan, opened, planning_s) if runs else None
    return Preview(plan, room, outlook, speed)
