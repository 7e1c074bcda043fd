"""The help of a command: its options in groups, the ones that most people need first, and where to read more."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import click

__all__ = ["GROUPS", "PAGES", "SUMMARIES", "HelpfulCommand", "learn_more"]

_RUN = ("Run", "threads memory_nbytes restart")
_OUTPUT = ("Output and log", "report as_json quiet verbose log_file")
_PUBLISHING = "private revision create_pr"

GROUPS: dict[str, tuple[tuple[str, str], ...]] = {
    "bench-load": (("Deployment to measure", "tp ep layers"), ("Measurement", "kind device threads repeats alone")),
    "completion": (),
    "convert": (
        ("Common", "dry_run layout moe_tp"),
        ("Layout and scales", "gate_up_block gate_up_scales"),
        ("Run", "threads memory_nbytes device restart no_smoke"),
        ("Several machines", "layers join"),
        ("Hugging Face Hub", f"keep_source push_to stream_out {_PUBLISHING}"),
    ),
    "doctor": (),
    "inspect": (),
    "push": (("Common", "dry_run full"), ("Repository", _PUBLISHING), ("Run", "threads")),
    "relayout": (("Layout", "layout moe_tp gate_up_block"), _RUN),
    "restamp": (),
    "restore": (_RUN,),
    "sample": (
        ("Model", "kimi_layer layers experts intermediate hidden vocabulary"),
        ("Contents", "differing seed shard_mb"),
    ),
    "verify": (
        ("Common", "source quick"),
        ("Smoke test", "smoke layers sample backend"),
        ("Run", "threads memory_nbytes"),
    ),
}
"""Groups of options by command, in the order of the help; each ends with the group that all commands share."""

PAGES = {
    "bench-load": "loading.md",
    "completion": "first-half-hour.md",
    "convert": "which-kernel.md",
    "doctor": "troubleshooting.md",
    "inspect": "first-half-hour.md",
    "push": "hub.md",
    "relayout": "layout.md",
    "restamp": "runbook.md",
    "restore": "runbook.md",
    "sample": "first-half-hour.md",
    "verify": "runbook.md",
}
"""The page of the documentation that says more, by command."""


ARGUMENTS = {
    "checkpoint": "A prepared checkpoint: a directory.",
    "verify checkpoint": "A prepared checkpoint: a directory, or the name of a repository on the Hub.",
    "directory": "Where a checkpoint is to be written; its disk is measured.",
    "inspect checkpoint": "A checkpoint, original or prepared: a directory, or the name of a repository on the Hub.",
    "repository": "Repository on the Hub; created if it does not exist.",
    "shell": "The shell to complete in.",
    "source": "The checkpoint to convert: a directory, or the name of a repository on the Hub.",
    "target": "A directory that does not exist, is empty, or holds an unfinished run of the same command.",
}
"""Meaning of an argument, by its name, or by command and name where it is something else there."""

SUMMARIES = {
    "bench-load": "Measure how fast this host loads a prepared checkpoint.",
    "completion": "Print the completion script of a shell.",
    "convert": "Prepare a checkpoint's experts and write a new checkpoint.",
    "doctor": "Report what is installed and what will work here.",
    "inspect": "Describe a checkpoint, and say whether convert takes it.",
    "push": "Publish a prepared checkpoint on the Hugging Face Hub.",
    "relayout": "Rearrange a prepared checkpoint for another kernel or TP.",
    "restamp": "Keep edits of a prepared checkpoint's config.json.",
    "restore": "Restore the source of a prepared checkpoint.",
    "sample": "Write a small random NVFP4 checkpoint to try things on.",
    "verify": "Check every byte of a prepared checkpoint.",
}
"""One line a command for the list of commands, which 80 columns hold."""


class HelpfulCommand(click.Command):
    """A command whose help has groups of options, and ends with a link."""

    def get_short_help_str(self, limit: int = 45) -> str:
        """Return the command's line in the list of commands; click's would be cut in mid-sentence."""
        return SUMMARIES[self.name or ""]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the arguments, then the groups in their order, each option in one of them."""
        arguments, records = [], {}
        for item in self.get_params(ctx):
            if isinstance(item, click.Argument):
                arguments.append((item.make_metavar(ctx), _meaning(self.name, item.name)))
            elif item.name is not None and (record := item.get_help_record(ctx)) is not None:
                records[item.name] = record
        if arguments:
            with formatter.section("Arguments"):
                formatter.write_dl(arguments)
        for title, names in (*GROUPS[self.name or ""], _OUTPUT):
            rows = [records.pop(name) for name in names.split() if name in records]
            if title == _OUTPUT[0]:
                rows += records.values()  # --help, whose name is click's own
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write where to read more."""
        formatter.write_paragraph()
        formatter.write_text(f"Learn more: {learn_more(PAGES[self.name or ''])}")


def _meaning(command: str | None, argument: str | None) -> str:
    return ARGUMENTS.get(f"{command} {argument}") or ARGUMENTS[argument or ""]


def learn_more(page: str) -> str:
    """Return the address of a page of the documentation: in the repository, if the package names none of its own."""
    try:
        links: list[Any] = importlib.metadata.metadata("nvfp4-prep").get_all("Project-URL") or []
    except importlib.metadata.PackageNotFoundError:
        links = []
    addresses = dict(link.split(", ", 1) for link in links if ", " in link)
    base = addresses.get("Documentation")
    return f"docs/{page}" if base is None else f"{base.rstrip('/')}/{page.removesuffix('.md')}/"
