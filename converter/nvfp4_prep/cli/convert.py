"""``nvfp4-prep convert``."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nvfp4_prep.cli.conversion_output import conversion_value, say_conversion, say_part, warn_of_policy
from nvfp4_prep.cli.options import (
    Publishing,
    check_repository,
    common,
    conversion_options,
    publishing_options,
    restart_option,
    threads_option,
)
from nvfp4_prep.cli.output import hint, make_progress, say, say_next, say_text, shell_line, tell_address, to_json
from nvfp4_prep.cli.smoke import check_page, say_smoke, smoke_policy, write_page
from nvfp4_prep.errors import UsageError, VerificationError

if TYPE_CHECKING:
    from nvfp4_prep.commands.convert import ConvertResult
    from nvfp4_prep.hub.source import HubSource
    from nvfp4_prep.options import ConvertOptions
    from nvfp4_prep.output.layer_selection import LayerSelection
    from nvfp4_prep.publish.push import PushResult
    from nvfp4_prep.smoke.gate import SmokeFailedError, SmokePolicy

__all__ = ["convert"]


@dataclass(frozen=True)
class _Job:
    """One conversion, as the command line describes it."""

    source: str
    target: Path
    options: ConvertOptions
    publishing: Publishing
    dry_run: bool
    keep_source: bool
    layers: str | None
    join: bool
    push_to: str | None
    stream_out: bool
    device: str
    no_smoke: bool
    report: Path | None
    threads: int | None
    restart: bool
    as_json: bool
    quiet: bool

    def check(self) -> None:
        """Raises :class:`UsageError` for options that exclude each other."""
        if self.push_to is None and (self.stream_out or self.publishing != Publishing()):
            raise UsageError(
                "--stream-out, --private, --revision and --create-pr say how to publish, but not where",
                next_step="Add --push-to USER/NAME.",
            )
        if self.layers is not None and self.join:
            raise UsageError("--layers makes one part, --join takes all", next_step="Use one of them.")
        if self.push_to is not None and self.divided:
            raise UsageError(
                "--push-to publishes while one machine converts, parts come from several",
                next_step="Join first, then use nvfp4-prep push.",
            )
        if self.join and self.restart:
            raise UsageError("--restart would discard what --join is to take", next_step="Leave one of them out.")
        if self.device != "cpu" and self.divided:
            raise UsageError("parts are prepared on the CPU", next_step="Leave --device out.")
        if self.report is not None and (self.no_smoke or self.stream_out or self.dry_run or self.layers is not None):
            raise UsageError(
                "--report is about the smoke run, and these options leave none",
                next_step="Leave --report out, or what goes without: --no-smoke, --stream-out, --dry-run, --layers.",
            )
        if self.push_to is not None:
            check_repository(self.push_to)
        check_page(self.report, self.target, self.source)

    @property
    def divided(self) -> bool:
        """Whether several machines share the conversion."""
        return self.join or self.layers is not None

    @property
    def selection(self) -> LayerSelection | None:
        """The layers of a part."""
        from nvfp4_prep.output.layer_selection import LayerSelection

        return None if self.layers is None else LayerSelection.parse(self.layers)

    def open(self) -> str | HubSource:
        """The source; what is downloaded of it lies in the folder that the job works in."""
        from nvfp4_prep.hub import open_source
        from nvfp4_prep.output.layer_selection import part_folder

        tell_address(self.source, quiet=self.quiet)
        part = self.selection
        work = self.target if part is None else part_folder(self.target, part)
        return open_source(self.source, target=None if self.dry_run else work, keep_source=self.keep_source)

    def arguments(self) -> dict[str, Any]:
        """What every function that converts takes."""
        return {"options": self.options, "threads": self.threads, "progress": make_progress(self.quiet)}


@click.command()
@click.argument("source")
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--dry-run", is_flag=True, help="Print the plan and what is at TARGET; writes nothing.")
@click.option("--keep-source", is_flag=True, help="Download to the Hugging Face cache and leave the source there.")
@click.option("--layers", metavar="1-20|2/8", help="One machine's part: these layers, or the second of eight shares.")
@click.option("--join", is_flag=True, help="Make the checkpoint of all parts.")
@click.option("--push-to", metavar="USER/NAME", help="Publish each finished file on the Hub while the next is made.")
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Where the layout is applied; the bytes are the same.",
)
@click.option("--no-smoke", is_flag=True, help="Leave out the fused-MoE smoke run at the end.")
@click.option("--report", type=click.Path(path_type=Path, dir_okay=False), help="HTML page about the smoke run.")
@click.option("--stream-out", is_flag=True, help="With --push-to: delete each file here once it is published.")
@publishing_options("With --push-to: ")
@conversion_options
@threads_option
@restart_option
@common
def convert(**given: Any) -> None:
    """Prepare the experts of SOURCE and write a checkpoint to TARGET.

    SOURCE is a directory or a Hub id: ORG/NAME, ORG/NAME@REVISION, hf://ORG/NAME. Killed at any moment, the same
    command continues and ends with the same bytes.

    \b
    nvfp4-prep convert ./DeepSeek-NVFP4 ./out --dry-run
    nvfp4-prep convert ./DeepSeek-NVFP4 ./out
    nvfp4-prep convert nvidia/Kimi-K2.5-NVFP4 ./out --push-to me/Kimi-K2.5-NVFP4-prepared --stream-out

    Several machines on one file system: each makes a part, then one joins them.

    \b
    nvfp4-prep convert /data/Kimi /data/out --layers 1/2        on one machine
    nvfp4-prep convert /data/Kimi /data/out --layers 2/2        on another, at the same time
    nvfp4-prep convert /data/Kimi /data/out --join              when both are done
    """
    job = _Job(**given)
    job.check()
    if job.dry_run:
        _show_plan(job)
    elif (part := job.selection) is not None:
        _make_part(job, part)
    else:
        _make_checkpoint(job)


def _show_plan(job: _Job) -> None:
    from nvfp4_prep.cli.render import outlook_text, outlook_value, plan_text, plan_value
    from nvfp4_prep.commands.convert import open_source, plan
    from nvfp4_prep.commands.preflight import TargetState, look_ahead
    from nvfp4_prep.output.sink import KeepFiles
    from nvfp4_prep.planning.disk_space import room_for
    from nvfp4_prep.publish.stream import PublishedFiles

    sink = PublishedFiles() if job.stream_out else KeepFiles()
    source = open_source(job.open())
    try:
        made = plan(source, job.options)
        room = room_for(made, (), source, sink)
        outlook = look_ahead(
            made, source, job.target, sink, selection=job.selection, join=job.join, restart=job.restart
        )
    finally:
        source.close()
    if outlook.state is TargetState.COMPLETE and job.push_to is None:
        with outlook.refusing():
            _check_finished(job.target)
    if job.as_json:
        say(to_json(plan_value(made, room) | {"target": outlook_value(outlook)}))
    else:
        say_text(f"{plan_text(made, room)}\n{outlook_text(outlook)}")
    if outlook.refusal is not None:
        hint(f"error: {outlook.refusal}")
        sys.exit(outlook.refusal.exit_code)


def _make_part(job: _Job, selection: LayerSelection) -> None:
    from nvfp4_prep.commands.convert_parts import convert_part

    part = convert_part(job.open(), job.target, selection, restart=job.restart, **job.arguments())
    if part.joined:
        _check_finished(job.target)
    if job.as_json:
        value = {"path": str(part.path), "layers": list(part.layers), "files": part.files, "resumed": part.resumed}
        say(to_json({**value, "joined": part.joined, "written_nbytes": part.written_nbytes}))
    else:
        say_part(part, selection.text, job.source, job.target)


def _make_checkpoint(job: _Job) -> None:
    from nvfp4_prep.smoke.gate import SmokeFailedError

    try:
        result, pushed = _run(job, job.open())
    except SmokeFailedError as error:
        _say_failed(job, error)
        sys.exit(error.exit_code)
    if result.already_complete and job.push_to is None:
        _check_finished(job.target)
    if job.report is not None and result.smoke is not None:
        write_page(job.report, result.smoke, job.target, job.source)
    if job.as_json:
        say(to_json(conversion_value(result, pushed)))
    else:
        say_conversion(result, pushed, job.source, job.target)
        say_smoke(result.smoke)
    if job.report is not None and result.smoke is None:
        page = shell_line("verify", job.target, "--smoke", "--report", job.report)
        hint(f"no smoke run of what was complete already, and no {job.report}: {page} makes it")
    if not job.as_json and not result.already_complete:
        warn_of_policy(result)
        say_next("verify", job.target, "--source", job.source)


def _run(job: _Job, opened: str | HubSource) -> tuple[ConvertResult, PushResult | None]:
    """The library's one call."""
    smoke = None if job.no_smoke else smoke_policy(quiet=job.quiet)
    if job.push_to is not None:
        return _convert_and_publish(job, opened, job.push_to, smoke)
    if job.join:
        from nvfp4_prep.commands.convert_parts import join_parts

        return join_parts(opened, job.target, smoke=smoke, **job.arguments()), None
    from nvfp4_prep.commands.convert import convert

    return convert(opened, job.target, restart=job.restart, device=job.device, smoke=smoke, **job.arguments()), None


def _say_failed(job: _Job, error: SmokeFailedError) -> None:
    """A conversion that is whole but for the config, which the failed smoke run keeps back."""
    from nvfp4_prep.commands.convert import ConvertResult

    if job.report is not None:
        write_page(job.report, error.report, job.target, job.source)
    if job.as_json:
        say(
            to_json(
                conversion_value(ConvertResult(job.target, error.manifest, False, False, 0, smoke=error.report), None)
            )
        )
    else:
        say_smoke(error.report)
    hint(f"error: {job.target} has no config.json, so that nothing serves this checkpoint; {error.next_step}")


def _check_finished(target: Path) -> None:
    """Raises :class:`VerificationError` if what was there already is damaged, as far as no tensor bytes are needed."""
    from nvfp4_prep._util.text import count
    from nvfp4_prep.commands.verify import verify

    found = verify(target, quick=True)
    problems = found.problems
    if problems:
        more = f" (and {count(len(problems) - 1, 'more problem')})" if problems[1:] else ""
        raise VerificationError(
            f"was converted before, but is damaged: {problems[0]}{more}",
            where=str(target),
            next_step=found.next_step,
        )


def _convert_and_publish(
    job: _Job, opened: str | HubSource, repository: str, smoke: SmokePolicy | None
) -> tuple[ConvertResult, PushResult]:
    from nvfp4_prep.hub import quiet_client
    from nvfp4_prep.publish.stream import convert_and_publish

    quiet_client()
    return convert_and_publish(
        opened,
        job.target,
        repository,
        publish_options=job.publishing.options(),
        stream_out=job.stream_out,
        restart=job.restart,
        device=job.device,
        smoke=smoke,
        **job.arguments(),
    )
