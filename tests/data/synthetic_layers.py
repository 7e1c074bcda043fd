"""MoE layers made of nothing but a name: the same bytes on every machine, with the standard library alone.

Every tensor is the output of SHAKE-256 over ``"<layer name>/<expert>.<projection>.<leaf>"``, mapped to values that a
checkpoint can hold. `make_vllm_digests.py` gives these layers to the real vLLM and records what it makes of them in
`vllm_digests.json`; the tests regenerate them and compare our bytes without needing vLLM.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["LAYERS", "SyntheticLayer", "SyntheticTensor"]

# e4m3fn has two NaN encodings; no quantizer writes them, and a NaN byte would make value comparisons meaningless.
_NO_NAN = bytes(0x38 if byte in (0x7F, 0xFF) else byte for byte in range(256))


@dataclass(frozen=True)
class SyntheticTensor:
    """One source tensor: ``dtype`` is "U8", "F8_E4M3" or "F32", ``data`` its little-endian bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True)
class SyntheticLayer:
    """One MoE layer with ModelOpt leaves.

    Attributes:
        experts, hidden, intermediate: E, H and I, unpadded.
        gated: gate, up and down projections, else up and down alone.
        equal_gate_up: gate and up of an expert share one weight_scale_2 (the usual case). Otherwise they differ.
        label: tells layers of equal sizes apart.
    """

    experts: int
    hidden: int
    intermediate: int
    gated: bool = True
    equal_gate_up: bool = True
    label: str = ""

    @property
    def name(self) -> str:
        """Seed of every byte and key in `vllm_digests.json`."""
        kind = "gated" if self.gated else "nongated"
        suffix = "" if self.equal_gate_up else "-unequal"
        return f"{kind}-e{self.experts}-h{self.hidden}-i{self.intermediate}{suffix}{self.label}"

    @property
    def projections(self) -> tuple[str, ...]:
        """Projection names as checkpoints spell them."""
        return ("gate_proj", "up_proj", "down_proj") if self.gated else ("up_proj", "down_proj")

    def tensor(self, expert: int, projection: str, leaf: str) -> SyntheticTensor:
        """One tensor; ``leaf`` is weight, weight_scale, weight_scale_2 or input_scale."""
        rows, cols = (self.hidden, self.intermediate) if projection == "down_proj" else (self.intermediate, self.hidden)
        if leaf == "weight":
            return SyntheticTensor("U8", (rows, cols // 2), self._bytes(expert, projection, leaf, rows * cols // 2))
        if leaf == "weight_scale":
            data = self._bytes(expert, projection, leaf, rows * cols // 16).translate(_NO_NAN)
            return SyntheticTensor("F8_E4M3", (rows, cols // 16), data)
        if leaf not in ("weight_scale_2", "input_scale"):
            raise KeyError(leaf)
        shared = leaf == "weight_scale_2" and self.equal_gate_up and projection == "up_proj" and self.gated
        return SyntheticTensor("F32", (), self._positive_float(expert, "gate_proj" if shared else projection, leaf))

    def tensors(self) -> Iterator[tuple[str, SyntheticTensor]]:
        """All tensors of the layer as ``("<expert>.<projection>.<leaf>", tensor)``."""
        for expert in range(self.experts):
            for projection in self.projections:
                for leaf in ("weight", "weight_scale", "weight_scale_2", "input_scale"):
                    yield f"{expert}.{projection}.{leaf}", self.tensor(expert, projection, leaf)

    def _bytes(self, expert: int, projection: str, leaf: str, nbytes: int) -> bytes:
        return hashlib.shake_256(f"{self.name}/{expert}.{projection}.{leaf}".encode()).digest(nbytes)

    def _positive_float(self, expert: int, projection: str, leaf: str) -> bytes:
        """A float32 between 2**-14 and 2**-6 with a random mantissa: the range of real global scales."""
        (bits,) = struct.unpack("<I", self._bytes(expert, projection, leaf, 4))
        return struct.pack("<I", (113 + (bits >> 23) % 8) << 23 | bits & 0x7FFFFF)


LAYERS = (
    # aligned, gated
    SyntheticLayer(4, 256, 128),
    SyntheticLayer(4, 256, 64),
    SyntheticLayer(3, 512, 192),
    SyntheticLayer(1, 256, 512),
    SyntheticLayer(4, 256, 128, equal_gate_up=False),
    # I padded, H padded, both
    SyntheticLayer(4, 256, 96),
    SyntheticLayer(4, 320, 352),
    SyntheticLayer(4, 336, 128),
    SyntheticLayer(2, 128, 48, equal_gate_up=False),
    SyntheticLayer(2, 16, 16),
    # not gated
    SyntheticLayer(4, 256, 128, gated=False),
    SyntheticLayer(4, 256, 192, gated=False),
    SyntheticLayer(4, 256, 96, gated=False),
    SyntheticLayer(3, 320, 64, gated=False),
    # sizes of real models: Kimi-K2.5, Nemotron-3-Nano, Qwen3-30B-A3B
    SyntheticLayer(1, 7168, 2048),
    SyntheticLayer(1, 2688, 1856, gated=False),
    SyntheticLayer(2, 2048, 768),
)
"""The layers in `vllm_digests.json`."""
