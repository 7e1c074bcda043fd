"""What the commands share: options, and their errors as one line."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from nvfp4_prep.cli.output import report_errors
from nvfp4_prep.errors import UsageError

if TYPE_CHECKING:
    from nvfp4_prep.publish.repository import PublishOptions

__all__ = [
    "Publishing",
    "check_repository",
    "common",
    "conversion_options",
    "decorated",
    "publishing_options",
    "restart_option",
    "threads_option",
]

_Command = TypeVar("_Command", bound=Callable[..., Any])


def common(command: _Command) -> _Command:
    """``--json`` and ``--quiet``, typed errors as one line, exit codes."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
    @click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")
    @functools.wraps(command)
    def run(*args: Any, as_json: bool, **kwargs: Any) -> None:
        with report_errors(as_json):
            command(*args, as_json=as_json, **kwargs)

    return run  # type: ignore[return-value]


def threads_option(command: _Command) -> _Command:
    """``--threads``."""
    option = click.option(
        "--threads", type=click.IntRange(1, 256), help="Workers; the output does not depend on it.  [default: CPUs + 1]"
    )
    return option(command)


def restart_option(command: _Command) -> _Command:
    """``--restart``."""
    option = click.option("--restart", is_flag=True, help="Discard an unfinished earlier run instead of continuing it.")
    return option(command)


def conversion_options(command: _Command) -> _Command:
    """The options that decide the output's bytes; the command gets them as one ``options``."""
    from_names = {"layout": str, "gate_up_block": int, "gate_up_scales": str, "moe_tp": int}

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        layout, block, scales, moe_tp = (kind(kwargs.pop(name)) for name, kind in from_names.items())
        with report_errors(kwargs["as_json"]):
            from nvfp4_prep.options import ConvertOptions, GateUpPolicy, LayoutName

            options = ConvertOptions(LayoutName(layout), block, GateUpPolicy(scales), moe_tp)
        command(*args, options=options, **kwargs)

    decorators = [
        click.option(
            "--layout",
            type=click.Choice(["cutedsl", "cutedsl-batched", "trtllm"]),
            default="cutedsl",
            show_default=True,
            help="Kernel to prepare for; vLLM and SGLang choose trtllm by themselves on a B200, cutedsl-batched is for"
            " DeepEP low latency.",
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
    return decorated(run, decorators)  # type: ignore[return-value]


def publishing_options(condition: str = "") -> Callable[[_Command], _Command]:
    """Where and how to publish; the command gets them as one :class:`Publishing`.

    Args:
        condition: what the help says first, where the command publishes only if it is asked to.
    """

    def option(name: str, text: str, **kind: Any) -> Callable[[_Command], _Command]:
        return click.option(name, help=condition + (text if not condition else text[0].lower() + text[1:]), **kind)

    def decorate(command: _Command) -> _Command:
        @functools.wraps(command)
        def run(*args: Any, private: bool, revision: str | None, create_pr: bool, **kwargs: Any) -> None:
            command(*args, publishing=Publishing(private, revision, create_pr), **kwargs)

        decorators = [
            option("--private", "Make the repository a private one.", is_flag=True),
            option("--revision", "Branch to publish on; made if it does not exist.", metavar="BRANCH"),
            option("--create-pr", "Publish as a pull request; an open one is continued.", is_flag=True),
        ]
        return decorated(run, decorators)  # type: ignore[return-value]

    return decorate


def decorated(command: Callable[..., None], decorators: list[Callable[[_Command], _Command]]) -> Callable[..., None]:
    """The command under several decorators, the first one outermost."""
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


@dataclass(frozen=True)
class Publishing:
    """How to publish, as the command line has it; the library's value needs the Hub's client."""

    private: bool = False
    revision: str | None = None
    create_pr: bool = False

    def options(self) -> PublishOptions:
        """The library's value. Raises :class:`UsageError` if the options exclude each other."""
        from nvfp4_prep.publish.repository import PublishOptions

        return PublishOptions(private=self.private, revision=self.revision, create_pr=self.create_pr)


def check_repository(text: str) -> None:
    """Raises :class:`UsageError` for what can be no repository, before the network is asked."""
    if len([part for part in text.split("/") if part]) != 2 or text.count("/") != 1:
        raise UsageError("is no repository of the Hub", where=text, expected="USER/NAME")
