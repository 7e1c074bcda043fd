"""``nvfp4-prep bench-load``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

import nvfp4_prep
from nvfp4_prep._util.printable import join_lines
from nvfp4_prep._util.text import count, format_duration, format_nbytes
from nvfp4_prep.cli.help import HelpfulCommand
from nvfp4_prep.cli.options import checkpoint_argument, common
from nvfp4_prep.cli.output import hint, say_json, say_text

if TYPE_CHECKING:
    from nvfp4_prep import LoadBench, LoadFigures

__all__ = ["bench_load"]

_SIZES = click.IntRange(1, 64)


@click.command("bench-load", cls=HelpfulCommand)
@checkpoint_argument()
@click.option("--tp", type=_SIZES, default=1, show_default=True, help="Tensor-parallel size.")
@click.option("--ep", type=_SIZES, default=1, show_default=True, help="Expert-parallel size; tp x ep processes.")
@click.option("--layers", type=click.IntRange(1), default=1, show_default=True, help="How many layers to load.")
@click.option(
    "--from",
    "kind",
    type=click.Choice(["cold", "cache", "both"]),
    default="both",
    show_default=True,
    help="Drop the files from the page cache before each repetition, leave them in it, or measure one after the other.",
)
@click.option(
    "--device", type=click.Choice(["cuda", "cpu"]), help="Device to load to.  [default: GPUs, else host memory]"
)
@click.option(
    "--threads", type=click.IntRange(1, 1024), help="Reading threads a rank.  [default: its part of the cores]"
)
@click.option("--repeats", type=click.IntRange(1, 1000), default=3, show_default=True, help="Repetitions of each kind.")
@click.option("--alone", is_flag=True, help="Let each tensor-parallel rank read its columns by itself.")
@common
def bench_load(
    checkpoint: Path,
    tp: int,
    ep: int,
    layers: int,
    kind: str,
    device: str | None,
    threads: int | None,
    repeats: int,
    alone: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure how fast this host loads a prepared CHECKPOINT, and what limits it.

    Starts tp x ep processes that load the experts of the first layers all at once, as a server's ranks do with
    --load-format nvfp4_prep. Nothing is written. Memory: these layers' experts once, on the GPUs or in host memory.

    \b
    nvfp4-prep bench-load ./out --tp 8
    nvfp4-prep bench-load ./out --ep 8 --layers 4 --from cold --json
    """
    if not quiet:
        hint(f"starting the processes of {count(tp * ep, 'rank')}")
    found = nvfp4_prep.bench_load(
        checkpoint,
        tp=tp,
        ep=ep,
        layers=layers,
        device=device,
        threads=threads,
        repeats=repeats,
        cold={"cold": True, "cache": False, "both": None}[kind],
        together=not alone,
    )
    if as_json:
        say_json(found.to_dict())
    else:
        say_text(_text(found))


def _text(found: LoadBench) -> str:
    ranks = found.tp * found.ep
    way = "columns exchanged between ranks" if found.together else f"each rank by itself: {found.alone_because}"
    lines = [
        f"{found.path} on {found.storage}: {found.layers} of {count(found.all_layers, 'layer')},"
        f" {format_nbytes(found.nbytes)} of experts",
        f"TP {found.tp} x EP {found.ep}: {count(ranks, 'rank')} with {count(found.threads, 'reading thread')} each;"
        f" {way}",
    ]
    for figures in found.figures:
        lines += ["", *_figures_lines(found, figures)]
    return join_lines(lines)


def _figures_lines(found: LoadBench, figures: LoadFigures) -> list[str]:
    kind = "cold" if figures.cold else "from the page cache"
    if figures.cold and figures.cached_share > 0.01:
        kind = f"meant to be cold, but {100 * figures.cached_share:.0f} % stayed in the page cache"
    low, high = min(figures.seconds), max(figures.seconds)
    mean = figures.read_nbytes / figures.reads if figures.reads else 0.0
    return [
        f"{kind}: {figures.median_s:.3f} s ({low:.3f} to {high:.3f}), {found.gb_per_s(figures):.2f} GB/s of the host",
        f"  read {format_nbytes(figures.read_nbytes)} ({figures.read_nbytes / found.nbytes:.2f} x the experts) in"
        f" {count(figures.reads, 'request')} of {mean / 1e6:.2f} MB on average",
        f"  limited by {figures.limit}: {figures.limit.advice}",
        f"  all {count(found.all_layers, 'layer')} at this rate: {format_nbytes(found.all_nbytes)} in"
        f" {format_duration(found.whole_model_s(figures))}",
        *(
            f"  rank {number} (TP {rank.tp_rank}, EP {rank.ep_rank}, {rank.device}): {rank.seconds:.3f} s,"
            f" {rank.gb_per_s:.2f} GB/s, {format_nbytes(rank.read_nbytes)} in {count(rank.reads, 'request')}"
            for number, rank in enumerate(figures.ranks)
        ),
    ]
