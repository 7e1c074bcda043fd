"""The Hugging Face Hub as a source, through the official client (1.x and 2.x): a user's text becomes an opened source.

The work is done in the modules beside this one; publishing is in :mod:`nvfp4_prep.publish`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from nvfp4_prep.errors import HubError, UsageError
from nvfp4_prep.hub.address import HubAddress, parse_address

if TYPE_CHECKING:
    from nvfp4_prep.hub.range_source import RangeSource
    from nvfp4_prep.hub.source import HubSource

__all__ = ["HubAddress", "open_ranges", "open_source", "parse_address", "quiet_client"]


def open_source(text: str, *, target: Path | None = None, keep_source: bool = False) -> str | HubSource:
    """Return a Hub id as an opened source, anything else as it is: a path.

    Args:
        text: as the user wrote it.
        target: the conversion's target, whose work folder takes the downloads; None where nothing is downloaded.
        keep_source: download to the user's cache instead, and leave it there.

    Raises:
        UsageError: if ``hf://`` is followed by no model repository, or ``keep_source`` would do nothing.
        HubError: if the repository cannot be read.
    """
    address = parse_address(text)
    if address is None:
        if keep_source:
            raise UsageError(
                "--keep-source is about a download, but SOURCE is on this machine",
                where=text,
                next_step="Leave it out: a source is never touched.",
            )
        return text
    from nvfp4_prep.checkpoint.filenames import WORK_FOLDER
    from nvfp4_prep.hub.source import HubSource
    from nvfp4_prep.output.target_checks import SOURCE_FOLDER

    quiet_client()
    work_dir = None if target is None else target / WORK_FOLDER / SOURCE_FOLDER
    with _naming_directory(text):
        return HubSource(address, work_dir=work_dir, keep_source=keep_source)


def open_ranges(text: str) -> str | RangeSource:
    """Return a Hub id as a source that is read by ranges and never downloaded, anything else as it is; errors as
    :func:`open_source`.
    """
    address = parse_address(text)
    if address is None:
        return text
    from nvfp4_prep.hub.range_source import RangeSource

    quiet_client()
    with _naming_directory(text):
        return RangeSource(address)


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
