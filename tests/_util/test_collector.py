"""The cycle collector rests while a plan is made, and comes back whatever happens."""

from __future__ import annotations

import gc

import pytest

from nvfp4_prep._util.collector import collector_paused


def test_pause_ends_with_the_block_also_when_it_fails() -> None:
    assert gc.isenabled()
    with pytest.raises(ValueError, match="inside"), collector_paused():
        assert not gc.isenabled()
        with collector_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
        raise ValueError("inside")
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with collector_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
