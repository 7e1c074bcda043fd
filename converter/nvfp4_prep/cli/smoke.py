"""The smoke test's part in ``verify --smoke`` and at the end of ``convert``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

import nvfp4_prep
from nvfp4_prep._util.text import format_duration
from nvfp4_prep.cli.options import decorated
from nvfp4_prep.cli.output import hint, say_text
from nvfp4_prep.smoke.backend_names import BACKENDS
from nvfp4_prep.smoke.text import layer_line, smoke_text

if TYPE_CHECKING:
    from nvfp4_prep import SmokePolicy, SmokeReport
    from nvfp4_prep.smoke import LayerReport

__all__ = ["SmokeOptions", "check_smoke", "say_smoke", "smoke_options", "smoke_policy", "smoke_run"]

_Command = TypeVar("_Command", bound=Callable[..., Any])


@dataclass(frozen=True)
class SmokeOptions:
    """``verify``'s options for what is run.

    Attributes:
        layers: as :meth:`~nvfp4_prep.output.layer_selection.LayerSelection.parse` takes it; all without.
        sample: experts of each layer.
        backend: what runs the layers.
    """

    layers: str | None = None
    sample: int | None = None
    backend: str = "auto"


def smoke_options(command: _Command) -> _Command:
    """Add ``--smoke`` and what belongs to it; the command gets ``smoke``, a flag, and one ``smoke_options``."""

    @functools.wraps(command)
    def run(*args: Any, layers: str | None, sample: int | None, backend: str, **rest: Any) -> None:
        command(*args, smoke_options=SmokeOptions(layers, sample, backend), **rest)

    decorators = [
        click.option("--smoke", is_flag=True, help="Also run random tokens through the layers, on a GPU if possible."),
        click.option("--layers", metavar="LIST", help="With --smoke: only these layers, for example 1,4-6."),
        click.option("--sample", type=click.IntRange(1), help="With --smoke: only so many experts of each layer."),
        click.option(
            "--backend",
            type=click.Choice(BACKENDS),
            default="auto",
            show_default=True,
            help="With --smoke: what runs the layers.",
        ),
    ]
    return decorated(run, decorators)  # type: ignore[return-value]


def check_smoke(checkpoint: str, options: SmokeOptions) -> None:
    """Raise what :func:`smoke_run` would raise for these options, before the verification, which takes long."""
    from nvfp4_prep.smoke.run import check_smoke as check

    check(checkpoint, layers=options.layers, backend=options.backend)


def smoke_run(checkpoint: str, source: str | None, options: SmokeOptions, *, quiet: bool) -> SmokeReport:
    """Run it, and tell of each layer on stderr."""
    return nvfp4_prep.run_smoke(
        checkpoint,
        source,
        layers=options.layers,
        sample=options.sample,
        backend=options.backend,
        on_layer=_tell_layer(quiet=quiet),
    )


def smoke_policy(*, quiet: bool) -> SmokePolicy:
    """Return the library's default, which tells of each layer on stderr."""
    return nvfp4_prep.SmokePolicy(on_layer=_tell_layer(quiet=quiet))


def _tell_layer(*, quiet: bool) -> Callable[[LayerReport, int, int], None] | None:
    """Return what prints a line for each layer, with the time that the others will take if they are alike."""
    spent_s: list[float] = []

    def tell(layer: LayerReport, number: int, total: int) -> None:
        spent_s.append(layer.seconds)
        left_s = sum(spent_s) / len(spent_s) * (total - number)
        hint(layer_line(layer, number, total) + (f", about {format_duration(left_s)} left" if number < total else ""))

    return None if quiet else tell


def say_smoke(report: SmokeReport | None) -> None:
    """Print the outcome on stdout, and what to do about a failure on stderr."""
    if report is None:
        return
    say_text(smoke_text(report))
    if not report.passed:
        hint("error: the smoke test failed: do not serve this checkpoint, report it")
