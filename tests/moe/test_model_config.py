"""Which part of config.json speaks of the language model."""

from __future__ import annotations

import math
from typing import Any

import pytest

from nvfp4_prep.moe.model_config import NESTED_KEYS, find_number, text_configs


@pytest.mark.parametrize("key", NESTED_KEYS)
def test_the_nested_part_wins(key: str) -> None:
    config = {"hidden_size": 1, "n_group": 2, key: {"hidden_size": 3}}
    assert list(text_configs(config)) == [{"hidden_size": 3}, config]
    assert find_number(config, ["hidden_size"]) == 3
    assert find_number(config, ["n_group"]) == 2


NO_NUMBERS: list[Any] = ["3", None, True, [3], {"a": 3}, 0, -1.5, math.nan, math.inf, 10**400]


@pytest.mark.parametrize("other", NO_NUMBERS, ids=lambda other: str(other)[:9])
def test_only_positive_numbers_count(other: Any) -> None:
    assert find_number({"a": other}, ["a"]) is None
    assert find_number({"a": other, "b": 0.5}, ["a", "b"]) == 0.5
    assert find_number({"text_config": {"a": other}, "a": 4}, ["a"]) == 4


def test_keys_in_their_order_and_nothing_at_all() -> None:
    assert find_number({"num_experts": 4, "n_routed_experts": 8}, ["n_routed_experts", "num_experts"]) == 8
    assert find_number({"text_config": [1], "llm_config": None}, ["a"]) is None
