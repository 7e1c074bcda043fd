"""The smoke run's part in ``verify --smoke`` and at the end of ``convert``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from nvfp4_prep.cli.common import decorated
from nvfp4_prep.cli.output import hint, say_text, shell_line
from nvfp4_prep.errors import ConversionInterrupted
from nvfp4_prep.report_file import check_report_path, write_report

if TYPE_CHECKING:
    from nvfp4_prep.conversion import ConvertResult
    from nvfp4_prep.smoke import SmokeReport
    from nvfp4_prep.source import Source

__all__ = ["SmokeGate", "SmokeOptions", "check_page", "say_smoke", "smoke_options", "smoke_run"]

_Command = TypeVar("_Command", bound=Callable[..., Any])


@dataclass(frozen=True)
class SmokeOptions:
    """What is run: ``verify``'s options.

    Attributes:
        layers: as :meth:`~nvfp4_prep.part_folders.LayerSelection.parse` takes it; all without.
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
    from nvfp4_prep.smoke.page import make_page
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
        write_report(options.page, make_page(report), checkpoint, source if isinstance(source, str) else None)
    return report


def _choose_layers(checkpoint: str | Path, text: str | None) -> list[int] | None:
    from nvfp4_prep.part_folders import LayerSelection

    return None if text is None else list(LayerSelection.parse(text).choose_present(_layer_numbers(checkpoint)))


def _layer_numbers(checkpoint: str | Path) -> list[int]:
    from nvfp4_prep.prepared import PreparedCheckpoint

    with PreparedCheckpoint(checkpoint) as opened:
        return sorted({record.layer.index for record in opened.manifest.layers})


class SmokeGate:
    """The run that ends a conversion, before anything is published in loadable form.

    Attributes:
        report: the run's, once there was one.
    """

    def __init__(self, target: Path, source: str | None, *, skip: bool, again: bool, page: Path | None, quiet: bool):
        """Runs nothing yet.

        Args:
            target: what is made.
            source: directory to compare with; without it the prepared tensors are turned back.
            skip: let everything pass.
            again: run also on a checkpoint that was complete already.
            page: HTML page to write.
            quiet: tell nothing on stderr.
        """
        self.report: SmokeReport | None = None
        self._target, self._source = target, source
        self._skip, self._again = skip, again
        self._page, self._quiet = page, quiet

    def passes(self, result: ConvertResult) -> bool:
        """Whether the conversion may go out: everything is run on a card, a few layers and experts on a CPU."""
        if self._skip or (result.already_complete and not self._again):
            return True
        try:
            self.report = smoke_run(self._target, self._source, self._options(), quiet=self._quiet)
        except KeyboardInterrupt as error:
            raise ConversionInterrupted(
                "interrupted in the smoke run: the conversion is complete, but was not tried",
                where=str(self._target),
                next_step=f"Run: {shell_line('verify', self._target, '--smoke')}",
            ) from error
        return self.report.passed

    @property
    def failed(self) -> bool:
        """Whether a run found something wrong."""
        return self.report is not None and not self.report.passed

    def set_aside(self) -> None:
        """Takes the stamp from a failed checkpoint: nothing can serve it, and no second run finds it complete."""
        from nvfp4_prep.index import CONFIG

        kept = self._target / f"{CONFIG}.smoke-failed"
        (self._target / CONFIG).rename(kept)
        hint(f"error: {CONFIG} was set aside as {kept}, so that nothing serves this checkpoint")

    def _options(self) -> SmokeOptions:
        from nvfp4_prep.smoke.backends import choose_backend

        if choose_backend().device.type == "cuda":
            return SmokeOptions(page=self._page)
        numbers = _layer_numbers(self._target)
        few = sorted({numbers[0], numbers[(len(numbers) - 1) // 2], numbers[-1]})
        return SmokeOptions(layers=",".join(map(str, few)), sample=4, page=self._page)


def say_smoke(report: SmokeReport | None) -> None:
    """The outcome on stdout, and what to do about a failure on stderr."""
    from nvfp4_prep.smoke.text import smoke_text

    if report is None:
        return
    say_text(smoke_text(report))
    if not report.passed:
        hint("error: the smoke run failed: do not serve this checkpoint, report it")
