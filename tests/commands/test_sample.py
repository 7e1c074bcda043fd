"""Sample checkpoints: what they promise to the tests and benchmarks that use them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest

from nvfp4_prep import SampleModel, inspect, write_sample
from nvfp4_prep.commands.sample import KIMI_LAYER, _NewFiles
from nvfp4_prep.errors import ConversionInterrupted, NoSpaceError, TargetError, UsageError
from support.checkpoint_files import file_digests, read_tensors


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_sample(tmp_path / name, SampleModel(seed=seed))
    a, b, c = (file_digests(tmp_path / name) for name in "abc")
    assert a == b
    assert a["model-00001-of-00001.safetensors"] != c["model-00001-of-00001.safetensors"]


def test_bytes_are_random_and_scales_usable(tmp_path: Path) -> None:
    write_sample(tmp_path / "s", SampleModel(experts=4))
    tensors = read_tensors(tmp_path / "s")
    for name, (dtype, _, data) in tensors.items():
        if dtype == "torch.uint8":
            counts = [data.count(value) for value in range(256)]
            assert min(counts) > 0.5 * len(data) / 256, name
        if dtype == "torch.float8_e4m3fn":
            assert set(data) <= set(range(0x30, 0x7F))
    weights = [data for name, (_, _, data) in tensors.items() if name.endswith("_proj.weight")]
    assert len(set(weights)) == len(weights)


def test_sharding_and_differing_scales(tmp_path: Path) -> None:
    write_sample(tmp_path / "s", SampleModel(experts=32, shard_nbytes=100_000, differing=0.5))
    found = inspect(tmp_path / "s")
    assert found.shards > 20
    assert all(8 <= (layer.differing or 0) <= 24 for layer in found.layers)


def test_kimi_layer_has_the_published_size() -> None:
    """24,772,632 bytes an expert, 384 experts (Kimi-K2.5-NVFP4)."""
    codes = 3 * KIMI_LAYER.intermediate * KIMI_LAYER.hidden // 2
    scales = 3 * KIMI_LAYER.intermediate * KIMI_LAYER.hidden // 16
    assert (codes + scales + 6 * 4) * KIMI_LAYER.experts == 9_512_690_688


def test_refusals(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(TargetError):
        write_sample(tmp_path)
    with pytest.raises(UsageError):
        SampleModel(hidden=100)
    with pytest.raises(UsageError):
        SampleModel(layers=1)


def failing(monkeypatch: pytest.MonkeyPatch, act: Callable[[str], None]) -> None:
    """Call ``act`` with the file's name before each file of a sample is made."""
    real = _NewFiles.create

    def create(files: _NewFiles, name: str) -> BinaryIO:
        act(name)
        return real(files, name)

    monkeypatch.setattr(_NewFiles, "create", create)


@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        (OSError(28, "No space left on device"), NoSpaceError, "no space left while writing"),
        (PermissionError(13, "Permission denied"), TargetError, "Permission denied"),
        (KeyboardInterrupt(), ConversionInterrupted, "interrupted. The sample's files were removed"),
    ],
)
def test_a_sample_that_cannot_be_written_removes_its_files_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, kind: type[BaseException], told: str
) -> None:
    def act(name: str) -> None:
        if name == "config.json":
            (tmp_path / "s" / "mine").write_text("mine")
            (tmp_path / "s" / "model-00001-of-00001.safetensors").rename(tmp_path / "moved")
            (tmp_path / "s" / "model-00001-of-00001.safetensors").write_text("mine too")
            raise error

    failing(monkeypatch, act)
    with pytest.raises(kind, match=told):
        write_sample(tmp_path / "s")
    left = {path.name: path.read_text() for path in (tmp_path / "s").iterdir()}
    assert left == {"mine": "mine", "model-00001-of-00001.safetensors": "mine too"}


@pytest.mark.parametrize("way", ["file", "link", "dangling"])
def test_a_sample_writes_over_nothing_that_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")

    def act(name: str) -> None:
        if name == "config.json" and way == "file":
            (tmp_path / "s" / name).write_text("mine")
        elif name == "config.json":
            (tmp_path / "s" / name).symlink_to(victim if way == "link" else tmp_path / "nowhere")

    failing(monkeypatch, act)
    with pytest.raises(TargetError, match="appeared"):
        write_sample(tmp_path / "s")
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["config.json"]
    assert victim.read_text() == "mine" and not (tmp_path / "nowhere").exists()
