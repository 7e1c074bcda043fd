"""Publishing a prepared checkpoint so that nobody can load half of it, or anything but what the manifest says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvfp4_prep._util.arguments import checked
from nvfp4_prep._util.printable import printable
from nvfp4_prep._util.progress import Progress, default_progress
from nvfp4_prep._util.text import first_of
from nvfp4_prep.checkpoint.contents import WEIGHT_SUFFIXES
from nvfp4_prep.checkpoint.filenames import CONFIG, INDEX, MANIFEST, README
from nvfp4_prep.errors import UsageError, VerificationError
from nvfp4_prep.hub.argument_kinds import PUSHING
from nvfp4_prep.hub.errors import Patience
from nvfp4_prep.hub.listing import LocalFile, Snapshot
from nvfp4_prep.hub.publish_options import PublishOptions
from nvfp4_prep.options import ConvertOptions
from nvfp4_prep.prepared.manifest import Manifest
from nvfp4_prep.prepared.problems import renewal
from nvfp4_prep.publish.foreign_files import refuse_foreign, refuse_strange
from nvfp4_prep.publish.repository import RemoteRepository

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = [
    "BATCH_FILES",
    "Publication",
    "PushResult",
    "make_publication",
    "open_repository",
    "publication_title",
    "publish",
    "push",
    "summary",
    "verify_before",
    "withdrawal",
]

_WITH_THE_STAMP = (CONFIG, INDEX, README)
"""Committed together with the manifest, last: what serving needs, and what describes the whole."""
_BATCH_NBYTES = 20_000_000_000
BATCH_FILES = 50
"""Files of one commit at most."""


@dataclass(frozen=True)
class PushResult:
    """Result of a push.

    Attributes:
        repo_id: where.
        revision: branch, or ``refs/pr/N``.
        commit: that holds everything.
        page: its address.
        serve: the command that serves it.
        files, nbytes: what the repository holds of the checkpoint; all of it was compared with the manifest.
        already_there: bytes of it that an earlier run had brought there.
    """

    repo_id: str
    revision: str
    commit: str
    page: str
    serve: str
    files: int
    nbytes: int
    already_there: int

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON value."""
        return dict(vars(self))


def publication_title(source: str, revision: str | None, options: ConvertOptions) -> str:
    """Return the title of commits and pull requests: one for each conversion, so that a rerun finds the first's."""
    kind = hashlib.sha256(json.dumps([source, revision, options.to_dict()], sort_keys=True).encode()).hexdigest()[:8]
    at = f"@{revision[:12]}" if revision else ""
    return printable(f"nvfp4-prep {kind}: {source}{at}")[:150]


@checked(**PUSHING)
def push(
    checkpoint: str | Path,
    repo_id: str,
    options: PublishOptions | None = None,
    *,
    full: bool = False,
    api: HfApi | None = None,
    patience: Patience | None = None,
    progress: Progress | None = None,
    threads: int | None = None,
) -> PushResult:
    """Verify a prepared checkpoint and publish it; if it is killed, the same call continues.

    Args:
        checkpoint: its directory.
        repo_id: ``USER/NAME``.
        options: see :class:`~nvfp4_prep.hub.publish_options.PublishOptions`.
        full: read every byte before (otherwise: structure, sizes and headers; the hashes of all uploaded bytes are
            compared with the manifest in any case, before the stamp).
        api: the official client; by default with the user's endpoint and token.
        patience: how long network failures are endured.
        progress: receives the counts of bytes.
        threads: workers of the verification, if it is ``full``.

    Raises:
        UsageError: if an argument is not what it must be.
        CheckpointError, VerificationError: if ``verify`` finds anything wrong, or uploaded bytes are not those of the
            manifest.
        TargetError: if the repository holds another model, or files that belong to no push of this tool.
        HubError: if the token may not do this, or the Hub stays away.
    """
    verify_before(checkpoint, full=full, threads=threads, progress=progress)
    return publish(
        Path(checkpoint), repo_id, options or PublishOptions(), api=api, patience=patience, progress=progress
    )


def verify_before(checkpoint: str | Path, *, full: bool, threads: int | None, progress: Progress | None) -> None:
    """Raise unless ``verify`` finds nothing wrong; arguments and errors as of :func:`push`."""
    from nvfp4_prep.commands.verify import verify

    if threads is not None and not full:
        raise UsageError(
            "--threads is about reading every byte, which --full does",
            next_step="Add --full, or leave --threads out.",
        )
    verify(checkpoint, quick=not full, threads=threads, progress=progress).raise_for_problems()


def publish(
    directory: Path,
    repo_id: str,
    options: PublishOptions,
    *,
    api: HfApi | None = None,
    patience: Patience | None = None,
    progress: Progress | None = None,
    remote: RemoteRepository | None = None,
) -> PushResult:
    """Upload a verified checkpoint; with ``remote``, finish what a conversion sent there file by file."""
    if remote is None:
        remote = open_repository(directory, repo_id, options, api=api, patience=patience).create()
    return make_publication(directory, remote, progress or default_progress()).run()


def open_repository(
    directory: Path,
    repo_id: str,
    options: PublishOptions,
    *,
    api: HfApi | None = None,
    patience: Patience | None = None,
) -> RemoteRepository:
    """Return the repository that a prepared checkpoint is published to; nothing is created or asked."""
    manifest = Manifest.from_bytes((directory / MANIFEST).read_bytes(), str(directory / MANIFEST))
    title = publication_title(manifest.source, manifest.revision, manifest.options)
    return RemoteRepository(repo_id, options, title=title, api=api, patience=patience)


def make_publication(directory: Path, remote: RemoteRepository, progress: Progress) -> Publication:
    """Return the publication of a prepared checkpoint: its files as the manifest has them, and those of the stamp."""
    raw = (directory / MANIFEST).read_bytes()
    manifest = Manifest.from_bytes(raw, str(directory / MANIFEST))
    files = {name: LocalFile(directory / name, file.nbytes, file.sha256) for name, file in manifest.files.items()}
    stamp = {name: files.pop(name) for name in _WITH_THE_STAMP if name in files}
    stamp[MANIFEST] = LocalFile(directory / MANIFEST, len(raw), _sha256(raw))
    return Publication(remote, files, stamp, progress)


class Publication:
    """One checkpoint on its way to one branch.

    Attributes:
        files: every file by name, the manifest too.
    """

    def __init__(
        self,
        remote: RemoteRepository,
        files: Mapping[str, LocalFile],
        stamp: Mapping[str, LocalFile],
        progress: Progress,
    ) -> None:
        self._remote = remote
        self._before_stamp = files
        self._stamp = stamp
        self.files = {**files, **stamp}
        self._progress = progress

    def survey(self, state: Snapshot) -> tuple[frozenset[str], list[str]]:
        """Return the files of an older checkpoint on the branch, and the names of ours that the branch lacks.

        Raises:
            TargetError: as :func:`push`.
            VerificationError: if a file that is missing there is not here as the manifest has it.
        """
        old = refuse_foreign(self._remote, state, self.files)
        missing = self._missing(state)
        self.check_local(missing)
        return old, missing

    def run(self) -> PushResult:
        """Upload what is missing, the stamp last."""
        old, missing = self.survey(self._remote.snapshot())
        total = sum(file.nbytes for file in self.files.values())
        already = total - sum(self.files[name].nbytes for name in missing)
        self._progress.start("push", total, already)
        try:
            for batch in self._batches(missing):
                self._remote.commit(summary(batch), add=batch, delete=withdrawal(batch, old - self.files.keys()))
                self._progress.advance(sum(file.nbytes for file in batch.values()), next(iter(batch)))
            # The comparison is made on the very state that the stamp is committed onto.
            after = self._remote.commit(
                "stamp",
                add=self._stamp,
                delete=lambda state: sorted(old - self.files.keys()) if MANIFEST in state.files else [],
                check=lambda state: self._check(state, old),
            )
            self._compare(after, self.files)
            self._progress.advance(sum(self.files[name].nbytes for name in missing if name in self._stamp), CONFIG)
        finally:
            self._progress.close()
        at = "" if self._remote.revision == "main" else f" --revision {self._remote.revision}"
        return PushResult(
            repo_id=self._remote.repo_id,
            revision=self._remote.revision,
            commit=after.commit,
            page=self._remote.page,
            serve=f"vllm serve {self._remote.repo_id}{at}",
            files=len(self.files),
            nbytes=total,
            already_there=already,
        )

    def _missing(self, state: Snapshot) -> list[str]:
        return [name for name, file in self.files.items() if file.difference(state.files.get(name)) is not None]

    def check_local(self, missing: Iterable[str]) -> None:
        """Raise :class:`VerificationError` unless these files are here as the manifest has them."""
        for name in missing:
            file = self.files[name]
            actual = file.path.stat().st_size if file.path.is_file() else None
            if actual != file.nbytes:
                raise VerificationError(
                    "is neither published nor here as the manifest has it",
                    where=str(file.path),
                    expected=f"{file.nbytes} bytes",
                    actual="no file" if actual is None else f"{actual} bytes",
                    next_step=renewal(name),
                )
            if not name.endswith(WEIGHT_SUFFIXES) and _sha256(file.path.read_bytes()) != file.sha256:
                raise VerificationError(  # before it is published, and not only after
                    "is not what the manifest says",
                    where=str(file.path),
                    expected=f"sha256 {file.sha256}",
                    next_step=renewal(name),
                )

    def _batches(self, missing: list[str]) -> Iterator[dict[str, LocalFile]]:
        batch: dict[str, LocalFile] = {}
        for name in sorted(set(missing) - self._stamp.keys()):
            batch[name] = self._before_stamp[name]
            if len(batch) == BATCH_FILES or sum(file.nbytes for file in batch.values()) >= _BATCH_NBYTES:
                yield batch
                batch = {}
        if batch:
            yield batch

    def _check(self, state: Snapshot, old: frozenset[str]) -> None:
        """Raise unless what the stamp would be committed onto is this checkpoint, and nothing else is beside it."""
        self._compare(state, self._before_stamp)
        refuse_strange(self._remote, state, self.files.keys() | old)

    def _compare(self, state: Snapshot, files: Mapping[str, LocalFile]) -> None:
        for name, file in files.items():
            difference = file.difference(state.files.get(name))
            if difference is not None:
                raise VerificationError(
                    f"published file {difference}",
                    where=f"{state.repo_id}@{state.commit[:12]}/{name}",
                    next_step="Verify the directory (not --quick), and push again.",
                )


def withdrawal(batch: Mapping[str, LocalFile], surplus: Iterable[str]) -> Callable[[Snapshot], list[str]]:
    """Return a function from a state to the names that the first commit onto an older checkpoint must delete.

    They are its stamp, so that no state with files of both can be loaded, and its surplus files.
    """

    def stale(state: Snapshot) -> list[str]:
        changes = [name for name, file in batch.items() if file.difference(state.files.get(name)) is not None]
        stamped = [name for name in (CONFIG, MANIFEST) if name in state.files]
        return [*stamped, *sorted(surplus)] if stamped and changes else []

    return stale


def summary(batch: Mapping[str, LocalFile]) -> str:
    """Return a commit's message."""
    return first_of(batch, 1)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
