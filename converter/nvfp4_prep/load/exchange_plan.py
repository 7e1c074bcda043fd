"""Rounds in which ranks read whole experts and give each other columns: index arithmetic, no data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

__all__ = ["Round", "SlotCopy", "plan_rounds"]


@dataclass(frozen=True, slots=True)
class SlotCopy:
    """``count`` experts received from position ``position`` on go to the slots from ``slot`` on."""

    slot: int
    position: int
    count: int


@dataclass(frozen=True, slots=True)
class Round:
    """One exchange.

    Attributes:
        readers: for each rank the stored experts that it reads, ascending; together ascending as well, and received
            in this order.
        copies: from what was received to the slots.
    """

    readers: tuple[tuple[int, ...], ...]
    copies: tuple[SlotCopy, ...]

    @property
    def count(self) -> int:
        """Experts of all ranks."""
        return sum(map(len, self.readers))


def plan_rounds(experts: Sequence[int], ranks: int, at_once: int) -> tuple[Round, ...]:
    """Plan the rounds of one parameter: every stored expert is read once, by one rank, whatever the slots.

    Args:
        experts: for each slot the stored expert; any order, repetitions allowed.
        ranks: that take part.
        at_once: experts that a rank has memory for in a round.
    """
    needed = sorted(set(experts))
    count = -(-len(needed) // (at_once * ranks))
    return tuple(_round(block, experts, ranks) for block in _spread(needed, count))


def _round(block: Sequence[int], experts: Sequence[int], ranks: int) -> Round:
    positions = {expert: position for position, expert in enumerate(block)}
    copies: list[SlotCopy] = []
    for slot, expert in enumerate(experts):
        if expert not in positions:
            continue
        last, position = copies[-1] if copies else None, positions[expert]
        if last is not None and (last.slot + last.count, last.position + last.count) == (slot, position):
            copies[-1] = SlotCopy(last.slot, last.position, last.count + 1)
        else:
            copies.append(SlotCopy(slot, position, 1))
    return Round(tuple(map(tuple, _spread(block, ranks))), tuple(copies))


def _spread(values: Sequence[int], parts: int) -> list[Sequence[int]]:
    """Divide values in order into parts of equal length; a remainder makes the first ones longer by one."""
    each, more = divmod(len(values), parts)
    ends = [part * each + min(part, more) for part in range(parts + 1)]
    return [values[begin:end] for begin, end in pairwise(ends)]
