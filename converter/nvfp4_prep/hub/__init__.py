"""Sources by what a user calls them: a directory, or a repository of the Hugging Face Hub through the official client.

The work is done in the modules beside this one; publishing is in :mod:`nvfp4_prep.publish`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nvfp4_prep._util.system import check_linux
from nvfp4_prep.checkpoint.filenames import WORK_FOLDER
from nvfp4_prep.checkpoint.local_source import LocalSource
from nvfp4_prep.checkpoint.source import Source
from nvfp4_prep.errors import HubError, UsageError
from nvfp4_prep.hub.address import HubAddress, parse_address

__all__ = ["HubAddress", "open_source", "opened_source", "parse_address", "quiet_client"]


@contextmanager
def opened_source(
    source: str | Path | Source, *, target: Path | None = None, by_ranges: bool = False, leave_open: bool = False
) -> Iterator[Source]:
    """Return a context in which a source is open: the way of every command from its argument to a source.

    Args:
        source, target, by_ranges: as for :func:`open_source`, which raises the same.
        leave_open: whether a source that was given opened stays open at the end; else the command was its last use.
    """
    opened = open_source(source, target=target, by_ranges=by_ranges)
    try:
        yield opened
    finally:
        if opened is not source or not leave_open:
            opened.close()


def open_source(
    source: str | Path | Source, *, target: Path | None = None, keep_source: bool = False, by_ranges: bool = False
) -> Source:
    """Open a directory or, where none has that name, a Hub id (``ORG/NAME``, ``hf://…``); an opened source stays as is.

    Args:
        source: as the user gave it; a :class:`Path` is never a Hub id.
        target: the conversion's target, whose work folder takes the downloads; None where nothing is downloaded.
        keep_source: download to the user's cache instead, and leave it there.
        by_ranges: read what is on the Hub by ranges and never download it.

    Raises:
        UsageError: if ``hf://`` is followed by no model repository, or ``keep_source`` would do nothing.
        SourceError: if a directory cannot be read.
        HubError: if a repository cannot be read.
    """
    if not isinstance(source, str | Path):
        return source
    address = parse_address(source) if isinstance(source, str) else None
    if address is None:
        if keep_source:
            raise UsageError(
                "--keep-source is about a download, but SOURCE is on this machine",
                where=str(source),
                next_step="Leave it out: a source is never touched.",
            )
        check_linux()
        return LocalSource(Path(source))
    from nvfp4_prep.hub.range_source import RangeSource
    from nvfp4_prep.hub.source import HubSource
    from nvfp4_prep.output.target_checks import SOURCE_FOLDER

    quiet_client()
    work_dir = None if target is None else target / WORK_FOLDER / SOURCE_FOLDER
    with _naming_directory(str(source)):
        return RangeSource(address) if by_ranges else HubSource(address, work_dir=work_dir, keep_source=keep_source)


@contextmanager
def _naming_directory(text: str) -> Iterator[None]:
    """Add this directory's contents to the error about an id that is not on the Hub: it may be a mistyped path."""
    path = Path(text)
    try:
        yield
    except HubError as error:
        if path.parent.is_dir() and not path.exists():
            meant = f"If a local path was meant: directory {path.parent} has no {path.name}."
            error.next_step = f"{error.next_step or ''} {meant}".strip()
        raise


def quiet_client() -> None:
    """Prepare the official client for a program: no bars beside ours, no raw text of a server in its log, and no
    request that waits for ever.
    """
    import logging

    try:
        from huggingface_hub.utils import disable_progress_bars
    except ValueError as error:  # the client reads HF_ENDPOINT when it is imported
        raise HubError(f"HF_ENDPOINT is not an address ({error})", next_step="Set it anew, or unset it.") from error

    from nvfp4_prep._util.printable import escape_logs
    from nvfp4_prep.hub.errors import limit_waiting

    disable_progress_bars()
    escape_logs(logging.getLogger("huggingface_hub").handlers)
    limit_waiting()
