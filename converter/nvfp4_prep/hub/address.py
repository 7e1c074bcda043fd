"""Repository addresses as users write them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from nvfp4_prep.errors import SourceError, UsageError

__all__ = ["HubAddress", "parse_address"]

_SCHEME = "hf://"
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_ADDRESS = re.compile(rf"(?P<repo>{_PART}/{_PART})(?:@(?P<revision>[^\s@]+))?")


@dataclass(frozen=True)
class HubAddress:
    """A model repository and, where the user named one, a branch, tag or commit.

    Attributes:
        repo_id: ``ORG/NAME``.
        revision: what stood behind ``@``; None is the default branch.
    """

    repo_id: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo_id + (f"@{self.revision}" if self.revision else "")


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except PermissionError as error:
        raise SourceError(
            f"cannot be read ({error.strerror})",
            where=str(path),
            next_step="Check the permissions of the directories above it.",
        ) from error


def parse_address(text: str) -> HubAddress | None:
    """Read ``ORG/NAME``, ``ORG/NAME@REVISION`` or the same behind ``hf://``.

    A path that exists always wins over a Hub id of the same spelling; ``hf://`` settles it the other way.

    Returns:
        the address, or None where the text can only mean a local path.

    Raises:
        UsageError: if ``hf://`` is followed by something else than a model repository.
    """
    explicit = text.startswith(_SCHEME)
    body = text.removeprefix(_SCHEME)
    if explicit:
        body = body.removeprefix("models/").rstrip("/")
    elif _is_there(Path(text)):
        return None
    match = _ADDRESS.fullmatch(body)
    if match is None or ".." in body or "--" in match["repo"]:
        if explicit:
            raise UsageError(
                "is not the address of a model repository",
                where=text,
                expected="hf://ORG/NAME or hf://ORG/NAME@REVISION",
                next_step="Copy the id from the model's page.",
            )
        return None
    return HubAddress(match["repo"], match["revision"])
