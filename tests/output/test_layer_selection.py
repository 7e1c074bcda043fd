"""The text that selects layers, and the directory name of a part."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvfp4_prep.errors import UsageError
from nvfp4_prep.output.layer_selection import LayerSelection


def test_layers_that_are_run_exist() -> None:
    assert LayerSelection.parse("3,1, 5-7,6").choose_present(range(10)) == (1, 3, 5, 6, 7)
    assert LayerSelection.parse("2/2").choose_present([1, 2, 5, 7]) == (5, 7)
    for text in ("9", "1-3", "0-99999999999"):
        with pytest.raises(UsageError, match="layers among 1-2,7"):
            LayerSelection.parse(text).choose_present([1, 2, 7])
    with pytest.raises(UsageError, match="selects none"):
        LayerSelection.parse("1/5").choose_present([1, 2])


@pytest.mark.parametrize("text", ["", "a", "3-1", "0/3", "4/3", "1-2-3", "1,", "-1", "1/0", "1 - 2", "1-", "1-b", "²"])
def test_selections_that_say_nothing(text: str) -> None:
    with pytest.raises(UsageError):
        LayerSelection.parse(text)


@given(st.sets(st.integers(0, 99), min_size=1), st.integers(1, 20))
def test_shares_divide_the_layers(layers: set[int], count: int) -> None:
    shares = [LayerSelection.parse(f"{n}/{count}").choose(layers) for n in range(1, count + 1)]
    assert [layer for share in shares for layer in share] == sorted(layers)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 9)), min_size=1, max_size=5))
def test_ranges_choose_what_they_say(ranges: list[tuple[int, int]]) -> None:
    selection = LayerSelection.parse(",".join(f"{first}-{first + more}" for first, more in ranges))
    want = {layer for first, more in ranges for layer in range(first, first + more + 1)}
    assert set(selection.choose(range(100))) == want
    assert LayerSelection.from_folder_name(selection.folder_name) == selection
    assert "/" not in selection.folder_name
