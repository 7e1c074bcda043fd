"""The one way from a command's argument to a source, and who closes it."""

from __future__ import annotations

from pathlib import Path

import pytest

from nvfp4_prep.checkpoint.local_source import LocalSource
from nvfp4_prep.hub import opened_source


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> list[LocalSource]:
    """Return a list of the sources that were closed."""
    found: list[LocalSource] = []
    monkeypatch.setattr(LocalSource, "close", lambda source: found.append(source))
    return found


def test_what_a_command_opened_is_closed_after_an_error_too(tmp_path: Path, closed: list[LocalSource]) -> None:
    with pytest.raises(ZeroDivisionError), opened_source(tmp_path, leave_open=True) as opened:
        raise ZeroDivisionError
    assert closed == [opened]


@pytest.mark.parametrize("leave_open", [False, True])
def test_an_opened_source_may_be_left_open(tmp_path: Path, closed: list[LocalSource], leave_open: bool) -> None:
    source = LocalSource(tmp_path)
    with opened_source(source, leave_open=leave_open) as opened:
        assert opened is source
    assert closed == ([] if leave_open else [source])
