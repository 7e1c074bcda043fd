"""The smoke run's part in ``verify --smoke`` and at the end of ``convert``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from nvfp4_prep.cli.options import decorated
from nvfp4_prep.cli.output import hint, say_text
from nvfp4_prep.output.report_file import check_report_path, write_report

if TYPE_CHECKING:
    from nvfp4_prep.checkpoint.source import Source
    from nvfp4_prep.smoke import SmokeReport
    from nvfp4_prep.smoke.gate import SmokePolicy

__all__ = ["SmokeOptions", "check_page", "say_smoke", "smoke_options", "smoke_policy", "smoke_run", "write_page"]

_Command = TypeVar("_Command", bound=Callable[..., Any])


@dataclass(frozen=True)
class SmokeOptions:
    """What is run: ``verify``'s options.

    Attributes:
        layers: as :meth:`~nvfp4_prep.output.layer_selection.LayerSelection.parse` takes it; all without.
        sample: experts of each layer.
        backend: what runs the layers.
        page: HTML page to write.
    """

    layers: str | None = None
    sample: int | None = None
    backend: str = "auto"
    page: Path | None = None


def smoke_options(command: _Command) -> _Command:
    """``--smoke`` and what belongs to it; the command gets ``smoke``, a flag, and one ``smoke_options``."""

    @functools.wraps(command)
    def run(*args: Any, layers: str | None, sample: int | None, backend: str, report: Path | None, **rest: Any) -> None:
        command(*args, smoke_options=SmokeOptions(layers, sample, backend, report), **rest)

    decorators = [
        click.option("--smoke", is_flag=True, help="Also run random tokens through the layers, on a GPU if possible."),
        click.option("--layers", metavar="LIST", help="With --smoke: only these layers, for example 1,4-6."),
        click.option("--sample", type=click.IntRange(1), help="With --smoke: only so many experts of each layer."),
        click.option(
            "--backend",
            type=click.Choice(["auto", "flashinfer", "triton", "torch"]),
            default="auto",
            show_default=True,
            help="With --smoke: what runs the layers.",
        ),
        click.option(
            "--report", type=click.Path(path_type=Path, dir_okay=False), help="With --smoke: write an HTML page."
        ),
    ]
    return decorated(run, decorators)  # type: ignore[return-value]


def check_page(page: Path | None, *directories: str | Path | None) -> None:
    """Raise :class:`UsageError` before the work begins if the page could not be written after it, or would be written
    into one of ``directories``.
    """
    if page is not None:
        check_report_path(page, *directories)


def smoke_run(
    checkpoint: str | Path, source: str | Source | None, options: SmokeOptions, *, quiet: bool = False
) -> SmokeReport:
    """Runs it, tells of each layer on stderr, and writes the page."""
    from nvfp4_prep.smoke import run_smoke
    from nvfp4_prep.smoke.text import layer_line

    try:
        report = run_smoke(
            checkpoint,
            source,
            layers=_choose_layers(checkpoint, options.layers),
            sample=options.sample,
            backend=options.backend,
            on_layer=None if quiet else lambda *layer: hint(layer_line(*layer)),
        )
    finally:
        if source is not None and not isinstance(source, str):
            source.close()
    if options.page is not None:
        write_page(options.page, report, checkpoint, source if isinstance(source, str) else None)
    return report


def _choose_layers(checkpoint: str | Path, text: str | None) -> list[int] | None:
    from nvfp4_prep.output.layer_selection import LayerSelection

    return None if text is None else list(LayerSelection.parse(text).choose_present(_layer_numbers(checkpoint)))


def _layer_numbers(checkpoint: str | Path) -> list[int]:
    from nvfp4_prep.prepared.checkpoint import PreparedCheckpoint

    with PreparedCheckpoint(checkpoint) as opened:
        return sorted({record.index for record in opened.manifest.layers})


def smoke_policy(*, quiet: bool) -> SmokePolicy:
    """The library's default, which tells of each layer on stderr."""
    from nvfp4_prep.smoke.gate import SmokePolicy
    from nvfp4_prep.smoke.text import layer_line

    return SmokePolicy(on_layer=None if quiet else lambda *layer: hint(layer_line(*layer)))


def write_page(page: Path, report: SmokeReport, *directories: str | Path | None) -> None:
    """Write the HTML page of ``--report``, outside ``directories``."""
    from nvfp4_prep.smoke.html import make_page

    write_report(page, make_page(report), *directories)


def say_smoke(report: SmokeReport | None) -> None:
    """The outcome on stdout, and what to do about a failure on stderr."""
    from nvfp4_prep.smoke.text import smoke_text

    if report is None:
        return
    say_text(smoke_text(report))
    if not report.passed:
        hint("error: the smoke run failed: do not serve this checkpoint, report it")
