"""``nvfp4-prep sample``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click
from click.core import ParameterSource

import nvfp4_prep
from nvfp4_prep._util.text import format_nbytes
from nvfp4_prep.cli.help import HelpfulCommand
from nvfp4_prep.cli.options import common, target_argument
from nvfp4_prep.cli.output import say, say_json
from nvfp4_prep.errors import UsageError

__all__ = ["sample"]


@click.command(cls=HelpfulCommand)
@target_argument
@click.option(
    "--layers", type=click.IntRange(2), default=3, show_default=True, help="Decoder layers; the first one is dense."
)
@click.option("--experts", type=click.IntRange(1), default=8, show_default=True, help="Experts of one layer.")
@click.option(
    "--intermediate", type=click.IntRange(16), default=128, show_default=True, help="Intermediate size of one expert."
)
@click.option("--hidden", type=click.IntRange(16), default=256, show_default=True, help="Hidden size of the model.")
@click.option("--vocabulary", type=click.IntRange(1), default=256, show_default=True, help="Rows of the embedding.")
@click.option(
    "--shard-mb", type=click.IntRange(1), default=5000, show_default=True, help="Largest shard, in MB (10^6 bytes)."
)
@click.option(
    "--differing",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="Share of experts with different gate/up scales.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    show_default=True,
    help="Seed of the random tensors; the same seed gives the same bytes.",
)
@click.option("--kimi-layer", is_flag=True, help="One MoE layer at Kimi-K2.5's dimensions (9.5 GB).")
@common
def sample(
    target: Path,
    layers: int,
    experts: int,
    intermediate: int,
    hidden: int,
    vocabulary: int,
    shard_mb: int,
    differing: float,
    seed: int,
    kimi_layer: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write a random NVFP4 MoE checkpoint to TARGET, in ModelOpt's format, to try things out.

    \b
    nvfp4-prep sample ./sample                  a few MB
    nvfp4-prep sample ./layer --kimi-layer      one layer as large as Kimi-K2.5's
    """
    nbytes = shard_mb * 10**6
    if kimi_layer:
        _check_none_given("layers", "experts", "intermediate", "hidden", "vocabulary")
        model = replace(nvfp4_prep.KIMI_LAYER, shard_nbytes=nbytes, seed=seed, differing=differing)
    else:
        model = nvfp4_prep.SampleModel(layers, experts, intermediate, hidden, vocabulary, nbytes, differing, seed)
    written = nvfp4_prep.write_sample(target, model)
    if as_json:
        say_json({"path": str(target), "nbytes": written})
    else:
        say(f"{target}: {format_nbytes(written)}")


def _check_none_given(*names: str) -> None:
    """Raise :class:`UsageError` for dimensions beside ``--kimi-layer``, which has its own."""
    context = click.get_current_context()
    given = [f"--{name}" for name in names if context.get_parameter_source(name) is not ParameterSource.DEFAULT]
    if given:
        raise UsageError(
            f"--kimi-layer has Kimi-K2.5's dimensions, {', '.join(given)} would change them",
            next_step="Leave one of them out.",
        )
