"""The plan of reads against plain slicing of bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvfp4_prep.checkpoint.tensors import TensorRecord
from nvfp4_prep.load.read_plan import ALIGNMENT, Chunk, Segment, pieces, plan_reads
from nvfp4_prep_kernels import ExpertSlice

PATH = Path("experts.safetensors")


@st.composite
def shares(draw: st.DrawFn) -> tuple[TensorRecord, ExpertSlice, list[int]]:
    """A stored tensor somewhere in a file, a run pattern inside one expert and a list of experts."""
    runs = draw(st.integers(1, 6))
    run = draw(st.integers(1, 9000) | st.integers(64 * 1024, 70_000))
    stride = run + draw(st.just(0) | st.integers(0, 3) | st.integers(0, 9000))
    offset = draw(st.integers(0, 5000))
    expert_nbytes = offset + (runs - 1) * stride + run + draw(st.integers(0, 5000))
    experts = draw(st.integers(1, 6))
    begin = draw(st.integers(0, 3 * ALIGNMENT))
    record = TensorRecord("t", "U8", (experts, 1, expert_nbytes), PATH.name, begin, experts * expert_nbytes)
    slots = draw(st.lists(st.integers(0, experts - 1), min_size=1, max_size=8))
    return record, ExpertSlice((1, runs * run), offset, run, stride, runs), slots


def taken(segment: Segment) -> list[tuple[int, int]]:
    """Byte ranges of a segment, one by one."""
    begins = [segment.offset_bytes + run * segment.stride_bytes for run in range(segment.runs)]
    return [(begin, begin + segment.run_nbytes) for begin in begins]


def bytes_in_order(chunks: list[Chunk]) -> list[int]:
    """File position of every byte of the parameter, in the parameter's order."""
    positions: list[int] = []
    for chunk in sorted(chunks, key=lambda chunk: chunk.destination_bytes):
        assert chunk.destination_bytes == len(positions)
        before = len(positions)
        for segment in chunk.segments:
            for begin, end in taken(segment):
                positions.extend(range(begin, end))
        assert chunk.nbytes == len(positions) - before
    return positions


def oracle(record: TensorRecord, part: ExpertSlice, slots: list[int]) -> list[int]:
    """The same from the definition of a slice."""
    stored = record.nbytes // record.shape[0]
    positions: list[int] = []
    for expert in slots:
        for run in range(part.runs):
            begin = record.offset_bytes + expert * stored + part.offset_bytes + run * part.stride_bytes
            positions.extend(range(begin, begin + part.run_nbytes))
    return positions


@settings(max_examples=60, deadline=None)
@given(shares(), st.sampled_from([65536, 65536 + ALIGNMENT, 1 << 20]), st.booleans(), st.booleans())
@pytest.mark.slow
def test_every_byte_of_the_parameter_comes_from_its_place(
    share: tuple[TensorRecord, ExpertSlice, list[int]], limit: int, mapped: bool, divided: bool
) -> None:
    record, part, slots = share
    tasks = plan_reads(PATH, record, part, slots, limit, mapped=mapped, divided=divided)
    chunks = [chunk for task in tasks for chunk in task.chunks]
    assert all(chunk.window is None and chunk.long == (chunk.nbytes > limit) for chunk in chunks)
    assert all(len(chunk.segments) == 1 and chunk.segments[0].contiguous for chunk in chunks if chunk.long)
    assert all(0 < chunk.nbytes <= limit or divided for chunk in chunks)
    assert bytes_in_order(chunks) == oracle(record, part, slots)
    assert all(segment.runs == 1 or not segment.contiguous for chunk in chunks for segment in chunk.segments)
    for chunk in chunks:
        assert chunk.sliced == (not mapped and any(not segment.contiguous for segment in chunk.segments))
        if chunk.sliced:
            assert len(chunk.segments) == 1 and chunk.segments[0].span_nbytes <= limit
    assert sum(task.nbytes for task in tasks) == len(slots) * part.nbytes


@given(st.integers(0, 1 << 40), st.integers(1, 1 << 24), st.sampled_from([65536, 65536 + ALIGNMENT, 1 << 20]))
def test_pieces_cover_a_range_and_end_at_pages(offset: int, nbytes: int, limit: int) -> None:
    segment = Segment(offset, nbytes, nbytes, 1)
    begins = pieces(segment, limit)
    ends = [*begins[1:], offset + nbytes]
    assert begins[0] <= offset < begins[0] + ALIGNMENT
    assert all(begin % ALIGNMENT == 0 and end - begin <= limit for begin, end in zip(begins, ends, strict=True))
    assert all(max(begin, offset) < end for begin, end in zip(begins, ends, strict=True))


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(shares(), st.sampled_from([65536, 65536 + ALIGNMENT, 1 << 20]))
def test_windows_cover_each_expert_once_and_hold_their_segments(
    share: tuple[TensorRecord, ExpertSlice, list[int]], limit: int
) -> None:
    record, part, slots = share
    stored = record.nbytes // record.shape[0]
    checksums = [100 + expert for expert in range(record.shape[0])]
    tasks = plan_reads(PATH, record, part, slots, limit, checksums)
    assert sorted(task.expert for task in tasks if task.expert is not None) == sorted(slots)
    for task in tasks:
        assert task.expert is not None and task.crc32 == 100 + task.expert
        position = record.offset_bytes + task.expert * stored
        for chunk in task.chunks:
            assert chunk.window is not None
            begin, nbytes = chunk.window
            assert begin == position and 0 < nbytes <= limit
            assert all(begin <= low < high <= begin + nbytes for s in chunk.segments for low, high in taken(s))
            position += nbytes
        assert position == record.offset_bytes + (task.expert + 1) * stored
    chunks = [chunk for task in tasks for chunk in task.chunks]
    chunks.sort(key=lambda chunk: (chunk.destination_bytes, chunk.nbytes))
    assert bytes_in_order(chunks) == oracle(record, part, slots)


def test_neighbouring_whole_experts_become_one_range_cut_at_pages() -> None:
    record = TensorRecord("t", "U8", (8, 1, 300_000), PATH.name, 1000, 2_400_000)
    whole = ExpertSlice((1, 300_000), 0, 300_000, 300_000, 1)
    tasks = plan_reads(PATH, record, whole, [2, 3, 4, 5], 1 << 20)
    ends = [task.chunks[0].segments[0].offset_bytes + task.nbytes for task in tasks]
    assert len(tasks) == 2 and ends[-1] == 1000 + 6 * 300_000
    assert ends[0] % ALIGNMENT == 0


def test_whole_rows_of_neighbouring_experts_become_long_ranges() -> None:
    """Columns of w2 at Kimi-K2.5's sizes: every read but the last one of neighbours takes nearly a whole buffer."""
    rows, row_nbytes, limit = 7168, 1024, 4 << 20
    record = TensorRecord("t", "U8", (8, rows, row_nbytes), PATH.name, 512, 8 * rows * row_nbytes)
    columns = ExpertSlice((rows, 128), 3 * 128, 128, row_nbytes, rows)
    chunks = [task.chunks[0] for task in plan_reads(PATH, record, columns, [1, 2, 3, 6], limit)]
    spans = [chunk.segments[0].span_nbytes for chunk in chunks]
    assert all(chunk.sliced for chunk in chunks)
    assert len(spans) == 6 + 2 and all(limit - row_nbytes < span <= limit for span in (*spans[:5], spans[6]))


def test_tasks_ascend_in_the_file_whatever_the_slots() -> None:
    record = TensorRecord("t", "U8", (8, 1, 70_000), PATH.name, 8, 560_000)
    whole = ExpertSlice((1, 70_000), 0, 70_000, 70_000, 1)
    tasks = plan_reads(PATH, record, whole, [7, 0, 3, 3, 1], 65536)
    starts = [task.chunks[0].segments[0].offset_bytes for task in tasks]
    assert starts == sorted(starts)
