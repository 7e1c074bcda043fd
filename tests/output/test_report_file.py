"""``--report``: the one path of a file that a user gives, which never takes the place of anything but a report."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from nvfp4_prep import convert as convert_function
from nvfp4_prep.cli import cli
from nvfp4_prep.errors import NoSpaceError, UsageError
from nvfp4_prep.output import report_file as report_module
from nvfp4_prep.output.report_file import REPORT_MARKER, check_report_path, write_report

PAGE = f"<!doctype html>{REPORT_MARKER}"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def source(sample_source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sample_source, tmp_path / "source"))


@pytest.mark.parametrize(
    "name",
    ["model.safetensors.index.json", "config.json", "README.md", "new.html", "../source/new.html", ".", "../source"],
)
@pytest.mark.parametrize("way", ["", "link", "relative"])
def test_convert_adds_nothing_to_its_source(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, way: str
) -> None:
    before = content(source)
    root = source
    if way == "link":
        root = tmp_path / "link"
        root.symlink_to(source)
    elif way == "relative":
        monkeypatch.chdir(tmp_path)
        root = Path("source")
    done = run("convert", source, tmp_path / "out", "-q", "--report", root / name)
    assert done.exit_code == 2 and "--report" in done.stderr, done.output
    assert content(source) == before and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["new.html", "config.json", "", "sub/new.html"])
def test_nothing_is_written_into_the_target(source: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    assert run("convert", source, out, "-q", "--report", out / name).exit_code == 2
    assert not out.exists()
    out.mkdir()
    assert run("convert", source, out, "-q", "--report", out / name).exit_code == 2
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("name", ["experts-layer-00001.safetensors", "config.json", "new.html"])
def test_verify_writes_nothing_into_what_it_verifies(
    sample_source: Path, sample_prepared: Path, tmp_path: Path, name: str
) -> None:
    copy = Path(shutil.copytree(sample_prepared, tmp_path / "copy"))
    before = content(copy)
    for page in (copy / name, tmp_path / "link" / name, sample_source / name):
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(copy)
        done = run("verify", copy, "--smoke", "--source", sample_source, "--report", page)
        assert done.exit_code == 2 and done.stdout == ""
    assert content(copy) == before and not (sample_source / "new.html").exists()


@pytest.mark.slow
def test_only_a_report_is_replaced(sample_prepared: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    command = ("verify", sample_prepared, "--smoke", "--sample", 1, "--layers", 1, "-q", "--report", page)
    page.write_text("mine")
    refused = run(*command)
    assert refused.exit_code == 2 and "exists and is not a report of nvfp4-prep" in refused.stderr
    assert page.read_text() == "mine"
    page.write_text(PAGE)
    assert run(*command).exit_code == 0
    first = page.read_text()
    assert REPORT_MARKER in first and first != PAGE
    assert run(*command).exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html"]


def test_a_report_of_the_first_release_is_one(tmp_path: Path) -> None:
    beginning = "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><title>Fused-MoE smoke run: out</title>"
    (tmp_path / "page.html").write_text(beginning)
    write_report(tmp_path / "page.html", PAGE)
    assert (tmp_path / "page.html").read_text() == PAGE


@pytest.mark.parametrize("kind", ["link", "dangling", "fifo", "device", "directory", "missing directory"])
def test_what_is_no_file_is_refused(tmp_path: Path, kind: str) -> None:
    page, other = tmp_path / "page.html", tmp_path / "other.html"
    other.write_text(PAGE)
    if kind == "link":
        page.symlink_to(other)
    elif kind == "dangling":
        page.symlink_to("nowhere")
    elif kind == "fifo":
        os.mkfifo(page)
    elif kind == "device":
        page = Path("/dev/null")
    elif kind == "directory":
        page.mkdir()
    else:
        page = tmp_path / "no" / "page.html"
    with pytest.raises(UsageError, match="--report"):
        check_report_path(page)
    with pytest.raises(UsageError, match="--report"):
        write_report(page, "x")
    assert other.read_text() == PAGE and not (tmp_path / "nowhere").exists()


def test_a_file_that_appears_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, fsync = tmp_path / "page.html", os.fsync

    def appear(descriptor: int) -> None:
        page.write_text("mine")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", appear)
    with pytest.raises(UsageError, match="nothing is overwritten"):
        write_report(page, PAGE)
    assert page.read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("there", [True, False])
def test_a_report_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    page = tmp_path / "page.html"
    if there:
        page.write_text(PAGE + "old")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(NoSpaceError, match=r"no space left while writing .*another path for the report"):
        write_report(page, PAGE)
    assert content(tmp_path) == ({"page.html": (PAGE + "old").encode()} if there else {})


def test_a_report_above_its_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is part of"):
        check_report_path(tmp_path / "page.html", tmp_path / "page.html" / "out")


def test_hub_ids_are_no_directories(tmp_path: Path) -> None:
    check_report_path(tmp_path / "page.html", "alice/model", "hf://alice/model@main", None)


@pytest.mark.slow
def test_a_plain_report_still_comes(sample_source: Path, tmp_path: Path) -> None:
    assert run("convert", sample_source, tmp_path / "out", "-q", "--report", tmp_path / "page.html").exit_code == 0
    assert "Passed" in (tmp_path / "page.html").read_text()
    assert content(tmp_path / "out") == content(convert_function(sample_source, tmp_path / "plain").path)


def test_a_note_that_mentions_the_marker_is_no_report(tmp_path: Path) -> None:
    page = tmp_path / "note.md"
    page.write_text(f"Reports begin with {REPORT_MARKER}")
    with pytest.raises(UsageError, match="not a report"):
        write_report(page, PAGE)
    assert page.read_text().startswith("Reports begin")


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("hard_links", [False, True])
def test_a_file_that_appears_at_the_last_moment_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, older: bool, hard_links: bool
) -> None:
    page, real = tmp_path / "page.html", report_module.rename_new

    def late(old: str, new: str, *folders: int) -> None:
        if new == page.name or old == page.name:
            page.write_text("mine")
        real(old, new, *folders)

    def no_links(*names: object, **options: object) -> None:
        raise OSError(errno.EPERM, "no hard links")

    monkeypatch.setattr(report_module, "rename_new", late)
    if not hard_links:
        monkeypatch.setattr(os, "link", no_links)
    if older:
        page.write_text(PAGE)
    with pytest.raises(UsageError, match="--report"):
        write_report(page, PAGE)
    assert content(tmp_path) == {"page.html": b"mine"}


@pytest.mark.parametrize("name", ["nvfp4_prep.json", ".nvfp4_prep", "model.safetensors.index.json"])
def test_no_report_in_a_checkpoint_that_nobody_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(UsageError, match="lies in a checkpoint"):
        check_report_path(tmp_path / "page.html")


def test_a_name_that_is_too_long_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="File name too long"):
        check_report_path(tmp_path / ("x" * 300))
