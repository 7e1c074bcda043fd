"""The names of what can run a smoke test; apart, because ``verify --help`` needs no torch."""

from __future__ import annotations

__all__ = ["BACKENDS"]

BACKENDS = ("auto", "flashinfer", "triton", "torch")
