"""Byte views of tensors."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nvfp4_prep._util.buffers import byte_view, crc32_each, empty_bytes, same_bytes


def test_view_shares_memory_and_keeps_the_tensor_alive() -> None:
    tensor = torch.arange(1 << 16, dtype=torch.int32)
    alive = weakref.ref(tensor)
    part = byte_view(tensor)[400:404]
    assert bytes(part) == (100).to_bytes(4, "little")
    part[0] = 7
    assert tensor[100] == 7
    del tensor
    gc.collect()
    assert alive() is not None
    del part
    gc.collect()
    assert alive() is None


def test_what_has_no_view() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        byte_view(torch.zeros(4, 4).t())
    with pytest.raises(ValueError, match="CPU"):
        byte_view(torch.zeros(4, device="meta"))
    assert len(byte_view(empty_bytes(0))) == 0


@given(st.integers(1, 100), st.integers(0, 99), st.integers(0, 7), st.booleans())
def test_same_bytes(nbytes: int, position: int, shift: int, transposed: bool) -> None:
    base = torch.randint(0, 256, (nbytes + shift, 3), dtype=torch.uint8)[shift:]
    a, b = (base.t(), base.t().clone()) if transposed else (base, base.clone())
    assert same_bytes(a, b)
    b[position % b.shape[0], 0] ^= 1
    assert not same_bytes(a, b)
    assert not same_bytes(a, b[:-1])


def test_crc32_of_each_expert() -> None:
    """The check value of the CRC-32 that zlib and gzip use is that of the digits 1 to 9."""
    digits = torch.tensor(list(b"123456789"), dtype=torch.uint8).reshape(3, 3)
    assert crc32_each(torch.stack([digits, digits.flip(0)])) == [0xCBF43926, 0x93E97E0C]
    assert crc32_each(torch.zeros(1, 4, dtype=torch.uint8)) == [0x2144DF1C]
