"""Condition that a server's load puts on the tensors of a prepared layer."""

from __future__ import annotations

import enum

from nvfp4_prep.serving.prepared_weights import PreparedWeights

__all__ = ["Completeness"]


class Completeness(enum.Enum):
    """Condition that is checked after a load, when a layer is made ready for its kernel."""

    ALL = "all"
    """Every tensor arrived."""
    ALL_OR_NONE = "all or none"
    """Every tensor, or none: a layer may keep what it has, but never half of it."""
    NOTHING = "nothing"
    """Dummy weights, in whose place a reload may bring real ones."""

    def check(self, weights: PreparedWeights, *, reload: bool = False) -> None:
        """Raise :class:`ServingError` if tensors are missing that have to be there."""
        some = weights.arrived and (self is Completeness.ALL_OR_NONE or reload)
        if self is Completeness.ALL or some:
            weights.finish()
