"""The smoke run's part in ``verify --smoke`` and at the end of ``convert``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from nvfp4_prep.errors import UsageError

if TYPE_CHECKING:
    from nvfp4_prep.smoke import SmokeReport
    from nvfp4_prep.source import Source

__all__ = ["parse_layers", "say_smoke", "smoke_after_convert", "smoke_run"]


def parse_layers(text: str | None) -> list[int] | None:
    """``1,4-6`` to ``[1, 4, 5, 6]``; raises :class:`UsageError` for anything else."""
    if text is None:
        return None
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise UsageError("--layers takes numbers and ranges", expected="for example 1,4-6", actual=text)
        found |= set(range(int(first), int(last or first) + 1))
    return sorted(found)


def smoke_run(
    checkpoint: str | Path,
    source: str | Source | None,
    *,
    layers: str | None = None,
    sample: int | None = None,
    backend: str = "auto",
    page: Path | None = None,
    quiet: bool = False,
) -> SmokeReport:
    """Runs it, tells of each layer on stderr, and writes the page."""
    from nvfp4_prep.smoke import run_smoke
    from nvfp4_prep.smoke.page import make_page
    from nvfp4_prep.smoke.text import layer_line

    try:
        report = run_smoke(
            checkpoint,
            source,
            layers=parse_layers(layers),
            sample=sample,
            backend=backend,
            on_layer=None if quiet else lambda *layer: click.echo(layer_line(*layer), err=True),
        )
    finally:
        if source is not None and not isinstance(source, str):
            source.close()
    if page is not None:
        page.write_text(make_page(report), encoding="utf-8")
    return report


def smoke_after_convert(target: Path, source: str | Source | None, *, page: Path | None, quiet: bool) -> SmokeReport:
    """The run that ends a conversion: everything on a card, a few layers and experts on a CPU."""
    from nvfp4_prep.prepared import PreparedCheckpoint
    from nvfp4_prep.smoke.backends import choose_backend
    from nvfp4_prep.smoke.run import spread

    if choose_backend().device.type == "cuda":
        return smoke_run(target, source, page=page, quiet=quiet)
    with PreparedCheckpoint(target) as checkpoint:
        numbers = sorted(record.layer.index for record in checkpoint.manifest.layers)
    chosen = ",".join(str(numbers[position]) for position in spread(len(numbers), 3))
    return smoke_run(target, source, layers=chosen, sample=4, page=page, quiet=quiet)


def set_aside(target: Path) -> None:
    """Takes the stamp from a checkpoint that failed: nothing can serve it, and no second run takes it for complete."""
    from nvfp4_prep.index import CONFIG

    kept = target / f"{CONFIG}.smoke-failed"
    (target / CONFIG).rename(kept)
    click.echo(f"error: {CONFIG} was set aside as {kept}, so that nothing serves this checkpoint", err=True)


def say_smoke(report: SmokeReport | None) -> None:
    """The outcome on stdout, and what to do about a failure on stderr."""
    from nvfp4_prep.smoke.text import smoke_text

    if report is None:
        return
    click.echo(smoke_text(report))
    if not report.passed:
        click.echo("error: the smoke run failed: do not serve this checkpoint, report it", err=True)
