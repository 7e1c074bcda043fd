"""``nvfp4-prep inspect`` and ``nvfp4-prep verify``."""

from __future__ import annotations

import json
import sys

import click

from nvfp4_prep.cli.common import common, make_progress, threads_option
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
    click.echo(json.dumps(inspection_value(found)) if as_json else inspection_text(found))


@click.command()
@click.argument("checkpoint")
@click.option("--source", help="Compare with this source too, byte by byte; a Hub id is read by ranges, without disk.")
@click.option("--quick", is_flag=True, help="Only what needs no tensor bytes: manifest, config, sizes, headers, index.")
@threads_option
@common
def verify(checkpoint: str, source: str | None, quick: bool, threads: int | None, as_json: bool, quiet: bool) -> None:
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
    if address is None:
        origin = None if source is None else open_ranges(source)
        report = verification.verify(
            checkpoint, source=origin, quick=quick, threads=threads, progress=make_progress(quiet)
        )
    elif source is not None:
        raise UsageError("--source needs the bytes of CHECKPOINT", where=checkpoint, next_step="Download it first.")
    else:
        from nvfp4_prep.hub.published import verify_published

        quiet_client()
        report = verify_published(address)
    click.echo(json.dumps(report.to_dict()) if as_json else verify_text(report))
    if not report.ok:
        sys.exit(VerificationError.exit_code)
