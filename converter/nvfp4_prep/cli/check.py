"""``nvfp4-prep inspect`` and ``nvfp4-prep verify``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from nvfp4_prep.cli.common import common, make_progress, threads_option, to_json
from nvfp4_prep.cli.smoke import say_smoke, smoke_run
from nvfp4_prep.errors import UsageError, VerificationError

__all__ = ["inspect", "verify"]


@click.command()
@click.argument("checkpoint")
@common
def inspect(checkpoint: str, as_json: bool, quiet: bool) -> None:
    """Say what CHECKPOINT is: format, MoE layers, sizes, prepared or not, and what convert would do with it.

    Reads headers and scalars only. CHECKPOINT is a directory or a Hub id.

    \b
    nvfp4-prep inspect ./DeepSeek-NVFP4
    nvfp4-prep inspect nvidia/Kimi-K2.5-NVFP4 --json
    """
    from nvfp4_prep import inspection
    from nvfp4_prep.hub import open_source
    from nvfp4_prep.reporting import inspection_text, inspection_value

    found = inspection.inspect(open_source(checkpoint))
    click.echo(to_json(inspection_value(found)) if as_json else inspection_text(found))


@click.command()
@click.argument("checkpoint")
@click.option("--source", help="Compare with this source too, byte by byte; a Hub id is read by ranges, without disk.")
@click.option("--quick", is_flag=True, help="Only what needs no tensor bytes: manifest, config, sizes, headers, index.")
@click.option("--smoke", is_flag=True, help="Also run random tokens through the prepared layers, on a GPU if possible.")
@click.option("--layers", metavar="LIST", help="With --smoke: only these layers, for example 1,4-6.")
@click.option("--sample", type=click.IntRange(1), help="With --smoke: only so many experts of each layer.")
@click.option(
    "--backend",
    type=click.Choice(["auto", "flashinfer", "triton", "torch"]),
    default="auto",
    show_default=True,
    help="With --smoke: what runs the layers.",
)
@click.option("--report", type=click.Path(path_type=Path, dir_okay=False), help="With --smoke: write an HTML page.")
@threads_option
@common
def verify(
    checkpoint: str,
    source: str | None,
    quick: bool,
    smoke: bool,
    layers: str | None,
    sample: int | None,
    backend: str,
    report: Path | None,
    threads: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Check a prepared CHECKPOINT: structure, checksums, and that every byte turns back into the source.

    A published one (USER/NAME[@REVISION]) is checked by what the Hub lists, without downloading its weights.
    Exit code 6 if anything is wrong.

    \b
    nvfp4-prep verify ./out                             every byte against the manifest
    nvfp4-prep verify ./out --source ./DeepSeek-NVFP4   and against the source
    nvfp4-prep verify ./out --quick                     structure only, seconds
    """
    from nvfp4_prep import verification
    from nvfp4_prep.hub import open_ranges, parse_address, quiet_client
    from nvfp4_prep.reporting import verify_text

    address = parse_address(checkpoint)
    smoke_report = None
    if not smoke and (layers or sample or report or backend != "auto"):
        raise UsageError("--layers, --sample, --backend and --report belong to --smoke", next_step="Add --smoke.")
    if smoke and address is not None:
        raise UsageError("--smoke needs the bytes of CHECKPOINT", where=checkpoint, next_step="Download it first.")
    if address is None:
        origin = None if source is None else open_ranges(source)
        found = verification.verify(
            checkpoint, source=origin, quick=quick, threads=threads, progress=make_progress(quiet)
        )
        if smoke and found.ok:
            again = None if source is None else open_ranges(source)
            smoke_report = smoke_run(
                checkpoint, again, layers=layers, sample=sample, backend=backend, page=report, quiet=quiet
            )
    elif source is not None:
        raise UsageError("--source needs the bytes of CHECKPOINT", where=checkpoint, next_step="Download it first.")
    else:
        from nvfp4_prep.hub.published import verify_published

        quiet_client()
        found = verify_published(address)
    if as_json:
        value = found.to_dict() | ({"smoke": smoke_report and smoke_report.to_dict()} if smoke else {})
        click.echo(to_json(value))
    else:
        click.echo(verify_text(found))
        say_smoke(smoke_report)
        if not found.ok:
            click.echo("next: do not serve it; remove it and convert again", err=True)
    if not found.ok or (smoke_report is not None and not smoke_report.passed):
        sys.exit(VerificationError.exit_code)
