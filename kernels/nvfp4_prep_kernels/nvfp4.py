"""NVFP4 numbers in torch: decoding codes and block scales, and quantizing activations as the CuteDSL kernel does.

A value is ``e2m1 code * e4m3 block scale * float32 global scale``, one block scale for 16 columns. Everything here
leaves the global scale out: ``code * block scale`` has at most six significant bits and fits float16 exactly.
"""

from __future__ import annotations

import functools

import torch

from nvfp4_prep_kernels.layout import BLOCK_COLS

__all__ = [
    "E2M1_MAX",
    "E4M3_MAX",
    "decode",
    "decode_codes",
    "encode_codes",
    "quantize",
    "quantize_codes",
    "round_e2m1",
    "round_e4m3",
]

E2M1_MAX = 6.0
E4M3_MAX = 448.0
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Midpoints between neighbouring magnitudes; a value on a midpoint goes to the even code.
_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def decode_codes(codes: torch.Tensor) -> torch.Tensor:
    """Decode two e2m1 values a byte, low nibble first: ``uint8 [..., C/2]`` to ``float32 [..., C]``."""
    # one look-up a byte, two values each: half the index memory of one a code
    pairs = _pairs(codes.device).index_select(0, codes.reshape(-1).to(torch.int32))
    return pairs.reshape(*codes.shape[:-1], 2 * codes.shape[-1])


@functools.cache
def _pairs(device: torch.device) -> torch.Tensor:
    """Return the two values of each byte: ``float32 [256, 2]``."""
    values = (*_MAGNITUDES, *(-value for value in _MAGNITUDES))
    return torch.tensor([(values[byte & 0xF], values[byte >> 4]) for byte in range(256)], device=device)


@functools.cache
def _rounding(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest magnitudes that do not yet round up to each next one, and the magnitudes: float32."""
    middles = torch.tensor(_MIDPOINTS)
    # codes 1, 3, 5, 7 are odd: a tie below them stays with the even code, every other one goes up
    middles[1::2] = torch.nextafter(middles[1::2], torch.zeros(()))
    return middles.to(device), torch.tensor(_MAGNITUDES, device=device)


def encode_codes(values: torch.Tensor) -> torch.Tensor:
    """Return the inverse of :func:`decode_codes` for values that :func:`round_e2m1` gave; zero has no sign."""
    magnitudes = torch.tensor(_MAGNITUDES, device=values.device)
    code = torch.searchsorted(magnitudes, values.abs().contiguous()).to(torch.uint8)
    code |= (values < 0).to(torch.uint8) << 3
    return code[..., 0::2] | code[..., 1::2] << 4


def decode(codes: torch.Tensor, block_scales: torch.Tensor) -> torch.Tensor:
    """Return ``code * block scale``.

    Args:
        codes: ``uint8 [..., C/2]``.
        block_scales: ``uint8 [..., C/16]``, e4m3 bytes in row-major order.

    Returns:
        ``float32 [..., C]``, exact.
    """
    scales = block_scales.view(torch.float8_e4m3fn).to(torch.float32)
    values = decode_codes(codes)
    values.view(*scales.shape, BLOCK_COLS).mul_(scales.unsqueeze(-1))
    return values


def round_e4m3(values: torch.Tensor) -> torch.Tensor:
    """Return the nearest e4m3 values (ties to even), saturating at 448: ``float32`` in the shape of ``values``."""
    return values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).to(torch.float32)


def round_e2m1(values: torch.Tensor) -> torch.Tensor:
    """Return the nearest e2m1 values (ties to even), saturating at 6: ``float32`` in the same shape; NaN stays NaN."""
    magnitude = values.abs()
    lasts, magnitudes = _rounding(values.device)
    rounded = magnitudes.take(torch.searchsorted(lasts, magnitude))
    return torch.where(magnitude.isnan(), magnitude, rounded).copysign(values)


def quantize(values: torch.Tensor, inverse_scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize rows with a global scale: ``values ≈ code * block scale / inverse_scale``.

    Args:
        values: ``[..., C]``, C a multiple of 16.
        inverse_scale: 1 / input_scale; the kernel's ``fc2_input_scale``.

    Returns:
        ``(codes, scales)``, float32 ``[..., C]`` and ``[..., C/16]``: e2m1 and e4m3 values, not yet packed.
        block scale = e4m3(max|values| / 6 * inverse_scale), code = e2m1(values * inverse_scale / block scale).
    """
    blocks = values.to(torch.float32).reshape(*values.shape[:-1], -1, BLOCK_COLS)
    scales = round_e4m3(blocks.abs().amax(dim=-1) * (1.0 / E2M1_MAX) * inverse_scale)
    codes = quantize_codes(blocks, scales, inverse_scale)
    return codes.flatten(-2), scales


def quantize_codes(blocks: torch.Tensor, scales: torch.Tensor, inverse_scale: float) -> torch.Tensor:
    """Return e2m1 values ``[..., n, 16]`` of blocks with block scales ``[..., n]``; zero where the scale is."""
    factor = torch.where(scales == 0, 0.0, inverse_scale / scales)
    return round_e2m1(blocks * factor.unsqueeze(-1))
