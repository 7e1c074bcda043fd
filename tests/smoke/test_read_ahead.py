"""Reading ahead changes when values are made, and nothing else."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from nvfp4_prep.errors import SourceError
from nvfp4_prep.smoke.read_ahead import ReadAhead, Sequential


def test_the_next_values_are_made_before_they_are_asked_for() -> None:
    made, all_begun = [], threading.Event()

    def make(position: int) -> int:
        made.append(position)
        if position == ahead.threads:
            all_begun.set()
        return position * position

    with ReadAhead() as ahead:
        values = Sequential(ahead, make, 10)
        assert values(0) == 0
        assert all_begun.wait(20)
        assert [values(position) for position in range(1, 10)] == [position**2 for position in range(1, 10)]
    assert sorted(made) == list(range(10))


def test_a_step_back_makes_a_value_again() -> None:
    with ReadAhead() as ahead:
        values = Sequential(ahead, str, 4)
        assert [values(position) for position in (0, 1, 0, 1, 2, 3, 1)] == ["0", "1", "0", "1", "2", "3", "1"]


def test_what_making_raised_is_raised_for_its_own_position() -> None:
    def make(position: int) -> int:
        if position == 2:
            raise SourceError("cannot be read", where="x")
        return position

    with ReadAhead() as ahead:
        values = Sequential(ahead, make, 4)
        assert (values(0), values(1)) == (0, 1)
        with pytest.raises(SourceError, match="cannot be read"):
            values(2)
        with pytest.raises(SourceError, match="cannot be read"):
            ahead.for_each(lambda position: [make(position)].clear(), range(4))


def test_without_threads_the_one_that_asks_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(ThreadPoolExecutor, "submit", refuse)
    threads = set()

    def make(position: int) -> int:
        threads.add(threading.current_thread())
        if position == 3:
            raise SourceError("cannot be read", where="x")
        return position

    with ReadAhead() as ahead:
        values = Sequential(ahead, make, 4)
        assert [values(position) for position in range(3)] == [0, 1, 2]
        with pytest.raises(SourceError):
            values(3)
    assert threads == {threading.current_thread()}
