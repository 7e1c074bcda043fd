"""Options of publishing on the Hub; importing them does not import the Hub's client."""

from __future__ import annotations

from dataclasses import dataclass

from nvfp4_prep._util.arguments import FLAG, TEXT, check_fields, optional
from nvfp4_prep.errors import UsageError

__all__ = ["PublishOptions", "check_repository"]


@dataclass(frozen=True)
class PublishOptions:
    """Options of publishing: repository, branch or pull request, and visibility.

    Attributes:
        private: create the repository as private.
        revision: branch; created if it does not exist.
        create_pr: publish as a pull request; an open one of the same title is continued.
    """

    private: bool = False
    revision: str | None = None
    create_pr: bool = False

    def __post_init__(self) -> None:
        """Raise :class:`UsageError` for options of other types, or that exclude each other."""
        check_fields(self, private=FLAG, revision=optional(TEXT), create_pr=FLAG)
        if self.create_pr and self.revision:
            raise UsageError("--create-pr and --revision exclude each other: a pull request is a branch of its own")


def check_repository(repo_id: str) -> None:
    """Raise :class:`UsageError` for what cannot be the id of a repository, before the network is asked."""
    if len([part for part in repo_id.split("/") if part]) != 2 or repo_id.count("/") != 1:
        raise UsageError("is not a repository on the Hub", where=repo_id, expected="USER/NAME")
