"""The group of all commands, and the errors of the command line itself."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from difflib import SequenceMatcher
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import click

from nvfp4_prep._util.system import check_linux
from nvfp4_prep._version import __version__
from nvfp4_prep.cli.frame import start_clock
from nvfp4_prep.cli.output import report_errors, stdout_failed
from nvfp4_prep.errors import EXIT_CODES, UsageError

__all__ = ["cli"]

_LIKE = 0.65
_EXIT_CODES = "\b\nExit codes:\n" + "\n".join(f"  {code:3}  {meaning}" for code, meaning in sorted(EXIT_CODES.items()))


class _Commands(click.Group):
    """A group that imports the module of a command when the command is asked for, as in click's documentation, and
    whose errors look like those of its commands.

    The modules import neither torch nor the Hub's client: ``--help`` shows at once. What a command calls is an
    attribute of the package ``nvfp4_prep``, which imports it on first use.
    """

    names = (
        "bench-load",
        "completion",
        "convert",
        "doctor",
        "inspect",
        "push",
        "relayout",
        "restamp",
        "restore",
        "sample",
        "verify",
    )

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands."""
        return list(self.names)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command, from the module of its name."""
        if cmd_name not in self.names:
            return None
        name = cmd_name.replace("-", "_")
        command: click.Command = getattr(import_module(f"nvfp4_prep.cli.{name}"), name)
        return command

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any) -> NoReturn:  # type: ignore[override]
        """Run the command line as click does, with our errors; always ends with :class:`SystemExit`."""
        words = sys.argv[1:] if args is None else list(args)
        start_clock()
        with report_errors("--json" in words):
            _check_surroundings(words)
            try:
                code = super().main(words, prog_name, **{**extra, "standalone_mode": False})
            except click.UsageError as error:
                if not words:  # the help, not a complaint
                    error.show()
                    sys.exit(error.exit_code)
                raise _usage_error(error, words) from error
            except click.ClickException as error:
                raise UsageError(error.format_message()) from error
            except click.Abort as error:  # Ctrl-C before the command had begun
                raise KeyboardInterrupt from error
            except OSError as error:  # of --help and --version: a command's own do not come here
                code = 0
                stdout_failed(error)
        sys.exit(code or 0)


def _check_surroundings(words: Sequence[str]) -> None:
    if not {"-h", "--help", "--version"} & {*words}:
        check_linux()
    if "" in words:
        raise UsageError("an argument is empty", next_step="Is a variable of your shell not set?")
    try:
        Path.cwd()
    except FileNotFoundError as error:  # torch would end the process, with a message about a library
        raise UsageError("the current directory was removed", next_step="Go to another one.") from error


def _usage_error(error: click.UsageError, words: Sequence[str]) -> UsageError:
    asked = [word for word in words if word in _Commands.names]
    name = error.ctx.command_path if error.ctx is not None else " ".join(["nvfp4-prep", *asked[:1]])
    if isinstance(error, click.NoSuchOption):
        likely = [known for known in error.possibilities or () if _is_like(error.option_name, known)]
        error = click.NoSuchOption(error.option_name, possibilities=likely, ctx=error.ctx)
    text, guess, known = " ".join(error.format_message().split()).rstrip(".").partition(" Did you mean ")
    return UsageError(text.rstrip("."), next_step=f"{guess}{known} See {name} --help.".strip())


def _is_like(option: str, known: str) -> bool:
    """Return whether one may be meant by the other: click guesses ``--private`` for ``--overwrite``."""
    return SequenceMatcher(None, option, known).ratio() > _LIKE


@click.group(
    "nvfp4-prep",
    cls=_Commands,
    epilog=_EXIT_CODES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="nvfp4-prep")
def cli() -> None:
    """Prepare NVFP4 mixture-of-experts checkpoints for FlashInfer's fused-MoE kernels, CuteDSL and
    TRTLLM-gen.

    \b
    nvfp4-prep doctor                                     what will work on this machine?
    nvfp4-prep inspect  nvidia/Kimi-K2.5-NVFP4            what is it, and can it be prepared?
    nvfp4-prep convert  nvidia/Kimi-K2.5-NVFP4 ./out      prepare it; for a B200 see --layout in its help
    nvfp4-prep verify   ./out --source ./source           check every byte against its source
    nvfp4-prep bench-load ./out --tp 8                    how fast will this host load it?
    nvfp4-prep push     ./out me/Kimi-K2.5-NVFP4-prepared publish it
    nvfp4-prep relayout ./out ./out2 --layout trtllm      another kernel's layout, without the source
    nvfp4-prep restamp  ./out                             keep edits of its config.json
    nvfp4-prep restore  ./out ./back                      rebuild the source, bit for bit

    vLLM and SGLang with this package installed serve the result as it is: vllm serve ./out

    Every command but completion has --json, and every --help has examples. Results go to stdout, progress and
    hints to stderr. Ctrl-C and kills are harmless: the same command continues.
    """
