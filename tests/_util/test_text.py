"""Lists and numbers in messages."""

from __future__ import annotations

import pytest

from nvfp4_prep._util.text import and_more, first_of


@pytest.mark.parametrize(
    ("names", "most", "text"),
    [
        ([], 3, ""),
        (["a", "b", "c"], 3, "a, b, c"),
        (["a", "b", "c", "d"], 3, "a, b, c and 1 more"),
        (range(7), 1, "0 and 6 more"),
    ],
)
def test_the_first_names_and_how_many_others_there_are(names: list[str], most: int, text: str) -> None:
    assert first_of(names, most) == text
    assert first_of(iter(names), most) == text


def test_names_of_any_length_stay_short() -> None:
    assert len(first_of(["a" * 10_000] * 9, separator="; ")) < 800


def test_others_with_their_noun() -> None:
    assert [and_more(number, "problem") for number in range(3)] == [
        "",
        " (and 1 more problem)",
        " (and 2 more problems)",
    ]
