"""The loader on CPU tensors: bit equality with slicing in memory, bytes counted, failures."""

from __future__ import annotations

import os
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nvfp4_prep import ConvertOptions, SampleModel, convert, write_sample
from nvfp4_prep.errors import CheckpointError, LoadError, NvfpPrepError, UsageError, VerificationError
from nvfp4_prep.load import (
    Catalog,
    DirectIO,
    ExpertLoader,
    Gather,
    LoadedLayer,
    LoadOptions,
    RankShare,
    handle_of,
    load_layer,
    load_layers,
    loader,
    make_handle,
    mmap_gather,
    reader,
)
from nvfp4_prep.load.options import default_threads
from nvfp4_prep.load.reader import FileReader
from nvfp4_prep_kernels import MoeDims, PreparedTensor, rank_slice, take_rank
from support.cases import slow_after
from support.load_files import BATCHED, Written, write_checkpoint

DIMS = MoeDims(experts=6, intermediate=512, hidden=512)
SMALL = LoadOptions(threads=2, chunk_nbytes=65536)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write_checkpoint(tmp_path_factory.mktemp("prepared"), DIMS, layers=(1, 2))


def assert_share(loaded: LoadedLayer, written: Written) -> None:
    """Every tensor equals the share that the layout package cuts out of the whole tensor in memory."""
    whole = written.tensors[loaded.record.index]
    experts = list(loaded.share.experts or range(written.dims.experts))
    assert set(loaded.tensors) == set(whole)
    for name, tensor in loaded.tensors.items():
        if name in {tensor.value for tensor in PreparedTensor}:
            stored = whole[name].view(torch.uint8)[experts]
            share = loaded.share
            expected = take_rank(
                written.layout, PreparedTensor(name), stored, written.dims, share.tp_rank, share.tp_size
            )
            assert tensor.dtype == whole[name].dtype
            assert torch.equal(tensor.view(torch.uint8), expected)
        else:
            assert torch.equal(tensor, whole[name][experts])


def read_nbytes(written: Written, share: RankShare) -> int:
    """Bytes that whole rows have: all of w2, but for what lies before the first run and after the last one."""
    slots, dims = len(share.experts or range(written.dims.experts)), written.dims
    total = 0
    for tensor in PreparedTensor:
        part = rank_slice(written.layout, tensor, dims, share.tp_rank, share.tp_size)
        whole = rank_slice(written.layout, tensor, dims, 0, 1)
        total += slots * (part if tensor.is_w13 else whole).nbytes
    return total


def share_nbytes(written: Written, share: RankShare) -> int:
    slots = len(share.experts or range(written.dims.experts))
    parts = [
        rank_slice(written.layout, tensor, written.dims, share.tp_rank, share.tp_size) for tensor in PreparedTensor
    ]
    return slots * sum(part.nbytes for part in parts)


COMBINATIONS = [
    ((tp_rank, tp), (ep_rank, ep))
    for tp in (1, 2, 4, 8)
    for ep in (1, 2, 4, 6)
    for tp_rank in {0, tp - 1}
    for ep_rank in {0, ep - 1}
]


@pytest.mark.parametrize(("tp", "ep"), slow_after(25, COMBINATIONS))
@pytest.mark.parametrize("direct_io", DirectIO)
@pytest.mark.parametrize("gather", Gather)
def test_reads_exactly_the_share_or_whole_rows(
    written: Written,
    tp: tuple[int, int],
    ep: tuple[int, int],
    direct_io: DirectIO,
    gather: Gather,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(FileReader, "cached", lambda *_: direct_io is DirectIO.NEVER)
    checkpoint = Catalog.open(written.root)
    share = RankShare.of(DIMS.experts, tp, ep)
    options = LoadOptions(threads=2, chunk_nbytes=1 << 21, direct_io=direct_io, gather=gather)
    with ExpertLoader("cpu", options) as loader:
        layers, report = load_layers(checkpoint, [checkpoint.layer(1)], share, loader)
    assert_share(layers[0], written)
    assert report.nbytes == share_nbytes(written, share)
    resident = direct_io is DirectIO.NEVER  # the rule of Gather.AUTO: in the page cache, four ranks or more
    exact = gather is Gather.MMAP or (gather is Gather.AUTO and resident and tp[1] >= 4)
    assert report.nbytes <= report.counts.nbytes
    assert report.counts.nbytes <= 1.01 * (report.nbytes if exact else read_nbytes(written, share))
    assert (report.counts.gathered_nbytes > 0) == (exact and tp[1] > 1)


@pytest.mark.parametrize(
    ("gather", "cached", "network", "tp", "mapped"),
    [
        (Gather.AUTO, True, False, 4, True),
        (Gather.AUTO, True, False, 2, False),
        (Gather.AUTO, False, False, 4, False),
        (Gather.AUTO, True, True, 4, False),
        (Gather.ROWS, True, False, 4, False),
        (Gather.MMAP, False, True, 2, True),
    ],
)
def test_only_columns_of_a_file_in_memory_are_taken_from_a_mapping(
    written: Written,
    monkeypatch: pytest.MonkeyPatch,
    gather: Gather,
    cached: bool,
    network: bool,
    tp: int,
    mapped: bool,
) -> None:
    monkeypatch.setattr(FileReader, "cached", lambda *_: cached)
    monkeypatch.setattr("nvfp4_prep.load.open_files.is_network_storage", lambda _: network)
    made: list[object] = []
    begin = mmap_gather.FileMapping.__init__

    def note(*args: Any) -> None:
        made.append(args)
        begin(*args)

    monkeypatch.setattr(mmap_gather.FileMapping, "__init__", note)
    options = LoadOptions(threads=2, gather=gather, direct_io=DirectIO.NEVER)
    assert_share(load_layer(written.root, 1, tp=(1, tp), options=options), written)
    assert bool(made) is mapped


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("verify", [False, True])
def test_layouts_with_other_patterns(tmp_path: Path, gated: bool, tp: int, verify: bool) -> None:
    options = BATCHED if gated else None
    other = write_checkpoint(tmp_path, MoeDims(3, 256, 256), gated=gated, options=options)
    for rank in range(tp):
        chosen = LoadOptions(threads=2, chunk_nbytes=65536, verify=verify)
        assert_share(load_layer(tmp_path, 1, tp=(rank, tp), options=chosen), other)


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    experts=st.lists(st.integers(0, DIMS.experts - 1), min_size=1, max_size=9),
    tp=st.sampled_from([(0, 1), (1, 2), (3, 4), (5, 8)]),
    verify=st.booleans(),
    chunk=st.sampled_from([65536, 69632, 1 << 20]),
    gather=st.sampled_from(Gather),
)
def test_any_expert_map(
    written: Written, experts: list[int], tp: tuple[int, int], verify: bool, chunk: int, gather: Gather
) -> None:
    options = LoadOptions(threads=3, chunk_nbytes=chunk, buffers=1, verify=verify, gather=gather)
    assert_share(load_layer(written.root, 2, tp=tp, experts=experts, options=options), written)


def test_without_mappings_the_runs_are_cut_out_of_reads(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "mapping_supported", lambda: False)
    monkeypatch.delattr(mmap_gather.FileMapping, "populate")
    assert_share(load_layer(written.root, 1, tp=(1, 4), options=replace(SMALL, gather=Gather.MMAP)), written)


def test_a_default_device_changes_nothing(written: Written) -> None:
    with torch.device("meta"):
        loaded = load_layer(written.root, 1, tp=(1, 2), device="cpu", options=SMALL)
    assert_share(loaded, written)


def test_direct_io_is_really_used_where_the_file_system_has_it(written: Written) -> None:
    checkpoint = Catalog.open(written.root)
    options = LoadOptions(threads=2, chunk_nbytes=1 << 21, direct_io=DirectIO.ALWAYS)
    source = reader.FileReader.open(written.file(1), direct=True)
    supported = source.direct
    source.close()
    with ExpertLoader("cpu", options) as loader:
        _, report = load_layers(checkpoint, [checkpoint.layer(1)], RankShare(), loader)
    assert (report.counts.direct_nbytes > 0) == supported


def test_default_options_stay_small() -> None:
    assert [default_threads(cores) for cores in (1, 2, 8, 16, 200)] == [2, 2, 6, 12, 12]
    options = LoadOptions(threads=12)
    assert options.buffer_count == 12 and options.staging_nbytes < 2**26
    assert LoadOptions(threads=1).buffer_count == 1
    assert LoadOptions(threads=1).chunk_nbytes == 4 << 20


def test_linear_placement_of_experts() -> None:
    shares = [RankShare.of(10, ep=(rank, 4)).experts for rank in range(4)]
    assert shares == [(0, 1, 2), (3, 4, 5), (6, 7), (8, 9)]
    with pytest.raises(UsageError, match="no rank 4 of 4"):
        RankShare.of(10, ep=(4, 4))


def test_several_layers_with_one_loader_and_progress(written: Written) -> None:
    checkpoint = Catalog.open(written.root)
    seen: list[int] = []
    with ExpertLoader("cpu", SMALL, progress=seen.append) as loader:
        for _ in range(2):
            layers, report = load_layers(
                checkpoint, checkpoint.manifest.layers, RankShare(tp_rank=1, tp_size=2), loader
            )
            for layer in layers:
                assert_share(layer, written)
            assert sum(seen) == report.nbytes <= report.counts.nbytes
            assert report.seconds > 0 and "GB/s" in str(report)
            seen.clear()


@pytest.mark.parametrize("tp", [(0, 1), (1, 2)])
@pytest.mark.parametrize("position", [0, 5_000, -1])
def test_verify_names_the_damaged_expert(tmp_path: Path, tp: tuple[int, int], position: int) -> None:
    written = write_checkpoint(tmp_path, MoeDims(3, 128, 256))
    record = Catalog.open(tmp_path).records(written.manifest.layers[0])["w2_weight"]
    each = record.nbytes // 3
    where = record.offset_bytes + each + position % each
    with written.file(1).open("r+b") as stream:
        stream.seek(where)
        byte = stream.read(1)[0]
        stream.seek(where)
        stream.write(bytes([byte ^ 0x10]))
    options = LoadOptions(threads=2, chunk_nbytes=65536, verify=True)
    with pytest.raises(VerificationError, match="expert 1 does not have the bytes") as caught:
        load_layer(tmp_path, 1, tp=tp, options=options)
    assert "experts-layer-00001.safetensors" in str(caught.value) and "w2_weight" in str(caught.value)
    load_layer(tmp_path, 1, tp=tp, experts=[0, 2], options=options)
    load_layer(tmp_path, 1, tp=tp, options=SMALL)


def test_verify_covers_the_scale_vectors(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, MoeDims(3, 128, 256))
    path = tmp_path / "expert-scales.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    load_layer(tmp_path, 1, options=SMALL)
    with pytest.raises(CheckpointError, match="does not have the bytes"):
        load_layer(tmp_path, 1, options=LoadOptions(threads=2, verify=True))


def test_verify_reads_whole_experts_once(written: Written) -> None:
    checkpoint = Catalog.open(written.root)
    for tp in (1, 4):
        with ExpertLoader("cpu", LoadOptions(threads=2, verify=True)) as loader:
            _, report = load_layers(checkpoint, [checkpoint.layer(1)], RankShare(tp_size=tp), loader)
        assert report.counts.nbytes == tp * report.nbytes


class TestFailures:
    def test_truncated_before(self, tmp_path: Path) -> None:
        written = write_checkpoint(tmp_path, MoeDims(3, 128, 256))
        os.truncate(written.file(1), written.file(1).stat().st_size - 1)
        with pytest.raises(CheckpointError, match=r"experts-layer-00001.*file size does not match"):
            load_layer(tmp_path, 1, options=SMALL)

    @pytest.mark.parametrize("tp", [(0, 1), (0, 2)])
    @pytest.mark.parametrize("gather", [Gather.ROWS, Gather.MMAP])
    def test_truncated_while_it_is_read(self, tmp_path: Path, tp: tuple[int, int], gather: Gather) -> None:
        written = write_checkpoint(tmp_path, MoeDims(3, 128, 256))
        checkpoint = Catalog.open(tmp_path)
        record = checkpoint.records(checkpoint.layer(1))["w2_weight"]
        part = rank_slice(written.layout, PreparedTensor.W2_WEIGHT, written.dims, *tp)
        parameter = torch.empty(3, *part.shape, dtype=torch.uint8)
        with ExpertLoader("cpu", replace(SMALL, gather=gather)) as loader:
            loader.submit(tmp_path / record.file, record, part, [0], parameter[:1])
            loader.finish()
            source = reader.FileReader.open(tmp_path / record.file)
            loader._files._readers[tmp_path / record.file] = source  # opened while the file was whole
            os.truncate(written.file(1), record.offset_bytes + 100)
            loader.submit(tmp_path / record.file, record, part, [0, 1, 2], parameter)
            with pytest.raises(LoadError, match="file ended") as caught:
                loader.finish()
        assert "w2_weight" in str(caught.value) and "experts-layer-00001" in str(caught.value)

    def test_vanished(self, written: Written, tmp_path: Path) -> None:
        record = Catalog.open(written.root).records(written.manifest.layers[0])["w2_weight"]
        part = rank_slice(written.layout, PreparedTensor.W2_WEIGHT, DIMS, 0, 1)
        parameter = torch.empty(DIMS.experts, *part.shape, dtype=torch.uint8)
        with (
            ExpertLoader("cpu", SMALL) as loader,
            pytest.raises(LoadError, match=r"gone\.safetensors: cannot be read"),
        ):
            loader.submit(tmp_path / "gone.safetensors", record, part, range(DIMS.experts), parameter)

    def test_missing_file_and_missing_manifest(self, tmp_path: Path) -> None:
        written = write_checkpoint(tmp_path, MoeDims(3, 128, 256))
        written.file(1).unlink()
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_layer(tmp_path, 1)
        with pytest.raises(CheckpointError, match=r"nowhere: does not exist\. Give the directory of a prepared"):
            load_layer(tmp_path / "nowhere", 1)

    def test_a_whole_file_of_another_conversion(self, tmp_path: Path) -> None:
        written = write_checkpoint(tmp_path, MoeDims(3, 128, 256))
        raw = written.file(1).read_bytes()
        length = int.from_bytes(raw[:8], "little")
        padded = (length + 8).to_bytes(8, "little") + raw[8 : 8 + length] + b" " * 8 + raw[8 + length :]
        written.file(1).write_bytes(padded)
        with pytest.raises(CheckpointError, match=r"experts-layer-00001.*does not fit the manifest"):
            load_layer(tmp_path, 1, options=SMALL)

    def test_wrong_requests(self, written: Written) -> None:
        with pytest.raises(UsageError, match="no prepared layer 7"):
            load_layer(written.root, 7)
        with pytest.raises(UsageError, match="cannot serve 16"):
            load_layer(written.root, 1, tp=(0, 16))
        with pytest.raises(LoadError, match=r"no such experts.*0 to 5.*6"):
            load_layer(written.root, 1, experts=[0, 6])
        with pytest.raises(LoadError, match="no experts to load"):
            load_layer(written.root, 1, experts=[])
        with pytest.raises(LoadError, match="cannot load to this device"):
            ExpertLoader("meta")
        with pytest.raises(UsageError, match="unusable staging buffer"):
            LoadOptions(chunk_nbytes=100_000)
        with pytest.raises(UsageError, match="threads"):
            LoadOptions(buffers=-1)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("threads", "8"),
            ("threads", 2.5),
            ("threads", True),
            ("chunk_nbytes", 4194304.0),
            ("buffers", None),
            ("verify", "no"),
            ("verify", 1),
            ("direct_io", "sometimes"),
            ("direct_io", []),
            ("gather", "map"),
            ("gather", None),
        ],
    )
    def test_options_as_json_may_spell_them(self, name: str, value: Any) -> None:
        with pytest.raises(UsageError, match=f"unusable option {name}"):
            LoadOptions(**{name: value})

    @pytest.mark.parametrize(
        "parameter",
        [
            torch.empty(6, 512, 255, dtype=torch.uint8),
            torch.empty(6, 512, 256, dtype=torch.int16),
            torch.empty(6, 256, 512, dtype=torch.uint8).transpose(1, 2),
        ],
    )
    def test_parameters_that_do_not_fit(self, written: Written, parameter: torch.Tensor) -> None:
        record = Catalog.open(written.root).records(written.manifest.layers[0])["w2_weight"]
        part = rank_slice(written.layout, PreparedTensor.W2_WEIGHT, DIMS, 0, 1)
        with ExpertLoader("cpu", SMALL) as loader, pytest.raises(LoadError, match="does not fit the rank's share"):
            loader.submit(written.file(1), record, part, range(6), parameter)

    def test_out_of_memory_names_the_tensor(self, written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*args: object, **kw: object) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.75 GiB")

        with ExpertLoader("cpu", SMALL) as loader:
            checkpoint = Catalog.open(written.root)
            monkeypatch.setattr(torch, "empty", refuse)
            with pytest.raises(LoadError, match=r"w13_weight'.*no memory for .* on cpu .*CUDA out of memory"):
                load_layers(checkpoint, [checkpoint.layer(1)], RankShare(), loader)

    def test_a_failed_load_leaves_the_loader_usable(self, tmp_path: Path, written: Written) -> None:
        damaged = write_checkpoint(tmp_path, MoeDims(3, 128, 256))
        with damaged.file(1).open("r+b") as stream:
            stream.seek(-1, os.SEEK_END)
            stream.write(b"\x00" if damaged.tensors[1]["w2_weight_scale"].view(torch.uint8).flatten()[-1] else b"\x01")
        options = LoadOptions(threads=2, chunk_nbytes=65536, verify=True)
        bad, good = Catalog.open(tmp_path), Catalog.open(written.root)
        with ExpertLoader("cpu", options) as loader:
            with pytest.raises(NvfpPrepError):
                load_layers(bad, [bad.layer(1)], RankShare(), loader)
            layers, _ = load_layers(good, [good.layer(1)], RankShare(), loader)
            assert_share(layers[0], written)

    def test_leaving_the_loader_raises_what_failed(self, tmp_path: Path) -> None:
        written = write_checkpoint(tmp_path, MoeDims(3, 128, 256))
        record = Catalog.open(tmp_path).records(written.manifest.layers[0])["w13_weight"]
        part = rank_slice(written.layout, PreparedTensor.W13_WEIGHT, written.dims, 0, 1)
        parameter = torch.empty(3, *part.shape, dtype=torch.uint8)
        options = LoadOptions(threads=2, verify=True)
        with pytest.raises(VerificationError), ExpertLoader("cpu", options) as loader:
            loader.submit(written.file(1), record, part, range(3), parameter, [0, 0, 0])
        with pytest.raises(LoadError, match="closed"):
            loader.submit(written.file(1), record, part, range(3), parameter)

    def test_a_closed_loader_says_so(self, written: Written) -> None:
        """Asking the clocks of threads that have ended would end the process."""
        with ExpertLoader("cpu", SMALL) as loader:
            loader.close()
            loader.close()
        with pytest.raises(LoadError, match="the loader is closed"):
            loader.finish()
        loader.abandon()

    @pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
    def test_progress_that_fails_ends_the_load(self, written: Written, device: str) -> None:
        def progress(nbytes: int) -> None:
            raise BrokenPipeError(f"{nbytes} bytes")

        catalog = Catalog.open(written.root)
        with ExpertLoader(device, SMALL, progress=progress) as loader:
            with pytest.raises(LoadError, match=r"progress could not be reported .*BrokenPipeError"):
                load_layers(catalog, [catalog.layer(1)], RankShare(), loader)
            # the next load is another one
            with pytest.raises(LoadError, match="progress"):
                load_layers(catalog, [catalog.layer(1)], RankShare(), loader)


def test_handles_are_meta_tensors_that_fill_parameters(written: Written) -> None:
    checkpoint = Catalog.open(written.root)
    record = checkpoint.records(checkpoint.layer(1))["w2_weight_scale"]
    part = rank_slice(written.layout, PreparedTensor.W2_WEIGHT_SCALE, DIMS, 1, 2)
    parameter = torch.zeros(2, *part.shape, dtype=torch.float8_e4m3fn)
    with ExpertLoader("cpu", SMALL) as loader:
        tensor = make_handle(loader, written.file(1), record)
        assert tensor.is_meta and tensor.shape == record.shape and tensor.dtype == torch.float8_e4m3fn
        handle = handle_of(tensor)
        assert handle is not None
        handle.load_into(parameter, part, [4, 1])
        loader.finish()
    stored = written.tensors[1]["w2_weight_scale"].view(torch.uint8)[[4, 1]]
    expected = take_rank(written.layout, PreparedTensor.W2_WEIGHT_SCALE, stored, DIMS, 1, 2)
    assert torch.equal(parameter.view(torch.uint8), expected)
    assert handle_of(parameter) is None
    with pytest.raises(LoadError, match=r"w2_weight_scale'.*is not a prepared tensor; expected .*, found BF16"):
        make_handle(loader, written.file(1), replace(record, dtype="BF16"))
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.empty(record.shape, dtype=torch.float8_e4m3fn).copy_(tensor)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_closed_loader_holds_no_staging_memory(device: str) -> None:
    loader = ExpertLoader(device, SMALL)
    buffers = weakref.ref(loader._reading[0].buffers)
    loader.close()
    assert buffers() is None


@pytest.mark.gpu
@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("experts", [[0, 1, 2], [1], [0, 2]])
def test_the_batched_layout_on_a_gpu(tmp_path: Path, experts: list[int], verify: bool) -> None:
    written = write_checkpoint(tmp_path, MoeDims(3, 2048, 2048), options=BATCHED)
    options = LoadOptions(threads=4, verify=verify, direct_io=DirectIO.NEVER)
    loaded = load_layer(tmp_path, 1, experts=experts, device="cuda", options=options)
    on_host = {name: tensor.cpu() for name, tensor in loaded.tensors.items()}
    assert_share(LoadedLayer(loaded.record, loaded.share, on_host), written)


@pytest.mark.gpu
@pytest.mark.parametrize("tp", [(0, 1), (1, 2), (7, 8)])
@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("direct_io", DirectIO)
@pytest.mark.parametrize("gather", Gather)
def test_on_a_gpu(written: Written, tp: tuple[int, int], verify: bool, direct_io: DirectIO, gather: Gather) -> None:
    options = LoadOptions(threads=4, chunk_nbytes=65536, verify=verify, direct_io=direct_io, gather=gather)
    loaded = load_layer(written.root, 2, tp=tp, experts=[5, 0, 1, 1], device="cuda", options=options)
    on_host = {name: tensor.cpu() for name, tensor in loaded.tensors.items()}
    assert all(tensor.is_cuda for tensor in loaded.tensors.values())
    assert_share(LoadedLayer(loaded.record, loaded.share, on_host), written)


@pytest.mark.parametrize("rank", range(4))
def test_a_file_padded_for_some_ranks_serves_them(tmp_path: Path, rank: int) -> None:
    """It has no slice for one rank alone."""
    dims = MoeDims(3, 128, 256)
    write_sample(tmp_path / "source", SampleModel(layers=2, experts=3, hidden=256, intermediate=128))
    prepared = convert(tmp_path / "source", tmp_path / "out", ConvertOptions(moe_tp=4), smoke=None).path
    checkpoint = Catalog.open(prepared)
    layer = checkpoint.layer(1)
    assert layer.dims.intermediate == dims.intermediate and layer.layout.tp_sizes(layer.dims) == (4,)
    loaded = load_layer(prepared, 1, tp=(rank, 4))
    for tensor in PreparedTensor:
        record = checkpoint.records(layer)[tensor.value]
        whole = torch.frombuffer(bytearray((prepared / record.file).read_bytes()), dtype=torch.uint8)
        whole = whole[record.offset_bytes : record.offset_bytes + record.nbytes].view(3, -1)
        part = rank_slice(layer.layout, tensor, layer.dims, rank, 4)
        begins = [part.offset_bytes + run * part.stride_bytes for run in range(part.runs)]
        rows = torch.stack([whole[:, begin : begin + part.run_nbytes] for begin in begins], dim=1)
        assert torch.equal(loaded.tensors[tensor.value].view(torch.uint8).flatten(), rows.flatten())
