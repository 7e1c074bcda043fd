"""Byte views of tensors."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nvfp4_prep._util.buffers import BufferPool, byte_view, contiguous, crc32_each, empty_bytes, same_bytes

MIB = 2**20


@pytest.mark.slow
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


def test_pool_keeps_memory_below_its_limit() -> None:
    pool = BufferPool()
    with pool.limit_raised(3 * MIB):
        first = pool.take(MIB)
        address = first.data_ptr()
        view = first[5:7]
        del first
        second = pool.take(MIB)
        assert second.data_ptr() != address, "a view still uses it"
        del view
        third = pool.take(MIB)
        assert third.data_ptr() == address
        del third
        assert pool.kept_nbytes == MIB
        large = pool.take(2 * MIB)
        assert pool.kept_nbytes == 0, "3 MiB are in use"
        del large
        assert pool.kept_nbytes == 2 * MIB
    assert pool.kept_nbytes == 0
    del second
    assert pool.kept_nbytes == 0


def test_limits_of_several_runs_add_up() -> None:
    pool = BufferPool()
    with pool.limit_raised(MIB):
        with pool.limit_raised(MIB):
            both = [pool.take(MIB), pool.take(MIB)]
            del both
            assert pool.kept_nbytes == 2 * MIB
        assert pool.kept_nbytes == MIB


def test_contiguous_copies_only_what_has_gaps() -> None:
    tensor = torch.arange(64, dtype=torch.uint8).reshape(8, 8)
    assert contiguous(tensor) is tensor
    copy = contiguous(tensor[:, ::2])
    assert copy.is_contiguous() and torch.equal(copy, tensor[:, ::2])
