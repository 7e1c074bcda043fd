"""Arguments and options that several commands share, and the library's values that they become."""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import click

from nvfp4_prep._util import arguments
from nvfp4_prep._util.arguments import Kind
from nvfp4_prep.cli.output import report_errors
from nvfp4_prep.hub.publish_options import PublishOptions
from nvfp4_prep.layouts import GATE_UP_BLOCKS, LayoutName
from nvfp4_prep.options import MAX_MOE_TP, ConvertOptions, GateUpPolicy

__all__ = [
    "EnumChoice",
    "checkpoint_argument",
    "common",
    "conversion_options",
    "decorated",
    "gate_up_block_option",
    "layout_option",
    "memory_option",
    "moe_tp_option",
    "publishing_options",
    "report_option",
    "restart_option",
    "source_argument",
    "target_argument",
    "threads_option",
]

_Command = TypeVar("_Command", bound=Callable[..., Any])
_Member = TypeVar("_Member", bound=enum.StrEnum)


class _CheckedPath(click.Path):
    """A path, of which nothing is required but that there can be one; shells complete it."""

    def __init__(self, kind: Kind, *, directory: bool = True) -> None:
        super().__init__(dir_okay=directory, file_okay=not directory)
        self._kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return what the library takes it for; raises :class:`UsageError` for what is not a path."""
        if isinstance(param, click.Option):
            return self._kind.read(f"option {param.opts[0]}", value)
        return self._kind.read(f"argument {param.human_readable_name if param else ''}".strip(), value)


ADDRESS = _CheckedPath(arguments.ADDRESS)
"""A directory or a Hub id."""
DIRECTORY = _CheckedPath(arguments.PATH)
"""A directory on this machine; each command says itself what is wrong with it."""
REPORT = _CheckedPath(arguments.PATH, directory=False)

source_argument = click.argument("source", type=ADDRESS)
target_argument = click.argument("target", type=DIRECTORY)
threads_option = click.option(
    "--threads",
    type=click.IntRange(1, 256),
    help="Workers; the output does not depend on it.  [default: usable CPUs + 1, at most 64]",
)
memory_option = click.option(
    "--memory",
    "memory_nbytes",
    type=click.IntRange(1, 2**40),
    metavar="MB",
    callback=lambda context, parameter, value: value and value * 10**6,
    help="Budget of the buffers, in MB (10^6 bytes); the output does not depend on it."
    "  [default: 134 a worker, at least 671, at most half of the usable memory]",
)
restart_option = click.option(
    "--restart", is_flag=True, help="Discard an unfinished earlier run instead of continuing it."
)


class EnumChoice(click.Choice[_Member]):
    """The members of an enum by their values; click's own choice goes by the names in the code."""

    def normalize_choice(self, choice: object, ctx: click.Context | None) -> str:
        """Return the member's value."""
        return choice.value if isinstance(choice, enum.StrEnum) else super().normalize_choice(choice, ctx)


def checkpoint_argument(*, on_hub: bool = False) -> Callable[[_Command], _Command]:
    """Return the argument CHECKPOINT, a text where it may be a Hub id too, and a :class:`Path` elsewhere."""
    return click.argument("checkpoint", type=ADDRESS if on_hub else DIRECTORY)


def report_option(text: str) -> Callable[[_Command], _Command]:
    """Return ``--report``."""
    return click.option("--report", type=REPORT, help=text)


def common(command: _Command) -> _Command:
    """Add ``--json``, ``--quiet``, ``--verbose`` and ``--log-file``, and turn typed errors into one line and an exit
    code.
    """

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
    @click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")
    @click.option("-v", "--verbose", is_flag=True, help="Each step with its time on stderr.")
    @click.option("--log-file", type=REPORT, help="Append each step with its time to this log.")
    @functools.wraps(command)
    def run(*args: Any, as_json: bool, verbose: bool, log_file: Path | None, **kwargs: Any) -> None:
        from nvfp4_prep.cli.log import logging_steps

        with report_errors(as_json), logging_steps(verbose=verbose, path=log_file, parameters=kwargs):
            command(*args, as_json=as_json, **kwargs)

    return run  # type: ignore[return-value]


def layout_option(text: str, **extra: Any) -> Callable[[_Command], _Command]:
    """Return ``--layout``."""
    return click.option("--layout", type=EnumChoice(LayoutName), help=text, **extra)


def gate_up_block_option(**extra: Any) -> Callable[[_Command], _Command]:
    """Return ``--gate-up-block``."""
    return click.option(
        "--gate-up-block", type=click.Choice(GATE_UP_BLOCKS), help="Rows in one gate/up block.", **extra
    )


def moe_tp_option(text: str, **extra: Any) -> Callable[[_Command], _Command]:
    """Return ``--moe-tp``."""
    return click.option("--moe-tp", type=click.IntRange(1, MAX_MOE_TP), help=text, **extra)


def conversion_options(command: _Command) -> _Command:
    """Add the options that decide the output's bytes; the command gets them as one ``options``."""

    @functools.wraps(command)
    def run(
        *args: Any, layout: LayoutName, gate_up_block: int, gate_up_scales: GateUpPolicy, moe_tp: int, **kwargs: Any
    ) -> None:
        command(*args, options=ConvertOptions(layout, gate_up_block, gate_up_scales, moe_tp), **kwargs)

    def default(value: object) -> dict[str, Any]:
        return {"default": value, "show_default": not isinstance(value, enum.StrEnum)}  # click shows their names

    decorators = [
        layout_option(
            "Kernel to prepare for. A B200 server without flags runs trtllm; cutedsl-batched is for DeepEP low latency."
            f"  [default: {_DEFAULT.layout}]",
            **default(_DEFAULT.layout),
        ),
        gate_up_block_option(**default(_DEFAULT.gate_up_block)),
        click.option(
            "--gate-up-scales",
            type=EnumChoice(GateUpPolicy),
            help="Where gate and up have different global scales: rescale one side, take gate's, or refuse."
            f"  [default: {_DEFAULT.gate_up_scales}]",
            **default(_DEFAULT.gate_up_scales),
        ),
        moe_tp_option("Tensor-parallel size to pad for, where padding depends on it.", **default(_DEFAULT.moe_tp)),
    ]
    return decorated(run, decorators)  # type: ignore[return-value]


_DEFAULT = ConvertOptions
"""Its attributes are the fields' defaults; an instance would check them, for which it imports torch."""


def publishing_options(condition: str = "") -> Callable[[_Command], _Command]:
    """Add where and how to publish; the command gets that as ``publish_options``.

    Args:
        condition: what the help says first, where the command publishes only if it is asked to.
    """

    def option(name: str, text: str, **kind: Any) -> Callable[[_Command], _Command]:
        return click.option(name, help=condition + (text if not condition else text[0].lower() + text[1:]), **kind)

    def decorate(command: _Command) -> _Command:
        @functools.wraps(command)
        def run(*args: Any, private: bool, revision: str | None, create_pr: bool, **kwargs: Any) -> None:
            command(*args, publish_options=PublishOptions(private, revision, create_pr), **kwargs)

        decorators = [
            option("--private", "Make the repository private.", is_flag=True),
            option("--revision", "Branch to publish on; created if it does not exist.", metavar="BRANCH"),
            option("--create-pr", "Publish as a pull request; an open one is continued.", is_flag=True),
        ]
        return decorated(run, decorators)  # type: ignore[return-value]

    return decorate


def decorated(command: Callable[..., None], decorators: Iterable[Callable[..., Any]]) -> Callable[..., None]:
    """Return the command under several decorators, the first one outermost."""
    for decorator in reversed(list(decorators)):
        command = decorator(command)
    return command
