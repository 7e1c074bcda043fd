"""Preview of a push: files, card and refusals, from reading alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvfp4_prep._util.arguments import checked
from nvfp4_prep._util.progress import NoProgress, Progress
from nvfp4_prep.checkpoint.filenames import README
from nvfp4_prep.errors import HubError
from nvfp4_prep.hub.argument_kinds import PUSHING
from nvfp4_prep.hub.errors import Patience, hub_errors, is_transient, well_formed
from nvfp4_prep.hub.listing import Snapshot, read_snapshot
from nvfp4_prep.hub.publish_options import PublishOptions, check_repository
from nvfp4_prep.publish.push import Publication, make_publication, open_repository, verify_before
from nvfp4_prep.publish.repository import RemoteRepository

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = ["PreviewedFile", "PushPreview", "preview_push"]


_SHORT = Patience(give_up_after_s=5.0)
"""A preview is useful without the Hub, so it does not wait long for it."""


@dataclass(frozen=True)
class PreviewedFile:
    """One file of the checkpoint.

    Attributes:
        name: its name here and there.
        nbytes: its size.
        there: whether the branch has it already; ``None`` where that is not known.
    """

    name: str
    nbytes: int
    there: bool | None


@dataclass(frozen=True)
class PushPreview:
    """The effect that a push would have.

    Attributes:
        repo_id, revision: where it would go; ``refs/pr/N`` is an open pull request of an earlier run, ``refs/pr/new``
            one that would be opened.
        page: the address where people would find it.
        repository: ``exists``, ``new``, or ``unknown`` if the Hub could not be asked.
        why_unknown: the reason for that.
        files: every file of the checkpoint.
        removed: files of an older checkpoint that would be deleted there.
        card: the model card.
    """

    repo_id: str
    revision: str
    page: str
    repository: str
    why_unknown: str
    files: tuple[PreviewedFile, ...]
    removed: tuple[str, ...]
    card: str

    @property
    def nbytes(self) -> int:
        """Size of the whole checkpoint."""
        return sum(file.nbytes for file in self.files)

    @property
    def upload_nbytes(self) -> int:
        """Bytes that would be sent; all where it is not known what is there."""
        return sum(file.nbytes for file in self.files if not file.there)

    def __repr__(self) -> str:
        return (
            f"<PushPreview to {self.repo_id}@{self.revision} ({self.repository}): {len(self.files)} files,"
            f" {self.upload_nbytes} of {self.nbytes} bytes to upload>"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON value."""
        return {**asdict(self), "nbytes": self.nbytes, "upload_nbytes": self.upload_nbytes}


@checked(**PUSHING)
def preview_push(
    checkpoint: str | Path,
    repo_id: str,
    options: PublishOptions | None = None,
    *,
    full: bool = False,
    api: HfApi | None = None,
    patience: Patience | None = None,
    progress: Progress | None = None,
    threads: int | None = None,
) -> PushPreview:
    """Return what :func:`~nvfp4_prep.publish.push.push` would do, and refuse what it would refuse before it uploads.

    Nothing is written, here or on the Hub. Without a network the files and the card are shown all the same; then the
    state of the repository is ``unknown``, with the reason.

    Args:
        checkpoint, repo_id, options, full, api, patience, progress, threads: as of ``push``.

    Raises:
        UsageError, CheckpointError, VerificationError, TargetError: as ``push``.
        HubError: if the token is refused, or an answer is not a Hub's.
    """
    check_repository(repo_id)
    options = options or PublishOptions()
    verify_before(checkpoint, full=full, threads=threads, progress=progress)
    directory = Path(checkpoint)
    remote = open_repository(directory, repo_id, options, api=api, patience=patience or _SHORT)
    publication = make_publication(directory, remote, NoProgress())
    publication.check_local(publication.files)
    found = _look(remote, options)
    missing, removed = None, frozenset[str]()
    if found.state is not None:
        old, missing = publication.survey(found.state)
        removed = old - publication.files.keys()
    elif found.repository == "new":
        missing = list(publication.files)
    return PushPreview(
        repo_id=repo_id,
        revision="refs/pr/new" if options.create_pr and remote.pull_request is None else remote.revision,
        page=remote.page,
        repository=found.repository,
        why_unknown=found.why_unknown,
        files=_files(publication, missing),
        removed=tuple(sorted(removed)),
        card=(directory / README).read_text(encoding="utf-8") if README in publication.files else "",
    )


def _files(publication: Publication, missing: list[str] | None) -> tuple[PreviewedFile, ...]:
    absent = None if missing is None else {*missing}
    return tuple(
        PreviewedFile(name, file.nbytes, None if absent is None else name not in absent)
        for name, file in sorted(publication.files.items())
    )


@dataclass(frozen=True)
class _Found:
    """The repository as it is; ``state`` is ``None`` where the branch does not exist, or is not known."""

    repository: str
    state: Snapshot | None = None
    why_unknown: str = ""


def _look(remote: RemoteRepository, options: PublishOptions) -> _Found:
    try:
        return _listing(remote, options)
    except HubError as error:
        kind = _kind(error)
        if kind == "unknown":
            return _Found("unknown", why_unknown=str(error))
        if kind == "new":
            return _Found("new")
        raise


def _listing(remote: RemoteRepository, options: PublishOptions) -> _Found:
    first = remote.patience.at_first_contact()
    main = read_snapshot(remote.api, remote.repo_id, None, first)
    with hub_errors(remote.repo_id), well_formed(remote.repo_id):
        remote.refuse_public()
        if options.create_pr:
            remote.pull_request = remote.find_pull_request()
    if remote.pull_request is not None:
        remote.revision = f"refs/pr/{remote.pull_request}"
    if options.create_pr and remote.pull_request is None:
        return _Found("exists", main)
    try:
        return _Found("exists", read_snapshot(remote.api, remote.repo_id, remote.revision, first))
    except HubError as error:
        if _kind(error) != "new branch":
            raise
        return _Found("exists", replace(main))  # a new branch begins with what main has


def _kind(error: HubError) -> str:
    """Return what a failure to list means: ``new``, ``new branch``, ``unknown``, or nothing for a refusal."""
    from huggingface_hub import errors as hub
    from huggingface_hub import get_token

    cause = error.__cause__
    if cause is None:
        return ""
    if isinstance(cause, hub.OfflineModeIsEnabled) or is_transient(cause):
        return "unknown"
    if isinstance(cause, hub.RevisionNotFoundError):
        return "new branch"
    if isinstance(cause, hub.RepositoryNotFoundError) and not isinstance(cause, hub.GatedRepoError):
        if "invalid" in error.what:
            return ""
        return "unknown" if get_token() is None else "new"
    return ""
