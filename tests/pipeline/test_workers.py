"""Worker threads of the engine."""

from __future__ import annotations

import threading

import pytest

from nvfp4_prep.errors import NvfpPrepError
from nvfp4_prep.pipeline.workers import WorkerThreads


def test_a_missing_thread_is_reported_and_the_others_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    real, done = threading.Thread.start, []

    def start(thread: threading.Thread) -> None:
        if thread.name == "nvfp4-prep-2":
            raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    workers = WorkerThreads(lambda: done.append(True), 4)
    with pytest.raises(NvfpPrepError) as raised:
        workers.start()
    assert str(raised.value) == (
        "cannot start a thread: the system allows no more (2 of 4 run). Raise the limit of processes (ulimit -u, or the"
        " container's pids limit), or give fewer --threads."
    )
    workers.wait()
    assert done == [True, True]
