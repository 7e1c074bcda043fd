"""What ``--dry-run`` says of time: the largest of four lower bounds, from a short probe that writes nothing."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from nvfp4_prep import SampleModel, plan, write_sample
from nvfp4_prep._util.text import format_nbytes
from nvfp4_prep.checkpoint.local_source import LocalSource
from nvfp4_prep.cli import cli
from nvfp4_prep.cli.conversion_output import _time_text
from nvfp4_prep.commands import speed_estimate
from nvfp4_prep.commands.speed_estimate import SpeedEstimate, estimate_speed
from nvfp4_prep.pipeline import workers
from support.paths import ROOT

JSON_PAGE = (ROOT / "docs" / "json.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("bounds", "limit", "words"),
    [
        ((9.0, 1.0, 2.0, 0.1), "disk read", "limited by reading the source from disk ("),
        ((1.0, 9.0, 2.0, 0.1), "digests", "limited by the sha256 of the largest file, which one core computes ("),
        ((None, 1.0, 9.0, 0.1), "cores", "limited by the CPU, which hashes, rearranges and compares every byte ("),
        ((3.0, 1.0, 2.0, 9.0), "names", "limited by the planning of every tensor, which runs on one core ("),
    ],
)
def test_the_largest_bound_limits(bounds: tuple[float | None, float, float, float], limit: str, words: str) -> None:
    found = SpeedEstimate(*bounds, 1.0, 2.0, 4)
    assert (found.limit, found.seconds) == (limit, 9.0)
    assert f"at least 9 s of work, {words}" in _time_text(found)
    assert f"`{limit}`" in JSON_PAGE


def test_bounds_follow_from_the_rates(sample_source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_estimate, "_sha256_rate", lambda: 1e6)
    monkeypatch.setattr(speed_estimate, "_read_rate", lambda blocks: 1e5)
    monkeypatch.setattr(speed_estimate, "usable_cores", lambda: 3)
    made = plan(sample_source)
    nbytes = sum(path.stat().st_size for path in sample_source.iterdir())
    found = estimate_speed(made, LocalSource(sample_source), 0.25)
    assert found is not None and found.cores == 3
    assert found.read_s == pytest.approx(nbytes / 1e5)
    assert found.cores_s == pytest.approx(5 * nbytes / 1e6 / 3)
    assert found.names_s == 0.5
    assert found.digest_s == pytest.approx(max(file.nbytes for file in made.files) / 1e6)


def test_smoke_test_of_four_experts_in_three_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_estimate, "_flop_rate", lambda: 1e9)
    monkeypatch.setattr(speed_estimate.torch.cuda, "is_available", lambda: False)
    write_sample(tmp_path / "source", SampleModel(layers=6, experts=6, hidden=256, intermediate=128))
    made = plan(tmp_path / "source")
    found = estimate_speed(made, LocalSource(tmp_path / "source"), 0.0)
    assert found is not None
    assert found.smoke_s == pytest.approx(4700 * 3 * 4 * 3 * 256 * 128 / 1e9)
    monkeypatch.setattr(speed_estimate.torch.cuda, "is_available", lambda: True)
    found = estimate_speed(made, LocalSource(tmp_path / "source"), 0.0)
    assert found is not None and found.smoke_s is None


def test_the_probe_is_short_and_reads_blocks_of_every_shard_once(tmp_path: Path) -> None:
    model = SampleModel(layers=3, experts=4, intermediate=512, hidden=2048, shard_nbytes=12_000_000)
    write_sample(tmp_path / "source", model)
    made = plan(tmp_path / "source")
    blocks = speed_estimate._blocks(tmp_path / "source", made)
    assert len(set(blocks)) == len(blocks) > 2
    large = {file.name for file in made.source_files if file.nbytes >= 4 * 2**20}
    assert {Path(path).name for path, _ in blocks} == large
    assert all(offset % 2**22 == 0 and offset + 2**22 <= Path(path).stat().st_size for path, offset in blocks)
    begun = time.perf_counter()
    assert estimate_speed(made, LocalSource(tmp_path / "source"), 0.0) is not None
    assert time.perf_counter() - begun < 3


def test_what_cannot_be_read_past_the_cache_is_not_measured(tmp_path: Path) -> None:
    assert speed_estimate._read_rate([(str(tmp_path / "gone"), 0)]) is None
    assert speed_estimate._read_rate([]) is None


def test_dry_run_says_it_and_writes_nothing(sample_source: Path, tmp_path: Path) -> None:
    arguments = ["convert", str(sample_source), str(tmp_path / "out"), "--dry-run"]
    text = CliRunner().invoke(cli, arguments).stdout
    line = next(line for line in text.splitlines() if line.startswith("time "))
    assert "limited by " in line and "writing was not measured" in line and "smoke test of about" in line
    value = json.loads(CliRunner().invoke(cli, [*arguments, "--json"]).stdout)["time"]
    assert value["limit"] in ("cores", "digests", "disk read", "names") and value["seconds"] > 0
    assert [key for key in value if f"`{key}`" not in JSON_PAGE] == []
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "nbytes"), [(["--memory", "50"], 50_000_000), (["--threads", "16"], 2**31), ([], 640 * 2**20)]
)
@pytest.mark.slow
def test_dry_run_says_the_memory_that_the_run_would_use(
    sample_source: Path, tmp_path: Path, options: list[str], nbytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "usable_cores", lambda: 1)
    arguments = ["convert", str(sample_source), str(tmp_path / "out"), "--dry-run", *options]
    assert json.loads(CliRunner().invoke(cli, [*arguments, "--json"]).stdout)["memory_nbytes"] == nbytes
    assert f"at most {format_nbytes(nbytes)} of buffers" in CliRunner().invoke(cli, arguments).stdout
