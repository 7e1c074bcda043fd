"""The engine: order of digests, bounded memory, failures, interruption."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest

from nvfp4_prep.errors import ConversionInterrupted, NoSpaceError, NvfpPrepError, UsageError
from nvfp4_prep.output.atomic_file import AtomicFile
from nvfp4_prep.output.experts_fact import ExpertsFact
from nvfp4_prep.output.target import Target
from nvfp4_prep.pipeline.engine import Hooks, run_jobs
from nvfp4_prep.pipeline.jobs import FileJob, JobResult, Unit, UnitResult
from nvfp4_prep_kernels import PreparedTensor

W2 = PreparedTensor.W2_WEIGHT

HEADER = b"h" * 16


def job(name: str, pieces: list[bytes], *, delay: bool = False) -> FileJob:
    """A file of these pieces; units take random time if asked to."""
    offsets = [len(HEADER) + sum(map(len, pieces[:i])) for i in range(len(pieces))]

    def make(number: int) -> UnitResult:
        if delay:
            time.sleep(random.random() * 0.01)
        data = memoryview(pieces[number])
        return UnitResult(pieces=[(offsets[number], data)], digests=[("all", data)], fact=ExpertsFact(W2, (number,)))

    def units() -> list[Unit]:
        return [Unit(len(piece), lambda i=i: make(i)) for i, piece in enumerate(pieces)]

    return FileJob(name, len(HEADER) + sum(map(len, pieces)), HEADER, units)


def test_digests_facts_and_files_are_in_order(tmp_path: Path) -> None:
    chance = random.Random(0)
    contents = {f"f{i}": [chance.randbytes(chance.randrange(1, 5000)) for _ in range(20)] for i in range(5)}
    results: dict[str, JobResult] = {}
    with Target.open(tmp_path / "out", {}) as target:
        jobs = [job(name, pieces, delay=True) for name, pieces in contents.items()]
        run_jobs(jobs, target, threads=6, hooks=Hooks(on_done=lambda result: results.update({result.name: result})))
    for name, pieces in contents.items():
        whole = HEADER + b"".join(pieces)
        assert (tmp_path / "out" / name).read_bytes() == whole
        assert results[name].sha256 == hashlib.sha256(whole).hexdigest()
        assert results[name].digests == {"all": hashlib.sha256(whole[16:]).hexdigest()}
        assert results[name].facts == tuple(ExpertsFact(W2, (number,)) for number in range(20))


def test_first_failure_ends_the_run_and_leaves_no_half_file(tmp_path: Path) -> None:
    class Broken(Exception):
        pass

    def units() -> list[Unit]:
        def fail() -> UnitResult:
            raise Broken

        good = [Unit(3, lambda i=i: UnitResult([(16 + 3 * i, memoryview(b"abc"))])) for i in range(8)]
        return [*good[:5], Unit(3, fail), *good[5:]]

    with Target.open(tmp_path / "out", {}) as target:
        jobs = [job("whole", [b"x" * 10]), FileJob("broken", 43, HEADER, units), job("later", [b"y"])]
        with pytest.raises(Broken):
            run_jobs(jobs, target, threads=3)
        assert [path.name for path in (tmp_path / "out").iterdir() if path.is_file()] in (["whole"], [])
        assert {path.name for path in target.work.rglob("*") if path.is_file()} == {"lock", "journal.jsonl"}


def test_header_that_cannot_be_written_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: AtomicFile, offset_bytes: int, data: bytes) -> None:
        raise NoSpaceError("full")

    monkeypatch.setattr(AtomicFile, "write", full)
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    with Target.open(tmp_path / "out", {}) as target:
        with pytest.raises(NoSpaceError):
            run_jobs([job("a", [b"x" * 10])], target, threads=1)
        assert {path.name for path in target.work.rglob("*") if path.is_file()} == {"lock", "journal.jsonl"}
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors


def test_units_in_work_stay_within_the_budget() -> None:
    lock = threading.Lock()
    now = peak = 0

    def work() -> UnitResult:
        nonlocal now, peak
        with lock:
            now += 1
            peak = max(peak, now)
        time.sleep(0.002)
        with lock:
            now -= 1
        return UnitResult()

    jobs = [FileJob("f", 0, b"", lambda: [Unit(100, work) for _ in range(50)])]
    run_jobs(jobs, None, threads=8, memory_nbytes=4 * 250)
    assert peak == 2


def test_unit_larger_than_the_budget_runs_alone() -> None:
    done = []
    run_jobs(
        [FileJob("f", 0, b"", lambda: [Unit(10**9, lambda i=i: done.append(i) or UnitResult()) for i in range(5)])],
        None,
        threads=4,
    )
    assert sorted(done) == list(range(5))


def test_a_budget_too_small_for_one_unit_is_refused_with_the_minimum() -> None:
    done: list[int] = []
    sizes = [100, 2_000_000]
    jobs = [FileJob("f", 0, b"", lambda: [Unit(size, lambda: done.append(1) or UnitResult()) for size in sizes])]
    with pytest.raises(UsageError, match="at least 8,000,000 bytes") as refused:
        run_jobs(jobs, None, threads=4, memory_nbytes=7_999_999)
    assert "--memory 8;" in str(refused.value) and not done
    run_jobs(jobs, None, threads=4, memory_nbytes=8_000_000)
    assert len(done) == 2


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "640", True])
def test_a_budget_is_a_number_of_bytes(wrong: object) -> None:
    with pytest.raises(UsageError, match="memory_nbytes"):
        run_jobs([], None, memory_nbytes=wrong)  # type: ignore[arg-type]


def test_progress_sums_up_to_the_files_size() -> None:
    class Count:
        total = 0

        def start(self, title: str, total_nbytes: int, done_nbytes: int = 0) -> None: ...

        def advance(self, nbytes: int, label: str) -> None:
            self.total += nbytes

        def close(self) -> None: ...

    count = Count()
    run_jobs([job("f", [b"a" * 7, b"b" * 11, b"c" * 100])], None, threads=1, progress=count)
    assert count.total == 16 + 118


def test_empty_file(tmp_path: Path) -> None:
    with Target.open(tmp_path / "out", {}) as target:
        run_jobs([FileJob("empty", 0, b"", list)], target)
    assert (tmp_path / "out" / "empty").read_bytes() == b""


@pytest.mark.parametrize("signals", [1, 3])
def test_interrupt_waits_for_workers_in_the_middle_of_a_unit(signals: int) -> None:
    """``Thread.join`` that is interrupted takes a running thread for a stopped one."""
    inside, ended = threading.Event(), threading.Event()

    def work() -> UnitResult:
        inside.set()
        time.sleep(0.6)
        ended.set()
        return UnitResult()

    def press() -> None:
        inside.wait()
        for _ in range(signals):
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press).start()
    job = FileJob("a", 1, b"", lambda: [Unit(1, work)])
    with pytest.raises(ConversionInterrupted):
        run_jobs([job], None, threads=2)
    assert ended.is_set()


def test_no_threads_left_is_one_error_and_the_started_ones_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start, started = threading.Thread.start, []

    def limited(thread: threading.Thread) -> None:
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    jobs = [FileJob(f"f{n}", 4, b"head", lambda: [Unit(1, UnitResult)]) for n in range(5)]
    with Target.open(tmp_path / "out", {}) as target, pytest.raises(NvfpPrepError, match="cannot start a thread"):
        run_jobs(jobs, target, threads=4)
    for thread in started:
        thread.join(5)
        assert not thread.is_alive()
    assert not list((tmp_path / "out" / ".nvfp4_prep").rglob("f*"))


@pytest.mark.parametrize("wrong", [0, -1, True, 1.5, "4", 10**6], ids=repr)
@pytest.mark.parametrize("argument", ["threads", "files", "memory_nbytes"])
def test_no_run_without_workers_files_or_memory(argument: str, wrong: object) -> None:
    """What would start no worker, or give it nothing to do, must not end as if all were done."""
    if (argument, wrong) == ("files", 10**6):
        return  # more than there are jobs: all of them at once
    with pytest.raises(UsageError):
        run_jobs([job("a", [b"x" * 2**20])], None, **{argument: wrong})  # type: ignore[arg-type]


def test_a_run_in_which_nobody_worked_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nvfp4_prep.pipeline.engine.WorkerThreads.start", lambda workers: None)
    with pytest.raises(NvfpPrepError, match="2 of the files were not worked on"):
        run_jobs([job("a", [b"x"]), job("b", [b"y"])], None, threads=1)
