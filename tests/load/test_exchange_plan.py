"""Rounds of the cooperative load, without ranks and without data."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nvfp4_prep.load.exchange_plan import plan_rounds


@given(st.lists(st.integers(0, 40), min_size=1, max_size=60), st.integers(1, 8), st.integers(1, 9))
def test_every_expert_is_read_once_and_every_slot_gets_its_own(experts: list[int], ranks: int, at_once: int) -> None:
    slots: dict[int, int] = {}
    read: list[int] = []
    for planned in plan_rounds(experts, ranks, at_once):
        assert len(planned.readers) == ranks and planned.count > 0
        assert max(map(len, planned.readers)) <= at_once
        assert max(map(len, planned.readers)) - min(map(len, planned.readers)) <= 1
        received = [expert for rank in planned.readers for expert in rank]
        read += received
        for copy in planned.copies:
            for index in range(copy.count):
                assert copy.slot + index not in slots
                slots[copy.slot + index] = received[copy.position + index]
    assert sorted(read) == sorted(set(experts))
    assert [slots[slot] for slot in range(len(experts))] == experts


def test_experts_of_one_rank_and_slots_in_order_are_long_ranges() -> None:
    first, second = plan_rounds(range(16), 2, 4)
    assert first.readers == ((0, 1, 2, 3), (4, 5, 6, 7)) and second.readers == ((8, 9, 10, 11), (12, 13, 14, 15))
    assert [len(planned.copies) for planned in (first, second)] == [1, 1]
