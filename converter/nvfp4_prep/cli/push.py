"""``nvfp4-prep push``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

import nvfp4_prep
from nvfp4_prep._util.printable import join_lines
from nvfp4_prep._util.text import count, format_nbytes
from nvfp4_prep.cli.help import HelpfulCommand
from nvfp4_prep.cli.options import checkpoint_argument, common, publishing_options, threads_option
from nvfp4_prep.cli.output import make_progress, say, say_json, say_next, say_text
from nvfp4_prep.hub import quiet_client
from nvfp4_prep.hub.publish_options import PublishOptions, check_repository

if TYPE_CHECKING:
    from nvfp4_prep import PushPreview, PushResult

__all__ = ["push", "say_pushed"]


@click.command(cls=HelpfulCommand)
@checkpoint_argument()
@click.argument("repository", metavar="USER/NAME")
@publishing_options()
@click.option("--dry-run", is_flag=True, help="Print the card, the files and what is there already; publishes nothing.")
@click.option("--full", is_flag=True, help="Check every byte first, not only structure, sizes and headers.")
@threads_option
@common
def push(
    checkpoint: Path,
    repository: str,
    publish_options: PublishOptions,
    dry_run: bool,
    full: bool,
    threads: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Publish a prepared CHECKPOINT on the Hugging Face Hub.

    What verify would not pass is refused; the files that make it loadable come last, after all others were compared
    with the manifest. If it is killed, the same command continues.

    \b
    nvfp4-prep push ./out me/Kimi-K2.5-NVFP4-prepared --dry-run
    nvfp4-prep push ./out me/Kimi-K2.5-NVFP4-prepared
    nvfp4-prep push ./out me/Kimi-K2.5-NVFP4-prepared --private --full
    """
    check_repository(repository)
    quiet_client()
    if dry_run:
        preview = nvfp4_prep.preview_push(
            checkpoint, repository, publish_options, full=full, threads=threads, progress=make_progress(quiet)
        )
        if as_json:
            say_json(preview.to_dict())
        else:
            say_text(preview_text(preview))
        return
    pushed = nvfp4_prep.push(
        checkpoint, repository, publish_options, full=full, threads=threads, progress=make_progress(quiet)
    )
    if as_json:
        say_json(pushed.to_dict())
        return
    say_pushed(pushed)
    revision = publish_options.revision
    say_next("verify", f"{repository}@{revision}" if revision else repository)


def preview_text(preview: PushPreview) -> str:
    """Return a preview for people: where it would go, every file with its size, and the card."""
    states = {True: "there", False: "upload", None: "?"}
    where = {
        "exists": "exists",
        "new": "would be created",
        "unknown": f"not known: {preview.why_unknown}",
    }[preview.repository]
    lines = [
        f"{preview.page}, revision {preview.revision}: repository {where}",
        f"{count(len(preview.files), 'file')}, {format_nbytes(preview.nbytes)}; to upload:"
        f" {'at most ' if preview.repository == 'unknown' else ''}{format_nbytes(preview.upload_nbytes)}",
        *(f"  {states[file.there]:6} {format_nbytes(file.nbytes):>10}  {file.name}" for file in preview.files),
        *(f"  delete {'':>10}  {name}" for name in preview.removed),
        "model card (README.md):",
        *(f"  | {line}" for line in preview.card.splitlines()),
        "nothing was published (--dry-run)",
    ]
    return join_lines(lines)


def say_pushed(pushed: PushResult) -> None:
    """Print what was published, and how it is served."""
    say(
        f"{pushed.page}: {count(pushed.files, 'file')}, {format_nbytes(pushed.nbytes)}, compared with the manifest"
        f" at commit {pushed.commit}"
    )
    say(f"serve it: {pushed.serve}")
