"""Straight through: finished files go to the Hub while the next ones are made."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from nvfp4_prep._util.arguments import DEVICE, FLAG, PATH, RUNNING, SOURCE, TEXT, checked
from nvfp4_prep._util.progress import Progress
from nvfp4_prep._util.system import start_thread
from nvfp4_prep.checkpoint.source import Source
from nvfp4_prep.commands.convert import OPTIONS, SMOKE, ConvertResult, convert
from nvfp4_prep.errors import HubError
from nvfp4_prep.hub.argument_kinds import CLIENT, PATIENCE, PUBLISH_OPTIONS
from nvfp4_prep.hub.errors import Patience, translate
from nvfp4_prep.hub.listing import LocalFile, Snapshot
from nvfp4_prep.hub.publish_options import PublishOptions
from nvfp4_prep.options import ConvertOptions
from nvfp4_prep.output.atomic_file import translate_os_error
from nvfp4_prep.output.sink import FILES_AT_ONCE, stream_room_nbytes
from nvfp4_prep.publish.foreign_files import refuse_foreign
from nvfp4_prep.publish.push import BATCH_FILES, PushResult, publication_title, publish, summary, withdrawal
from nvfp4_prep.publish.repository import RemoteRepository
from nvfp4_prep.smoke.gate import DEFAULT_SMOKE, SmokePolicy

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = ["StreamPublisher", "convert_and_publish"]

_log = logging.getLogger(__name__)


class StreamPublisher:
    """A ``FileSink`` that uploads each file in a thread of its own, one commit after the other.

    With ``stream_out`` a file is deleted once the Hub lists it with the right size and sha256, and a new one is only
    created when it fits into :data:`FILES_AT_ONCE` times the largest. Small files that the Hub keeps in git stay.
    """

    def __init__(
        self,
        repo_id: str,
        options: PublishOptions,
        *,
        stream_out: bool = False,
        api: HfApi | None = None,
        patience: Patience | None = None,
    ) -> None:
        """Do nothing yet: the repository is made when the conversion is planned.

        Args:
            repo_id: ``USER/NAME``.
            options: how to publish.
            stream_out: delete what is published.
            api: the official client; by default with the user's endpoint and token.
            patience: how long network failures are endured.
        """
        self.remote: RemoteRepository | None = None
        self._repo_id = repo_id
        self._options = options
        self._stream_out = self.sequential = stream_out
        self._api = api
        self._patience = patience or Patience()
        self._stop = threading.Event()
        self._changed = threading.Condition()
        self._state: Snapshot | None = None
        self._surplus: frozenset[str] = frozenset()
        self._waiting: dict[str, LocalFile] = {}
        self._sending = False
        self._held: dict[str, int] = {}
        self._limit_nbytes = 0
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None

    def begin(self, source: str, revision: str | None, options: ConvertOptions, sizes: Mapping[str, int]) -> None:
        """See :class:`~nvfp4_prep.output.sink.FileSink`. Repository, rights and foreign files are checked here."""
        self.remote = RemoteRepository(
            self._repo_id,
            self._options,
            title=publication_title(source, revision, options),
            api=self._api,
            patience=self._patience,
            stop=self._stop,
        ).create()
        self._state = self.remote.snapshot()
        self._surplus = refuse_foreign(self.remote, self._state, sizes) - sizes.keys()
        self._limit_nbytes = FILES_AT_ONCE * max(sizes.values(), default=0)
        thread = threading.Thread(target=self._run, name="nvfp4-prep-push", daemon=True)
        start_thread(thread)
        self._thread = thread

    def holds(self, name: str, nbytes: int, sha256: str | None) -> bool:
        """See :class:`~nvfp4_prep.output.sink.FileSink`: only with ``stream_out``, and if the Hub lists it now."""
        remote = self._state.files.get(name) if self._state is not None else None
        return (
            self._stream_out
            and remote is not None
            and remote.sha256 is not None
            and (remote.nbytes, remote.sha256) == (nbytes, sha256)
        )

    def room_nbytes(self, sizes: Mapping[str, int]) -> int:
        """See :class:`~nvfp4_prep.output.sink.FileSink`."""
        return stream_room_nbytes(sizes) if self._stream_out else sum(sizes.values())

    def before_file(self, name: str, nbytes: int, stop: threading.Event) -> None:
        """See :class:`~nvfp4_prep.output.sink.FileSink`."""
        with self._changed:
            while self._stream_out and self._held and sum(self._held.values()) + nbytes > self._limit_nbytes:
                if stop.is_set():
                    return
                self._raise_failure()
                self._changed.wait(0.2)
            self._raise_failure()
            self._held[name] = nbytes

    def file_done(self, name: str, path: Path, nbytes: int, sha256: str | None) -> None:
        """See :class:`~nvfp4_prep.output.sink.FileSink`."""
        with self._changed:
            self._raise_failure()
            self._held[name] = nbytes
            self._waiting[name] = LocalFile(path, nbytes, sha256 or "")
            self._changed.notify_all()

    def drain(self) -> None:
        """See :class:`~nvfp4_prep.output.sink.FileSink`."""
        with self._changed:
            while self._waiting or self._sending:
                self._raise_failure()
                self._changed.wait(0.2)
            self._raise_failure()

    def interrupt(self) -> None:
        """See :class:`~nvfp4_prep.output.sink.FileSink`. What is being sent at this moment is not waited for."""
        self._stop.set()
        with self._changed:
            self._changed.notify_all()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._stop.is_set():
            raise HubError("publishing was stopped", where=self._repo_id, next_step="Run the same command to resume.")

    def _run(self) -> None:
        try:
            while (batch := self._take()) is not None:
                self._send(batch)
        except BaseException as error:
            with self._changed:
                self._failure = translate(error, self._repo_id) or error
                self._changed.notify_all()

    def _take(self) -> dict[str, LocalFile] | None:
        with self._changed:
            self._sending = False
            self._changed.notify_all()
            while not self._waiting:
                if self._stop.is_set():
                    return None
                self._changed.wait(0.2)
            names = list(self._waiting)[:BATCH_FILES]
            self._sending = True
            return {name: self._waiting.pop(name) for name in names}

    def _send(self, batch: dict[str, LocalFile]) -> None:
        if self.remote is None:
            raise HubError("was asked to publish before it had begun", where=self._repo_id)
        state = self.remote.commit(summary(batch), add=batch, delete=withdrawal(batch, self._surplus))
        for name, file in batch.items():
            difference = file.difference(state.files.get(name))
            if difference is not None:
                raise HubError(
                    f"published file {difference}",
                    where=f"{self._repo_id}/{name}",
                    next_step="Is it in the repository's .gitignore? Run the same command again.",
                )
            if self._stream_out and state.files[name].sha256 == file.sha256:
                _remove(file.path)
        with self._changed:
            self._state = state
            for name in batch:
                self._held.pop(name, None)
            self._changed.notify_all()


def _remove(path: Path) -> None:
    """Delete a published file; raises :class:`TargetError` where the file system does not."""
    try:
        path.unlink()
    except OSError as error:
        raise translate_os_error(error, path) from error


@checked(
    source=SOURCE,
    target=PATH,
    repo_id=TEXT,
    options=OPTIONS,
    publish_options=PUBLISH_OPTIONS,
    stream_out=FLAG,
    restart=FLAG,
    device=DEVICE,
    smoke=SMOKE,
    api=CLIENT,
    patience=PATIENCE,
    **RUNNING,
)
def convert_and_publish(
    source: str | Path | Source,
    target: str | Path,
    repo_id: str,
    options: ConvertOptions | None = None,
    *,
    publish_options: PublishOptions | None = None,
    stream_out: bool = False,
    threads: int | None = None,
    memory_nbytes: int | None = None,
    progress: Progress | None = None,
    restart: bool = False,
    device: str = "cpu",
    smoke: SmokePolicy | None = DEFAULT_SMOKE,
    api: HfApi | None = None,
    patience: Patience | None = None,
) -> tuple[ConvertResult, PushResult]:
    """Convert and publish at the same time; if it is killed, the same call continues.

    Args:
        source, target, options, threads, memory_nbytes, progress, restart, device: as for ``convert``.
        repo_id, publish_options, api, patience: as for :func:`~nvfp4_prep.publish.push.push`.
        stream_out: delete each file once it is published: then the target needs room for
            :data:`FILES_AT_ONCE` files, and in the end holds the small files only.
        smoke: what is run before the stamp is published, also of what was complete already: if it fails, the
            repository stays without a stamp, so that nobody can load it. With ``stream_out`` nothing is run.

    Raises:
        NvfpPrepError: as both of them.
    """
    options_there = publish_options or PublishOptions()
    sink = StreamPublisher(repo_id, options_there, stream_out=stream_out, api=api, patience=patience)
    try:
        result = convert(
            source,
            target,
            options,
            threads=threads,
            memory_nbytes=memory_nbytes,
            progress=progress,
            restart=restart,
            sink=sink,
            device=device,
            smoke=None if stream_out else smoke,
            smoke_again=True,
        )
        return result, publish(Path(target), repo_id, options_there, progress=progress, remote=sink.remote)
    finally:
        sink.interrupt()
