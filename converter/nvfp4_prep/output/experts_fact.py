"""Facts about the experts of one unit of work, on their way from the engine through the journal to the manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self, TypeGuard

from nvfp4_prep_kernels import PreparedTensor, Projection

__all__ = ["ExpertsFact", "ReconciledExpert"]

_TENSORS = {tensor.value: tensor for tensor in PreparedTensor}
_SIDES = {side.value: side for side in (Projection.GATE, Projection.UP)}


@dataclass(frozen=True)
class ReconciledExpert:
    """Effect of rescaling one side's block scales on an expert.

    Attributes:
        expert: its number in the layer.
        side: whose block scales were rescaled.
        rounded: how many of them do not keep their value exactly.
        underflowed: how many of those became zero.
        worst_relative: largest relative change of one that did not.
    """

    expert: int
    side: Projection
    rounded: int
    underflowed: int
    worst_relative: float

    def to_json(self) -> dict[str, Any]:
        """Return the value that the journal holds."""
        return {**asdict(self), "side": self.side.value}

    @classmethod
    def parse(cls, value: object) -> Self | None:
        """Return what a journal's value says, or ``None`` if it is not valid."""
        if not isinstance(value, dict):
            return None
        side, worst = value.get("side"), value.get("worst_relative")
        expert, rounded, underflowed = (value.get(key) for key in ("expert", "rounded", "underflowed"))
        if not isinstance(side, str) or side not in _SIDES or not is_number(worst):
            return None
        if not (is_count(expert) and is_count(rounded) and is_count(underflowed)):
            return None
        return cls(expert, _SIDES[side], rounded, underflowed, worst)


@dataclass(frozen=True)
class ExpertsFact:
    """Facts about some experts' bytes in one prepared tensor, in the experts' order.

    Attributes:
        tensor: which one.
        crc32: CRC-32 of each expert's prepared bytes.
        reconciled: the experts whose block scales were rescaled.
        errors: the three sums of each expert whose gate and up scales differ; :mod:`nvfp4_prep.moe.policy_errors` says
            what they are.
    """

    tensor: PreparedTensor
    crc32: tuple[int, ...]
    reconciled: tuple[ReconciledExpert, ...] = ()
    errors: tuple[tuple[float, float, float], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the value that the journal holds."""
        return {
            "tensor": self.tensor.value,
            "crc32": list(self.crc32),
            "reconciled": [expert.to_json() for expert in self.reconciled],
            "errors": [list(sums) for sums in self.errors],
        }

    @classmethod
    def parse(cls, value: object) -> Self | None:
        """Return what a journal's value says, or ``None`` if it is not valid."""
        tensor = value.get("tensor") if isinstance(value, dict) else None
        if not isinstance(value, dict) or not isinstance(tensor, str) or tensor not in _TENSORS:
            return None
        crc32, reconciled, errors = (_list(value, key) for key in ("crc32", "reconciled", "errors"))
        if crc32 is None or reconciled is None or errors is None or "crc32" not in value:
            return None
        experts = tuple(ReconciledExpert.parse(item) for item in reconciled)
        if not all(is_count(number) and number < 2**32 for number in crc32) or None in experts:
            return None
        if not all(isinstance(item, list) and len(item) == 3 and all(map(is_number, item)) for item in errors):
            return None
        return cls(
            _TENSORS[tensor],
            tuple(crc32),
            tuple(expert for expert in experts if expert is not None),
            tuple((item[0], item[1], item[2]) for item in errors),
        )


def _list(value: Mapping[str, Any], key: str) -> list[Any] | None:
    found = value.get(key, [])
    return found if isinstance(found, list) else None


def is_count(value: object) -> TypeGuard[int]:
    """Return whether a JSON value is a whole number from 0 on that 63 bits hold."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def is_number(value: object) -> TypeGuard[int | float]:
    """Return whether a JSON value is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)
