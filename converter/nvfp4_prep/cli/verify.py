"""``nvfp4-prep verify``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

import nvfp4_prep
from nvfp4_prep.checkpoint.filenames import MANIFEST
from nvfp4_prep.cli.help import HelpfulCommand
from nvfp4_prep.cli.options import ADDRESS, checkpoint_argument, common, memory_option, report_option, threads_option
from nvfp4_prep.cli.output import command_line, hint, make_progress, say_json, say_text, tell_address
from nvfp4_prep.cli.render import verify_text
from nvfp4_prep.cli.smoke import SmokeOptions, check_smoke, say_smoke, smoke_options, smoke_run
from nvfp4_prep.errors import UsageError, VerificationError
from nvfp4_prep.hub import parse_address
from nvfp4_prep.output.report_file import check_report_path
from nvfp4_prep.report.page import Subject, write_page

if TYPE_CHECKING:
    from nvfp4_prep import SmokeReport, VerifyReport

__all__ = ["verify"]


@click.command(cls=HelpfulCommand)
@checkpoint_argument(on_hub=True)
@click.option(
    "--source",
    type=ADDRESS,
    metavar="TEXT",
    help="Compare with this source too, byte by byte; a Hub id is read by ranges, without disk.",
)
@click.option(
    "--quick", is_flag=True, help="Check only what needs no tensor bytes: manifest, config, sizes, headers, index."
)
@report_option("Write an HTML page: every check with its figures, host, date, command and versions.")
@smoke_options
@threads_option
@memory_option
@common
def verify(
    checkpoint: str,
    source: str | None,
    quick: bool,
    smoke: bool,
    smoke_options: SmokeOptions,
    report: Path | None,
    threads: int | None,
    memory_nbytes: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Check a prepared CHECKPOINT: structure, checksums, and that every byte inverts into the source.

    A published one (USER/NAME[@REVISION]) is checked by what the Hub lists, without downloading its weights.
    Exit code 6 if anything is wrong, also for files that conversion did not write.

    Not covered: who made the checkpoint, and what the model card and the manifest say of it (name and revision of
    the source, version, figures). Only --source compares with the source itself.
    Edits of config.json that `nvfp4-prep restamp` recorded are named and pass.

    \b
    nvfp4-prep verify ./out                             every byte against the manifest
    nvfp4-prep verify ./out --source ./DeepSeek-NVFP4   and against the source
    nvfp4-prep verify ./out --quick                     structure only, seconds
    nvfp4-prep verify ./out --smoke --layers 1,4-6      and random tokens through four layers
    nvfp4-prep verify ./out --report page.html          and an HTML report to keep
    """
    tell_address(checkpoint, quiet=quiet)
    _check_combination(checkpoint, source, smoke_options, smoke=smoke)
    if report is not None:
        check_report_path(report, checkpoint, source)
    if smoke:
        check_smoke(checkpoint, smoke_options)
    found = nvfp4_prep.verify(
        checkpoint,
        source=source,
        quick=quick,
        threads=threads,
        memory_nbytes=memory_nbytes,
        progress=make_progress(quiet),
    )
    ran = smoke_run(checkpoint, source, smoke_options, quiet=quiet) if smoke and found.ok else None
    if report is not None:
        why_no_smoke = "verification failed" if smoke else "not asked for (--smoke)"
        subject = Subject(checkpoint, found.manifest, found, ran, why_no_smoke)
        write_page(report, subject, checkpoint, source, command=command_line())
    if as_json:
        say_json(found.to_dict() | ({"smoke": ran and ran.to_dict()} if smoke else {}))
    else:
        _say_verified(found, ran)
    if smoke and ran is None:
        hint("no smoke test, because verification failed")
    if not found.ok or (ran is not None and not ran.passed):
        sys.exit(VerificationError.exit_code)


def _check_combination(checkpoint: str, source: str | None, options: SmokeOptions, *, smoke: bool) -> None:
    if not smoke and options != SmokeOptions():
        raise UsageError("--layers, --sample and --backend belong to --smoke", next_step="Add --smoke.")
    if smoke and parse_address(checkpoint) is not None:
        raise UsageError("--smoke needs the bytes of CHECKPOINT", where=checkpoint, next_step="Download it first.")
    if source is not None and (Path(source) / MANIFEST).is_file():
        raise UsageError(
            "--source is a prepared checkpoint", where=source, next_step="Give what CHECKPOINT was made from."
        )


def _say_verified(found: VerifyReport, ran: SmokeReport | None) -> None:
    say_text(verify_text(found))
    say_smoke(ran)
    if not found.ok:
        hint(f"next: {found.next_step}")
