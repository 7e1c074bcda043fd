"""A repository that we publish to: what it has, and commits that may be repeated without harm."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, TypeVar

from nvfp4_prep._util.printable import mask_passwords
from nvfp4_prep.errors import HubError, TargetError
from nvfp4_prep.hub.errors import Patience, hub_errors, is_conflict, persist, well_formed
from nvfp4_prep.hub.listing import LocalFile, Snapshot, read_snapshot
from nvfp4_prep.hub.publish_options import PublishOptions

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

__all__ = ["RemoteRepository"]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_MAIN = "main"
_CONFLICT_ATTEMPTS = 5


class RemoteRepository:
    """One branch (or pull request) of a model repository.

    Every change reads the branch first and commits onto exactly that state, so an answer that got lost, a second run
    or somebody else's commit in between cannot apply anything twice or onto something unknown.
    """

    def __init__(
        self,
        repo_id: str,
        options: PublishOptions,
        *,
        title: str,
        api: HfApi | None = None,
        patience: Patience | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        """Construct the view of a repository that may not exist yet; asks nothing, see :meth:`create`.

        Args:
            repo_id: ``USER/NAME``.
            options: see :class:`PublishOptions`.
            title: of commits and of the pull request, by which a later run finds it again.
            api: the official client; by default with the user's endpoint and token.
            patience: how long network failures are endured, from the first answer on.
            stop: set to end all waiting.
        """
        from huggingface_hub import HfApi

        self.api = api or HfApi()
        self.repo_id = repo_id
        self.title = title
        self.patience = patience or Patience()
        self.stop = stop or threading.Event()
        self.pull_request: int | None = None
        self.revision = options.revision or _MAIN
        self._options = options

    def create(self) -> RemoteRepository:
        """Make repository, branch or pull request where they do not exist yet; return this repository.

        Raises:
            HubError: if the token may not do this, or the Hub cannot be reached.
            TargetError: if ``private`` is asked for and the repository is public.
        """
        with hub_errors(self.repo_id), well_formed(self.repo_id):
            first = self.patience.at_first_contact()
            self._persist("creating the repository", lambda: self._create(self._options), first)
            self.revision = self._persist("preparing the branch", lambda: self._branch(self._options))
        return self

    def _create(self, options: PublishOptions) -> None:
        self.api.create_repo(self.repo_id, private=options.private or None, exist_ok=True)
        self.refuse_public()

    def refuse_public(self) -> None:
        """Raise :class:`TargetError` if ``private`` is asked for and the repository is public."""
        if self._options.private and not self.api.model_info(self.repo_id).private:
            raise TargetError(
                "exists and is public, but --private was asked for",
                where=self.repo_id,
                next_step="Make it private in its settings, or leave out --private.",
            )

    def _branch(self, options: PublishOptions) -> str:
        if options.create_pr:
            self.pull_request = self.find_pull_request()
            if self.pull_request is None:
                opened = self.api.create_pull_request(self.repo_id, title=self.title)
                self.pull_request = opened.num
            return f"refs/pr/{self.pull_request}"
        if options.revision is None or options.revision == _MAIN:
            return _MAIN
        self.api.create_branch(self.repo_id, branch=options.revision, exist_ok=True)
        return options.revision

    def find_pull_request(self) -> int | None:
        """Return the number of the open pull request that an earlier run made; changes nothing."""
        for item in self.api.get_repo_discussions(self.repo_id):
            if item.is_pull_request and item.title == self.title and item.status in ("open", "draft"):
                return item.num
        return None

    def snapshot(self) -> Snapshot:
        """Return the branch as it is now."""
        return read_snapshot(self.api, self.repo_id, self.revision, self.patience)

    def commit(
        self,
        message: str,
        *,
        add: Mapping[str, LocalFile] | None = None,
        delete: Callable[[Snapshot], Iterable[str]] = lambda snapshot: (),
        check: Callable[[Snapshot], None] = lambda snapshot: None,
    ) -> Snapshot:
        """Bring files to the branch and delete others, in one commit; what is there already is left alone.

        Args:
            message: second half of the commit's title.
            add: files by their name in the repository.
            delete: of the branch's state, the names that must go.
            check: raises if the branch's state must not be built upon.

        Returns:
            the branch afterwards.

        Raises:
            HubError: if the token may not write, the branch changes all the time, or the Hub cannot be reached.
        """
        with hub_errors(self.repo_id):
            for _ in range(_CONFLICT_ATTEMPTS):
                try:
                    return self._persist(message, lambda: self._commit_once(message, add or {}, delete, check))
                except Exception as error:
                    if not is_conflict(error):
                        raise
                    _log.warning("%s: another commit arrived meanwhile; reading the branch again", self.repo_id)
        raise HubError(
            "the branch changes all the time", where=f"{self.repo_id}@{self.revision}", next_step="Push to another."
        )

    def _commit_once(
        self,
        message: str,
        add: Mapping[str, LocalFile],
        delete: Callable[[Snapshot], Iterable[str]],
        check: Callable[[Snapshot], None],
    ) -> Snapshot:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        before = self.snapshot()
        check(before)
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationDelete(path_in_repo=name) for name in delete(before) if name in before.files
        ]
        for name, file in add.items():
            if file.difference(before.files.get(name)) is not None:
                operations.append(CommitOperationAdd(path_in_repo=name, path_or_fileobj=file.path))
        if not operations:
            return before
        for operation in operations:
            if isinstance(operation, CommitOperationAdd):
                # One by one: the client sends several in a thread pool that an interrupt would have to wait for.
                self.api.preupload_lfs_files(
                    self.repo_id, [operation], revision=self.revision, num_threads=1, free_memory=False
                )
                if self.stop.is_set():
                    raise HubError(
                        "publishing was stopped", where=self.repo_id, next_step="Run the same command to resume."
                    )
        self.api.create_commit(
            self.repo_id,
            operations,
            commit_message=f"{self.title}: {message}",
            revision=self.revision,
            parent_commit=before.commit,
        )
        return self.snapshot()

    def _persist(self, what: str, action: Callable[[], _T], patience: Patience | None = None) -> _T:
        return persist(action, what=f"{self.repo_id}: {what}", patience=patience or self.patience, stop=self.stop)

    @property
    def page(self) -> str:
        """The address where people find the result: of the pull request or of the branch."""
        base = f"{mask_passwords(self.api.endpoint)}/{self.repo_id}"
        if self.pull_request is not None:
            return f"{base}/discussions/{self.pull_request}"
        return base if self.revision == _MAIN else f"{base}/tree/{self.revision}"
