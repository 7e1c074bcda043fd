"""bench-load: processes that really load, what they read, what limited them, and refusals."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from nvfp4_prep import bench_load
from nvfp4_prep.cli import cli
from nvfp4_prep.commands import bench_load as command
from nvfp4_prep.commands import bench_load_processes
from nvfp4_prep.commands.bench_load_figures import Limit, find_limit
from nvfp4_prep.commands.bench_load_rank import RankTurn
from nvfp4_prep.errors import CheckpointError, LoadError, UsageError
from nvfp4_prep_kernels import MoeDims
from support.load_files import Written, write_checkpoint

DIMS = MoeDims(experts=6, intermediate=512, hidden=1024)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write_checkpoint(tmp_path_factory.mktemp("bench"), DIMS, layers=(1, 2, 5))


def experts_nbytes() -> int:
    """Codes and block scales of one layer, from the sizes alone."""
    return DIMS.experts * 3 * DIMS.intermediate * DIMS.hidden * 9 // 16


def assert_no_process_is_left() -> None:
    left = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            mine = f"\nPPid:\t{os.getpid()}\n" in (process / "status").read_text()
            if mine and b"bench_load_rank" in (process / "cmdline").read_bytes():
                left.append(process.name)
    assert left == []


@pytest.mark.slow
def test_a_group_reads_each_byte_once(written: Written) -> None:
    found = bench_load(written.root, tp=2, ep=2, layers=2, device="cpu", threads=2, repeats=2, cold=False)
    assert (found.layers, found.all_layers, found.tp, found.ep, found.threads) == (2, 3, 2, 2, 2)
    assert (found.nbytes, found.all_nbytes) == (2 * experts_nbytes(), 3 * experts_nbytes())
    assert found.together and found.devices == ("cpu",) * 4
    (figures,) = found.figures
    assert not figures.cold and len(figures.seconds) == 2 and min(figures.seconds) > 0
    assert figures.read_nbytes == found.nbytes
    assert [(rank.tp_rank, rank.ep_rank) for rank in figures.ranks] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    for rank in figures.ranks:
        assert rank.nbytes == found.nbytes // 4
        assert 0 < rank.seconds <= figures.median_s + 1e-6
        assert rank.cpu_s > 0 and 0 < rank.read_s <= 2 * rank.seconds
    assert found.gb_per_s(figures) == pytest.approx(found.nbytes / figures.median_s / 1e9)
    assert found.whole_model_s(figures) == pytest.approx(1.5 * figures.median_s)
    assert_no_process_is_left()


@pytest.mark.slow
def test_ranks_alone_read_whole_rows(written: Written) -> None:
    found = bench_load(written.root, tp=2, device="cpu", threads=1, repeats=1, cold=False, together=False)
    assert not found.together and found.alone_because == "so asked for"
    (figures,) = found.figures
    assert figures.read_nbytes == pytest.approx(found.nbytes * 4 / 3, rel=0.001)  # w13 once, w2 by both


@pytest.mark.slow
def test_the_command(written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a folder#with %20"  # what an address would escape
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    arguments = ["bench-load", str(written.root), "--device", "cpu", "--repeats", "1", "--threads", "1"]
    shown = CliRunner().invoke(cli, [*arguments, "--from", "both"])
    assert shown.exit_code == 0, shown.output
    assert f"1 of 3 layers, {experts_nbytes() / 1e6:.2f} MB of experts" in shown.output
    assert "TP 1 x EP 1: 1 rank with 1 reading thread each; each rank by itself: there is one" in shown.output
    assert "cold" in shown.output and "from the page cache: " in shown.output
    assert "(1.00 x the experts)" in shown.output and "limited by" in shown.output
    assert "all 3 layers at this rate:" in shown.output and "rank 0 (TP 0, EP 0, cpu):" in shown.output


@pytest.mark.slow
def test_json(written: Written) -> None:
    arguments = ["bench-load", str(written.root), "--device", "cpu", "--repeats", "2", "--threads", "1", "--ep", "2"]
    shown = CliRunner().invoke(cli, [*arguments, "--from", "cold", "--json", "-q"])
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.stdout)
    assert found["nbytes"] == experts_nbytes() and found["ep"] == 2 and not found["together"]
    (figures,) = found["figures"]
    assert figures["cold"] is True and 0 <= figures["cached_share"] <= 1 and len(figures["seconds"]) == 2
    assert figures["limit"] in list(Limit) and figures["advice"] == Limit(figures["limit"]).advice
    assert [rank["nbytes"] for rank in figures["ranks"]] == [experts_nbytes() // 2] * 2
    assert all(rank["reads"] > 0 and rank["gb_per_s"] > 0 for rank in figures["ranks"])
    assert figures["reads"] == sum(rank["reads"] for rank in figures["ranks"])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"tp": 3}, "cannot serve 3"),
        ({"ep": 7}, "fewer experts than ranks"),
        ({"tp": 0}, "argument tp is wrong"),
        ({"tp": 16, "ep": 6}, "too many ranks"),
        ({"layers": 0}, "argument layers is wrong"),
        ({"repeats": True}, "argument repeats is wrong"),
        ({"device": "tpu"}, "argument device is wrong"),
        ({"threads": -1}, "argument threads is wrong"),
    ],
    ids=str,
)
def test_refusals(written: Written, options: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        bench_load(written.root, **options)


def test_what_is_not_prepared(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        bench_load(tmp_path)


@pytest.mark.slow
def test_a_rank_that_fails_ends_all(tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path, DIMS)
    file = written.file(1)
    whole, command_turn = file.read_bytes(), bench_load_processes.RankProcesses.turn
    assert whole

    def truncated(ranks: bench_load_processes.RankProcesses) -> tuple[RankTurn, ...]:
        file.write_bytes(whole[: len(whole) // 2])
        return command_turn(ranks)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_load_processes.RankProcesses, "turn", truncated)
        with pytest.raises(LoadError, match=r"rank 0 of 2 failed: .*experts-layer-00001"):
            bench_load(tmp_path, tp=2, device="cpu", threads=1, repeats=1, cold=False)
    assert_no_process_is_left()


@pytest.mark.slow
def test_a_rank_that_is_killed_is_named(written: Written) -> None:
    turn = bench_load_processes.RankProcesses.turn

    def killed(ranks: bench_load_processes.RankProcesses) -> tuple[RankTurn, ...]:
        ranks._processes[1].kill()
        ranks._processes[1].wait()
        return turn(ranks)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_load_processes.RankProcesses, "turn", killed)
        with pytest.raises(LoadError, match=r"the process of rank 1 ended \(exit code -9\)"):
            bench_load(written.root, tp=2, device="cpu", threads=1, repeats=1, cold=False)
    assert_no_process_is_left()


@pytest.mark.slow
def test_a_script_needs_no_guard(written: Written, tmp_path: Path) -> None:
    """Its processes do not run the script again; and a module of its folder stands in nobody's way."""
    (tmp_path / "signal.py").write_text("raise SystemExit('not this one')")
    script = tmp_path / "folder" / "script.py"
    script.parent.mkdir()
    call = f"nvfp4_prep.bench_load({str(written.root)!r}, tp=2, device='cpu', threads=1, repeats=1, cold=False)"
    script.write_text(f"import nvfp4_prep\nprint('script', {call}.tp)\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.split()) == (0, ["script", "2"]), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("isolation", "runs"), [("-I", False), ("-E", False), ("-s", True)])
def test_ranks_are_as_isolated_as_the_command(written: Written, tmp_path: Path, isolation: str, runs: bool) -> None:
    """What -I keeps out of the command, a sitecustomize of the environment, runs in no rank either."""
    (tmp_path / "sitecustomize.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').close()\n")
    call = f"nvfp4_prep.bench_load({str(written.root)!r}, device='cpu', threads=1, repeats=1, cold=False)"
    script = f"import sys\nsys.path[:] = {sys.path!r}\nimport nvfp4_prep\nprint({call}.tp)"
    command = [sys.executable, isolation, "-c", script]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
    assert (tmp_path / "ran").exists() == runs


@pytest.mark.parametrize("program", [None, "", "/nowhere/python"])
def test_a_python_that_does_not_know_its_program_is_told(
    written: Written, monkeypatch: pytest.MonkeyPatch, program: str | None
) -> None:
    monkeypatch.setattr(sys, "executable", program)
    with pytest.raises(LoadError, match=r"sys\.executable is empty|could not be started") as caught:
        bench_load(written.root, device="cpu", threads=1, repeats=1, cold=False)
    assert caught.value.next_step and "Python" in caught.value.next_step


@pytest.mark.parametrize(
    ("devices", "together", "because"),
    [
        (("cuda:0", "cuda:1"), True, ""),
        (("cuda:0", "cuda:0"), True, "NCCL takes one rank a GPU"),
        (("cpu", "cpu"), True, ""),
        (("cpu", "cpu"), False, "so asked for"),
        (("cpu",), True, "there is one tensor-parallel rank"),
    ],
)
def test_who_loads_together(devices: tuple[str, ...], together: bool, because: str) -> None:
    assert command._alone_because(len(devices), devices, together) == because


RANK = RankTurn(0, 0, "cuda:0", 10.0, 12.0, 100, 100, 10, 0, 0, 4, read_s=0.0, cpu_s=0.0, wait_s=0.0, copy_s=0.0)
"""Eight thread-seconds in two seconds."""


@pytest.mark.parametrize(
    ("times", "cores", "limit"),
    [
        ({"read_s": 7.5, "cpu_s": 1.0}, 16, Limit.STORAGE),
        ({"read_s": 7.9, "cpu_s": 7.5}, 16, Limit.ONE_THREAD),
        ({"read_s": 7.9, "cpu_s": 7.5}, 4, Limit.CORES),
        ({"read_s": 2.0, "cpu_s": 2.0, "wait_s": 5.5}, 16, Limit.COPIES),
        ({"read_s": 2.0, "cpu_s": 7.5, "copy_s": 5.5}, 16, Limit.COPIES),
        ({"read_s": 6.0, "cpu_s": 7.5, "copy_s": 1.6}, 16, Limit.ONE_THREAD),
        ({"read_s": 1.0, "cpu_s": 1.0}, 16, Limit.RANKS),
        ({"read_s": 5.0, "cpu_s": 2.2}, 2, Limit.CORES),
    ],
    ids=["storage", "one thread", "cores", "staging", "copies", "short copies", "ranks", "more threads than cores"],
)
def test_what_limits(times: dict[str, float], cores: int, limit: Limit) -> None:
    ranks = 2 if limit is Limit.RANKS else 1
    assert find_limit([replace(RANK, **times)] * ranks, 2.0, cores) is limit


def test_one_rank_does_not_wait_for_others() -> None:
    assert find_limit([replace(RANK, read_s=1.0, cpu_s=0.1)], 2.0, 16) is Limit.STORAGE
