"""A stream of whole tensors: the same names and bytes as safetensors' own reader, within bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from nvfp4_prep.checkpoint.safetensors_header import read_header
from nvfp4_prep.errors import LoadError, SourceError
from nvfp4_prep.load import ExpertLoader, LoadOptions, WholeTensors, whole_tensors

TENSORS = {
    "a": {
        "embedding": torch.arange(70_000, dtype=torch.int32).view(700, 100).to(torch.bfloat16),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "flags": torch.tensor([True, False, True]),
        "bytes": torch.arange(13, dtype=torch.uint8),
    },
    "b": {
        "eighths": torch.linspace(-3, 3, 999).to(torch.float8_e4m3fn),
        "long": torch.arange(5),
        "complex": torch.tensor([1 + 2j]),
        "half": torch.ones(3, 5, dtype=torch.float16),
    },
}


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    for name, tensors in TENSORS.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    return [tmp_path / f"{name}.safetensors" for name in TENSORS]


@pytest.fixture(params=[pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)])
def loader(request: pytest.FixtureRequest) -> Iterator[ExpertLoader]:
    with ExpertLoader(request.param, LoadOptions(threads=2, chunk_nbytes=65536)) as loader:
        yield loader


def official(files: list[Path]) -> dict[str, torch.Tensor]:
    found = {}
    for path in files:
        with safe_open(path, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


def assert_equal(streamed: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert streamed.keys() == expected.keys()
    for name, tensor in streamed.items():
        right = expected[name]
        assert (tensor.dtype, tensor.shape) == (right.dtype, right.shape)
        assert (
            tensor.cpu().contiguous().flatten().view(torch.uint8).tolist() == right.flatten().view(torch.uint8).tolist()
        )


@pytest.mark.parametrize("window", [1, 5000, whole_tensors.WINDOW_NBYTES])
def test_the_same_tensors_as_safetensors(
    files: list[Path], loader: ExpertLoader, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole_tensors, "WINDOW_NBYTES", window)
    whole = WholeTensors(loader)
    assert_equal(dict(whole.stream(files)), official(files))
    report = loader.finish()
    by_safetensors = {"empty", "complex"}
    expected = sum(
        tensor.numel() * tensor.element_size()
        for tensors in TENSORS.values()
        for name, tensor in tensors.items()
        if name not in by_safetensors
    )
    assert whole.nbytes == report.nbytes == expected
    assert report.counts.direct_nbytes == 0


@pytest.mark.parametrize("by_name", [False, True])
def test_the_order_of_places_or_of_names(files: list[Path], loader: ExpertLoader, by_name: bool) -> None:
    names = [name for name, _ in WholeTensors(loader).stream(files[::-1], by_name=by_name)]
    loader.finish()
    placed = [[record.name for record in read_header(path).tensors] for path in files[::-1]]
    assert names == [name for found in placed for name in (sorted(found) if by_name else found)]
    assert placed != [sorted(found) for found in placed]


def test_a_tensor_that_is_kept_stays_as_it_is(files: list[Path], loader: ExpertLoader) -> None:
    kept = list(WholeTensors(loader).stream(files * 2))
    loader.finish()
    assert_equal(dict(kept[: len(kept) // 2]), official(files))


def test_no_more_than_the_window_is_ahead(
    files: list[Path], loader: ExpertLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole_tensors, "WINDOW_NBYTES", 10_000)
    begun, taken, most = 0, 0, 0
    submit = loader.submit_whole

    def counted(path: Path, record: object, target: torch.Tensor) -> object:
        nonlocal begun
        begun += target.numel()
        return submit(path, record, target)  # type: ignore[arg-type]

    monkeypatch.setattr(loader, "submit_whole", counted)
    for _, tensor in WholeTensors(loader).stream(files):
        most = max(most, begun - taken)
        taken += tensor.numel() * tensor.element_size()
    loader.finish()
    assert most <= 140_000 + 10_000  # the embedding alone is larger than the window


def test_unwanted_tensors_are_not_read(files: list[Path], loader: ExpertLoader) -> None:
    found = dict(WholeTensors(loader).stream(files, lambda name: name in ("embedding", "long")))
    report = loader.finish()
    assert found.keys() == official(files).keys() - {"embedding", "long"}
    assert report.counts.read_nbytes == report.nbytes < 2000


def test_a_truncated_file_ends_the_load(files: list[Path], loader: ExpertLoader) -> None:
    stream = WholeTensors(loader).stream(files)
    next(stream)
    whole = files[1].read_bytes()
    files[1].write_bytes(whole[:-7])
    with pytest.raises((LoadError, SourceError), match=r"b\.safetensors"):
        list(stream)
    loader.abandon()


def test_a_larger_tensor_than_the_device_has_room_for_comes_by_the_host(
    files: list[Path], loader: ExpertLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole_tensors, "_fits", lambda nbytes, device: nbytes < 1000)
    found = dict(WholeTensors(loader).stream(files))
    loader.finish()
    assert_equal(found, official(files))
    assert found["embedding"].device.type == "cpu"
