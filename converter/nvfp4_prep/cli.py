"""The command line: a thin shell around the library's functions of the same names.

Data goes to stdout, progress and hints to stderr. torch is imported by the commands, not by ``--help``.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from nvfp4_prep import __version__
from nvfp4_prep.errors import EXIT_CODES, ConversionInterrupted, NvfpPrepError, UsageError, VerificationError

if TYPE_CHECKING:
    from nvfp4_prep.hub.push import PushResult
    from nvfp4_prep.options import ConvertOptions
    from nvfp4_prep.progress import Progress

__all__ = ["cli", "main"]

_Command = TypeVar("_Command", bound=Callable[..., Any])
_EXIT_CODES = "Exit codes: " + ", ".join(f"{code} {meaning}" for code, meaning in sorted(EXIT_CODES.items())) + "."


@click.group(epilog=_EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="nvfp4-prep")
def cli() -> None:
    """Prepare NVFP4 mixture-of-experts checkpoints for FlashInfer's CuteDSL fused-MoE kernel.

    \b
    nvfp4-prep inspect  ./DeepSeek-NVFP4               what is it, and can it be prepared?
    nvfp4-prep convert  ./DeepSeek-NVFP4 ./out         prepare it
    nvfp4-prep verify   ./out --source ./DeepSeek-NVFP4   check every byte
    nvfp4-prep restore  ./out ./back                   and back again
    nvfp4-prep relayout ./out ./out16 --gate-up-block 16  another layout, without the source
    nvfp4-prep push     ./out me/DeepSeek-NVFP4-prepared  publish it
    """


def _common(command: _Command) -> _Command:
    """``--json`` and ``--quiet``, typed errors as one line, exit codes."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
    @click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")
    @functools.wraps(command)
    def run(*args: Any, as_json: bool, **kwargs: Any) -> None:
        try:
            command(*args, as_json=as_json, **kwargs)
        except NvfpPrepError as error:
            _fail(error, as_json=as_json)
        except KeyboardInterrupt:
            _fail(ConversionInterrupted("interrupted", next_step="The same command continues."), as_json=as_json)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    return run  # type: ignore[return-value]


def _fail(error: NvfpPrepError, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(error.to_dict()))
    click.echo(f"error: {error}", err=True)
    sys.exit(error.exit_code)


def _threads(command: _Command) -> _Command:
    option = click.option(
        "--threads", type=click.IntRange(1, 256), help="Workers; the output does not depend on it.  [default: CPUs + 1]"
    )
    return option(command)


def _restart(command: _Command) -> _Command:
    option = click.option("--restart", is_flag=True, help="Discard an unfinished earlier run instead of continuing it.")
    return option(command)


def _conversion_options(command: _Command) -> _Command:
    """The options that decide the output's bytes."""
    decorators = [
        click.option(
            "--layout",
            type=click.Choice(["cutedsl", "cutedsl-batched"]),
            default="cutedsl",
            show_default=True,
            help="Kernel to prepare for; the batched one is for DeepEP low latency.",
        ),
        click.option(
            "--gate-up-block",
            type=click.Choice(["64", "32", "16"]),
            default="64",
            show_default=True,
            help="Rows in one gate/up block.",
        ),
        click.option(
            "--gate-up-scales",
            type=click.Choice(["reconcile", "vllm", "error"]),
            default="reconcile",
            show_default=True,
            help="Where gate and up have different global scales: rescale one side, take gate's, or refuse.",
        ),
        click.option(
            "--moe-tp",
            type=click.IntRange(1, 1024),
            default=1,
            show_default=True,
            help="Tensor-parallel size to pad for, where padding depends on it.",
        ),
    ]
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


def _options(layout: str, gate_up_block: str, gate_up_scales: str, moe_tp: int) -> ConvertOptions:
    from nvfp4_prep.options import ConvertOptions, GateUpPolicy, LayoutName

    return ConvertOptions(LayoutName(layout), int(gate_up_block), GateUpPolicy(gate_up_scales), moe_tp)


def _publishing(command: _Command) -> _Command:
    """Where and how to publish."""
    decorators = [
        click.option("--private", is_flag=True, help="Make the repository a private one."),
        click.option("--revision", metavar="BRANCH", help="Branch to publish on; made if it does not exist."),
        click.option("--create-pr", is_flag=True, help="Publish as a pull request; an open one is continued."),
    ]
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


def _progress(quiet: bool) -> Progress:
    from nvfp4_prep.progress import choose_progress

    return choose_progress(quiet=quiet)


@cli.command()
@click.argument("source")
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing; downloads headers only.")
@click.option("--keep-source", is_flag=True, help="Download to the Hugging Face cache and leave the source there.")
@click.option("--push-to", metavar="USER/NAME", help="Publish each finished file on the Hub while the next is made.")
@click.option("--stream-out", is_flag=True, help="With --push-to: delete each file here once it is published.")
@_publishing
@_conversion_options
@_threads
@_restart
@_common
def convert(
    source: str,
    target: Path,
    dry_run: bool,
    keep_source: bool,
    push_to: str | None,
    stream_out: bool,
    private: bool,
    revision: str | None,
    create_pr: bool,
    layout: str,
    gate_up_block: str,
    gate_up_scales: str,
    moe_tp: int,
    threads: int | None,
    restart: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Prepare the experts of SOURCE and write a checkpoint to TARGET.

    SOURCE is a directory or a Hub id: ORG/NAME, ORG/NAME@REVISION, hf://ORG/NAME. Killed at any moment, the same
    command continues and ends with the same bytes.

    \b
    nvfp4-prep convert ./DeepSeek-NVFP4 ./out --dry-run
    nvfp4-prep convert ./DeepSeek-NVFP4 ./out
    nvfp4-prep convert nvidia/Kimi-K2.5-NVFP4 ./out --push-to me/Kimi-K2.5-NVFP4-prepared --stream-out
    """
    from nvfp4_prep import conversion
    from nvfp4_prep.hub import open_source
    from nvfp4_prep.reporting import plan_text, plan_value, relative_error_text
    from nvfp4_prep.units import format_nbytes

    options = _options(layout, gate_up_block, gate_up_scales, moe_tp)
    _check_publishing(push_to, stream_out=stream_out, others=private or create_pr or revision is not None)
    opened = open_source(source, target=target, keep_source=keep_source)
    if dry_run:
        made = conversion.plan(opened, options)
        room = 0 if isinstance(opened, str) else opened.room_nbytes(made.shard_order(), made.peak_shards_nbytes)
        click.echo(json.dumps(plan_value(made, room)) if as_json else plan_text(made, room))
        return
    pushed: PushResult | None = None
    if push_to is None:
        result = conversion.convert(
            opened, target, options, threads=threads, progress=_progress(quiet), restart=restart
        )
    else:
        from nvfp4_prep.hub import quiet_client
        from nvfp4_prep.hub.remote import PublishOptions
        from nvfp4_prep.hub.stream import convert_and_publish

        quiet_client()
        result, pushed = convert_and_publish(
            opened,
            target,
            push_to,
            options,
            publish_options=PublishOptions(private=private, revision=revision, create_pr=create_pr),
            stream_out=stream_out,
            threads=threads,
            progress=_progress(quiet),
            restart=restart,
        )
    manifest = result.manifest
    if as_json:
        value = {
            "path": str(result.path),
            "already_complete": result.already_complete,
            "resumed": result.resumed,
            "written_nbytes": result.written_nbytes,
            "layers": len(manifest.layers),
            "tp_sizes": list(manifest.tp_sizes),
            "verified": [dict(check) for check in manifest.verified],
            "pushed": None if pushed is None else pushed.to_dict(),
        }
        click.echo(json.dumps(value))
        return
    if pushed is not None:
        _say_pushed(pushed)
    if result.already_complete:
        click.echo(f"{result.path} is complete already: nothing to do. Check it with nvfp4-prep verify {target}")
        return
    differing = sum(layer.gate_up.differing for layer in manifest.layers)
    click.echo(
        f"{result.path}: {len(manifest.layers)} MoE layers prepared, {format_nbytes(result.written_nbytes)} written"
        f"{' (continued)' if result.resumed else ''}"
    )
    click.echo(f"serves tensor-parallel sizes {', '.join(map(str, manifest.tp_sizes)) or 'none in common'}")
    if differing:
        worst = max(
            (layer.gate_up.figures["relative_error"] for layer in manifest.layers if layer.gate_up.differing),
            key=lambda errors: float(errors[gate_up_scales]),
        )
        click.echo(
            f"gate/up global scales differed in {differing} experts ({gate_up_scales}); worst layer's"
            f" {relative_error_text(worst)}"
        )
        if gate_up_scales == "vllm":
            click.echo("warning: up's own scales are ignored as vLLM does; reconcile keeps them", err=True)
    for check in manifest.verified:
        click.echo(f"verified: {check['check']}: {check['result']}")
    click.echo(f"next: nvfp4-prep verify {target} --source {source}", err=True)


def _check_publishing(push_to: str | None, *, stream_out: bool, others: bool) -> None:
    if push_to is None and (stream_out or others):
        raise UsageError(
            "--stream-out, --private, --revision and --create-pr say how to publish, but not where",
            next_step="Add --push-to USER/NAME.",
        )


def _say_pushed(pushed: PushResult) -> None:
    from nvfp4_prep.units import format_nbytes

    click.echo(
        f"{pushed.page}: {pushed.files} files, {format_nbytes(pushed.nbytes)}, compared with the manifest"
        f" at commit {pushed.commit}"
    )
    click.echo(f"serve it: {pushed.serve}")


@cli.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("repository", metavar="USER/NAME")
@_publishing
@click.option("--full", is_flag=True, help="Check every byte before, not only structure, sizes and headers.")
@_threads
@_common
def push(
    checkpoint: Path,
    repository: str,
    private: bool,
    revision: str | None,
    create_pr: bool,
    full: bool,
    threads: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Publish a prepared CHECKPOINT on the Hugging Face Hub.

    What verify would not pass is refused; the files that make it loadable come last, after all others were compared
    with the manifest. Killed at any moment, the same command continues.
    """
    from nvfp4_prep.hub import push as pushing
    from nvfp4_prep.hub import quiet_client
    from nvfp4_prep.hub.remote import PublishOptions

    quiet_client()
    options = PublishOptions(private=private, revision=revision, create_pr=create_pr)
    pushed = pushing.push(checkpoint, repository, options, full=full, threads=threads, progress=_progress(quiet))
    if as_json:
        click.echo(json.dumps(pushed.to_dict()))
        return
    _say_pushed(pushed)
    click.echo(f"next: nvfp4-prep verify {repository}{'' if not revision else '@' + revision}", err=True)


@cli.command()
@click.argument("checkpoint")
@_common
def inspect(checkpoint: str, as_json: bool, quiet: bool) -> None:
    """Say what CHECKPOINT is: format, MoE layers, sizes, prepared or not, and what convert would do with it."""
    from nvfp4_prep import inspection
    from nvfp4_prep.hub import open_source
    from nvfp4_prep.reporting import inspection_text, inspection_value

    found = inspection.inspect(open_source(checkpoint))
    click.echo(json.dumps(inspection_value(found)) if as_json else inspection_text(found))


@cli.command()
@click.argument("checkpoint")
@click.option("--source", help="Compare with this source too, byte by byte.")
@click.option("--quick", is_flag=True, help="Only what needs no tensor bytes: manifest, config, sizes, headers, index.")
@_threads
@_common
def verify(checkpoint: str, source: str | None, quick: bool, threads: int | None, as_json: bool, quiet: bool) -> None:
    """Check a prepared CHECKPOINT: structure, checksums, and that every byte turns back into the source.

    A published one (USER/NAME[@REVISION]) is checked by what the Hub lists, without downloading its weights.
    """
    from nvfp4_prep import verification
    from nvfp4_prep.hub import parse_address, quiet_client
    from nvfp4_prep.reporting import verify_text

    address = parse_address(checkpoint)
    if address is None:
        report = verification.verify(checkpoint, source=source, quick=quick, threads=threads, progress=_progress(quiet))
    elif source is not None:
        raise UsageError("--source needs the bytes of CHECKPOINT", where=checkpoint, next_step="Download it first.")
    else:
        from nvfp4_prep.hub.published import verify_published

        quiet_client()
        report = verify_published(address)
    click.echo(json.dumps(report.to_dict()) if as_json else verify_text(report))
    if not report.ok:
        sys.exit(VerificationError.exit_code)


@cli.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@_threads
@_restart
@_common
def restore(checkpoint: Path, target: Path, threads: int | None, restart: bool, as_json: bool, quiet: bool) -> None:
    """Write the source of a prepared CHECKPOINT to TARGET: every tensor and config as it was."""
    from nvfp4_prep import restoration
    from nvfp4_prep.units import format_nbytes

    result = restoration.restore(checkpoint, target, threads=threads, progress=_progress(quiet), restart=restart)
    if as_json:
        value = {"path": str(result.path), "tensors": result.tensors, "written_nbytes": result.written_nbytes}
        click.echo(json.dumps({**value, "resumed": result.resumed}))
        return
    click.echo(f"{result.path}: {result.tensors} tensors restored, {format_nbytes(result.written_nbytes)} written")


@cli.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--layout", type=click.Choice(["cutedsl", "cutedsl-batched"]), help="Kernel to prepare for.")
@click.option("--gate-up-block", type=click.Choice(["64", "32", "16"]), help="Rows in one gate/up block.")
@click.option("--moe-tp", type=click.IntRange(1, 1024), help="Tensor-parallel size to pad for.")
@_threads
@_restart
@_common
def relayout(
    checkpoint: Path,
    target: Path,
    layout: str | None,
    gate_up_block: str | None,
    moe_tp: int | None,
    threads: int | None,
    restart: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write a prepared CHECKPOINT to TARGET in another layout, without its source.

    What is not given stays as it is.

    \b
    nvfp4-prep relayout ./out ./out16 --gate-up-block 16
    """
    from nvfp4_prep import new_layout
    from nvfp4_prep.options import LayoutName
    from nvfp4_prep.units import format_nbytes

    result = new_layout.relayout(
        checkpoint,
        target,
        layout=None if layout is None else LayoutName(layout),
        gate_up_block=None if gate_up_block is None else int(gate_up_block),
        moe_tp=moe_tp,
        threads=threads,
        progress=_progress(quiet),
        restart=restart,
    )
    options, sizes = result.manifest.options.to_dict(), result.manifest.tp_sizes
    if as_json:
        value = {"path": str(result.path), "options": options, "written_nbytes": result.written_nbytes}
        click.echo(json.dumps({**value, "tp_sizes": list(sizes), "resumed": result.resumed}))
        return
    click.echo(
        f"{result.path}: {len(result.manifest.layers)} MoE layers in layout {options['layout']}, gate/up block"
        f" {options['gate_up_block']}, moe-tp {options['moe_tp']}, {format_nbytes(result.written_nbytes)} written"
    )
    click.echo(f"serves tensor-parallel sizes {', '.join(map(str, sizes)) or 'none in common'}")
    click.echo(f"next: nvfp4-prep verify {target}", err=True)


@cli.command()
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--layers", default=3, show_default=True, help="Decoder layers; the first one is dense.")
@click.option("--experts", default=8, show_default=True)
@click.option("--intermediate", default=128, show_default=True, help="Intermediate size of one expert.")
@click.option("--hidden", default=256, show_default=True)
@click.option("--vocabulary", default=256, show_default=True)
@click.option("--shard-mb", default=5000.0, show_default=True, help="Largest shard, in MB (10^6 bytes).")
@click.option("--differing", default=0.0, show_default=True, help="Share of experts with different gate/up scales.")
@click.option("--seed", default=0, show_default=True)
@click.option("--kimi-layer", is_flag=True, help="One MoE layer at Kimi-K2.5's dimensions (9.5 GB).")
@_common
def sample(
    target: Path,
    layers: int,
    experts: int,
    intermediate: int,
    hidden: int,
    vocabulary: int,
    shard_mb: float,
    differing: float,
    seed: int,
    kimi_layer: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write a random NVFP4 MoE checkpoint to TARGET, in ModelOpt's format, to try things out."""
    from dataclasses import replace

    from nvfp4_prep.sample import KIMI_LAYER, SampleModel, write_sample
    from nvfp4_prep.units import format_nbytes

    nbytes = int(shard_mb * 1e6)
    if kimi_layer:
        model = replace(KIMI_LAYER, shard_nbytes=nbytes, seed=seed, differing=differing)
    else:
        model = SampleModel(layers, experts, intermediate, hidden, vocabulary, nbytes, differing, seed)
    written = write_sample(target, model)
    click.echo(
        json.dumps({"path": str(target), "nbytes": written}) if as_json else f"{target}: {format_nbytes(written)}"
    )


def main() -> None:
    """Entry point of ``nvfp4-prep``."""
    signal.signal(signal.SIGTERM, _terminate)
    cli(prog_name="nvfp4-prep")


def _terminate(number: int, frame: object) -> None:
    raise KeyboardInterrupt
