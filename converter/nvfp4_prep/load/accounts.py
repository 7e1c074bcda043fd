"""The accounts of a load: what is still to arrive, the first failure, and whose load it is."""

from __future__ import annotations

import threading
import time

from nvfp4_prep.errors import LoadError, NvfpPrepError
from nvfp4_prep.load.worker import Job, Submission

__all__ = ["Accounts"]


class Accounts:
    """Accounts of one loader, for several threads; a load begins with the first :meth:`add`, ends with :meth:`close`.

    Attributes:
        error: the first failure since the last :meth:`close`.
        owner: the thread that began the load.
        submitted: bytes of the parameters.
        begun: :func:`time.perf_counter` of the first :meth:`add`.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._pending = 0
        self._begin()

    def _begin(self) -> None:
        self.error: NvfpPrepError | None = None
        self.owner: int | None = None
        self.submitted = 0
        self.begun = time.perf_counter()

    def add(self, submission: Submission, nbytes: int) -> None:
        """Count a parameter that the calling thread submits."""
        with self._changed:
            if self.submitted == 0:
                self.begun = time.perf_counter()
            self._pending += submission.pending
            self.submitted += nbytes
            self.owner = threading.get_ident()

    def fail(self, error: NvfpPrepError) -> None:
        """Keep the first failure."""
        with self._changed:
            self.error = self.error or error

    def arrived(self, job: Job, units: int, failure: NvfpPrepError | None = None) -> None:
        """Count units of a job that are done or dropped, and keep a failure."""
        with self._changed:
            self.error = self.error or failure
            self._pending -= units
            job.submission.pending -= units
            if not job.submission.pending:
                self._changed.notify_all()

    def wait_for(self, submission: Submission) -> NvfpPrepError | None:
        """Wait until nothing of a parameter is pending; return the first failure so far."""
        with self._changed:
            while submission.pending:
                self._changed.wait()
            return self.error

    def wait(self) -> float:
        """Wait until nothing is pending and return the seconds since the first parameter; 0 if there was none."""
        with self._changed:
            while self._pending:
                self._changed.wait()
        return time.perf_counter() - self.begun if self.submitted else 0.0

    def close(self) -> tuple[NvfpPrepError | None, int]:
        """Return the first failure and the bytes of the load, and be ready for the next."""
        ended = self.error, self.submitted
        self._begin()
        return ended

    def abandon(self, what: str) -> None:
        """Let everything that is queued be dropped."""
        self.fail(LoadError(what))
