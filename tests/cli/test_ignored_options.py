"""An option that would do nothing is refused; a page that was asked for and not written is told."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from nvfp4_prep import push, relayout, restore, verify
from nvfp4_prep.cli import cli
from nvfp4_prep.errors import UsageError


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sample", "new", "--kimi-layer", "--layers", "3"], "--kimi-layer has Kimi-K2.5's dimensions, --layers would"),
        (["sample", "new", "--kimi-layer", "--experts", "8", "--hidden", "256"], "--experts, --hidden would"),
        (["convert", "SOURCE", "new", "--keep-source"], "--keep-source is about a download"),
        (["convert", "SOURCE", "new", "--keep-source", "--dry-run"], "--keep-source is about a download"),
        (["verify", "PREPARED", "--quick", "--threads", "2"], "--threads: --quick reads no tensor bytes"),
        (["verify", "PREPARED", "--quick", "--memory", "900"], "--memory: --quick reads no tensor bytes"),
        (["push", "PREPARED", "a/b", "--threads", "2"], "--threads is about reading every byte"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else "",
)
def test_what_would_be_ignored_is_refused(
    sample_source: Path, sample_prepared: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    names = {"SOURCE": sample_source, "PREPARED": sample_prepared, "new": tmp_path / "new"}
    done = run(*(names.get(word, word) for word in words))
    assert done.exit_code == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["convert", "SOURCE", "PREPARED", "--restart"],
        ["convert", "SOURCE", "PREPARED", "--restart", "--dry-run"],
        ["convert", "SOURCE", "PREPARED", "--restart", "--layers", "1/2"],
        ["restore", "PREPARED", "back", "--restart"],
        ["relayout", "PREPARED", "other", "--gate-up-block", "16", "--restart"],
    ],
    ids=" ".join,
)
@pytest.mark.slow
def test_a_finished_output_is_not_restarted(
    sample_source: Path, sample_prepared: Path, tmp_path: Path, words: list[str]
) -> None:
    """Nothing is overwritten, nobody is told that it was made anew, and a retry of a killed command ends well."""
    shutil.copytree(sample_prepared, tmp_path / "prepared")
    restore(sample_prepared, tmp_path / "back")
    relayout(sample_prepared, tmp_path / "other", gate_up_block=16)
    names = {"SOURCE": sample_source, "PREPARED": tmp_path / "prepared"}
    places = [names.get(word, tmp_path / word if word in ("back", "other") else word) for word in words]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    done = run(*places)
    assert done.exit_code == 0 and "is finished, so --restart discarded nothing. To write it anew" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert "--restart" not in run(*(place for place in places if place != "--restart")).stderr


def test_more_layers_than_there_are_cannot_be_measured(sample_prepared: Path) -> None:
    done = run("bench-load", sample_prepared, "--layers", "3", "--device", "cpu", "-q")
    assert done.exit_code == 2 and "has fewer prepared layers; expected at most 2, found --layers 3" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU is there")
def test_a_dry_run_refuses_the_device_that_the_run_would_refuse(sample_source: Path, tmp_path: Path) -> None:
    words = ["convert", sample_source, tmp_path / "new", "--device", "cuda"]
    assert run(*words, "--dry-run").exit_code == run(*words).exit_code == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "9-20"], "--layers 9-20"),
        (["--layers", "x"], "--layers"),
        (["--backend", "flashinfer"], "flashinfer"),
    ],
    ids=str,
)
def test_a_smoke_test_that_cannot_be_is_refused_before_the_verification(
    sample_prepared: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    """Which reads every byte of hundreds of gigabytes."""

    def fail(*rest: object, **more: object) -> None:
        raise AssertionError("verified first")

    monkeypatch.setattr("nvfp4_prep.verify", fail, raising=False)
    done = run("verify", sample_prepared, "--smoke", *options)
    assert done.exit_code == 2 and message in done.stderr


def test_python_refuses_the_same(sample_prepared: Path) -> None:
    with pytest.raises(UsageError, match="--threads and --memory: --quick reads no tensor bytes"):
        verify(sample_prepared, quick=True, threads=1, memory_nbytes=10**9)
    with pytest.raises(UsageError, match="--full"):
        push(sample_prepared, "a/b", threads=1)


@pytest.mark.parametrize("options", [[], ["--json"]], ids=str)
def test_a_failed_verification_leaves_out_the_smoke_run_and_has_its_page(
    sample_prepared: Path, tmp_path: Path, options: list[str]
) -> None:
    damaged, page = tmp_path / "damaged", tmp_path / "page.html"
    shutil.copytree(sample_prepared, damaged)
    (damaged / "surplus.safetensors").write_bytes(b"")
    done = run("verify", damaged, "--quick", "--smoke", "--report", page, *options)
    assert done.exit_code == 6 and "Do not serve this checkpoint." in page.read_text()
    assert "no smoke test, because verification failed" in done.stderr


@pytest.mark.parametrize("name", ["loop", "loop/x", "x" * 300, "x/" * 3000], ids=lambda name: name[:8])
@pytest.mark.parametrize(
    "words",
    [
        ["convert", "BAD", "new", "--report", "page.html"],
        ["convert", "SOURCE", "BAD", "--report", "page.html"],
        ["convert", "SOURCE", "new", "--report", "BAD"],
        ["verify", "BAD"],
        ["verify", "PREPARED", "--source", "BAD"],
        ["inspect", "BAD"],
        ["restore", "BAD", "new"],
        ["restore", "PREPARED", "BAD"],
        ["relayout", "PREPARED", "BAD", "--layout", "trtllm"],
        ["restamp", "BAD"],
        ["push", "BAD", "a/b"],
        ["sample", "BAD"],
        ["doctor", "BAD"],
    ],
    ids=" ".join,
)
def test_what_cannot_be_a_path_is_one_line(
    sample_source: Path,
    sample_prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    name: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    places = {"SOURCE": sample_source, "PREPARED": sample_prepared, "BAD": name}
    done = run(*(places.get(word, word) for word in words))
    assert done.exit_code == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    assert "File name too long" in done.stderr or "symbolic links" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["loop"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "no memory is left"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "no memory is left"),
        (RecursionError("maximum recursion depth exceeded"), "nested too deep"),
        (OSError(5, "Input/output error", "somewhere"), "somewhere: Input/output error"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_the_last_resort_is_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    def fail(*rest: object, **more: object) -> None:
        raise error

    monkeypatch.setattr("nvfp4_prep.inspect", fail, raising=False)
    done = run("inspect", ".")
    assert done.exit_code == 1 and message in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_mistake_in_the_program_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*rest: object, **more: object) -> None:
        raise RuntimeError("dictionary changed size during iteration")

    monkeypatch.setattr("nvfp4_prep.inspect", fail, raising=False)
    assert isinstance(run("inspect", ".").exception, RuntimeError)
