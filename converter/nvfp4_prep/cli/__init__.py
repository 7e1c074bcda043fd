"""The command line: a thin shell around the library's functions of the same names.

One module for a command. Data goes to stdout, progress and hints to stderr. torch is imported by the commands when
they run, not by ``--help``.
"""

from __future__ import annotations

import signal
import sys

import click

from nvfp4_prep import __version__
from nvfp4_prep.cli.check import inspect, verify
from nvfp4_prep.cli.convert import convert
from nvfp4_prep.cli.doctor import completion, doctor
from nvfp4_prep.cli.push import push
from nvfp4_prep.cli.relayout import relayout
from nvfp4_prep.cli.restore import restore
from nvfp4_prep.cli.sample import sample
from nvfp4_prep.errors import EXIT_CODES, ConversionInterrupted

__all__ = ["cli", "main"]

_EXIT_CODES = "\b\nExit codes:\n" + "\n".join(f"  {code:3}  {meaning}" for code, meaning in sorted(EXIT_CODES.items()))


@click.group(epilog=_EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="nvfp4-prep")
def cli() -> None:
    """Prepare NVFP4 mixture-of-experts checkpoints for FlashInfer's CuteDSL fused-MoE kernel.

    \b
    nvfp4-prep doctor                                     what will work on this machine?
    nvfp4-prep inspect  nvidia/Kimi-K2.5-NVFP4            what is it, and can it be prepared?
    nvfp4-prep convert  nvidia/Kimi-K2.5-NVFP4 ./out      prepare it (a directory will do as well)
    nvfp4-prep verify   ./out --source ./source           check every byte against its source
    nvfp4-prep push     ./out me/Kimi-K2.5-NVFP4-prepared publish it
    nvfp4-prep relayout ./out ./out16 --gate-up-block 16  another layout, without the source
    nvfp4-prep restore  ./out ./back                      and back again, bit for bit

    vLLM with this package installed serves the result as it is: vllm serve ./out

    Every command has --json and examples in its --help. Results go to stdout, progress and hints to stderr.
    Ctrl-C and kills are harmless: the same command continues.
    """


for _command in (inspect, convert, verify, restore, relayout, push, sample, doctor, completion):
    cli.add_command(_command)


class _Interrupts:
    """Ctrl-C and SIGTERM as one :class:`KeyboardInterrupt`, also while modules are imported."""

    def __init__(self) -> None:
        self.seen = False
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup and the like
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: object) -> None:
        self.seen = True
        raise KeyboardInterrupt


def main() -> None:
    """Entry point of ``nvfp4-prep``."""
    interrupts = _Interrupts()
    try:
        cli(prog_name="nvfp4-prep")
    except SystemExit as exit_:
        if interrupts.seen and exit_.code == 1:  # click's own exit, before the command had begun
            sys.exit(ConversionInterrupted.exit_code)
        raise
