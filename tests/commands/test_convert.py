"""Convert end to end: bytes against the index formulas, files, resume, and every way in which it must refuse."""

from __future__ import annotations

import fcntl
import json
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nvfp4_prep import ConvertOptions, SampleModel, convert, plan, relayout, restore, verify, write_sample
from nvfp4_prep.checkpoint.filenames import WORK_FOLDER
from nvfp4_prep.checkpoint.local_source import LocalSource
from nvfp4_prep.errors import (
    BusyError,
    ConversionInterrupted,
    NoSpaceError,
    ResumeConflictError,
    SourceError,
    TargetError,
    UnsupportedCheckpointError,
    UsageError,
    VerificationError,
)
from nvfp4_prep.output.sink import KeepFiles
from support import layout_oracle
from support.checkpoint_files import file_digests, raw_bytes, read_tensors

PATH = "model.layers.1.mlp.experts"


class Stop(Exception):
    """Raised by a test in the middle of a conversion."""


class StopAfter(KeepFiles):
    """A sink that ends the run after some files."""

    def __init__(self, files: int) -> None:
        self._left = files

    def file_done(self, name: str, path: Path, nbytes: int, sha256: str | None) -> None:
        self._left -= 1
        if self._left == 0:
            raise Stop


def test_prepared_bytes_follow_the_index_formulas(tmp_path: Path) -> None:
    """Every expert of one layer, byte by byte in plain Python, with padding in both directions."""
    source = tmp_path / "source"
    write_sample(source, SampleModel(layers=2, experts=2, intermediate=48, hidden=80, seed=5))
    out = convert(source, tmp_path / "out").path
    before, after = read_tensors(source), read_tensors(out)
    for expert in range(2):

        def rows(projection: str, leaf: str, expert: int = expert) -> list[bytes]:
            _, shape, data = before[f"{PATH}.{expert}.{projection}_proj.{leaf}"]
            return [data[row * shape[1] : (row + 1) * shape[1]] for row in range(shape[0])]

        for suffix, scale in (("weight", False), ("weight_scale", True)):
            gate, up, down = (rows(projection, suffix) for projection in ("gate", "up", "down"))
            made_w13 = layout_oracle.prepare_w13(gate, up, scale=scale, block=64, moe_tp=1, align_i=64, align_h=256)
            made_w2 = layout_oracle.prepare_w2(down, scale=scale, moe_tp=1, align_i=64, align_h=256)
            for name, (height, width, data) in (("w13", made_w13), ("w2", made_w2)):
                _, shape, whole = after[f"{PATH}.routed_experts.{name}_{suffix}"]
                assert shape == (2, height, width)
                assert whole[expert * height * width :][: height * width] == data


def test_scale_vectors(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_sample(source, SampleModel(layers=2, experts=3, seed=9))
    after, before = read_tensors(convert(source, tmp_path / "out").path), read_tensors(source)

    def values(leaf: str, *projections: str) -> torch.Tensor:
        data = b"".join(before[f"{PATH}.{e}.{p}_proj.{leaf}"][2] for e in range(3) for p in projections)
        return torch.frombuffer(bytearray(data), dtype=torch.float32).view(3, len(projections))

    expected = {
        "w13_weight_scale_2": values("weight_scale_2", "gate")[:, 0],
        "w2_weight_scale_2": values("weight_scale_2", "down")[:, 0],
        "w13_input_scale": values("input_scale", "gate", "up").max().repeat(3),
        "w2_input_scale": values("input_scale", "down").max().repeat(3),
    }
    for name, vector in expected.items():
        assert after[f"{PATH}.routed_experts.{name}"] == ("torch.float32", (3,), raw_bytes(vector))


def test_official_library_reads_every_file_and_data_is_page_aligned(sample_prepared: Path) -> None:
    files = sorted(sample_prepared.glob("*.safetensors"))
    assert len(files) >= 6
    for path in files:
        with safe_open(path, framework="pt") as file:
            assert len(list(file.keys())) > 0
        assert (8 + int.from_bytes(path.read_bytes()[:8], "little")) % 4096 == 0


def test_index_lists_what_is_served_and_nothing_else(sample_prepared: Path) -> None:
    weight_map = json.loads((sample_prepared / "model.safetensors.index.json").read_text())["weight_map"]
    served = {}
    for path in sample_prepared.glob("*.safetensors"):
        if not path.name.startswith("source-"):
            with safe_open(path, framework="pt") as file:
                served |= dict.fromkeys(file.keys(), path.name)
    assert weight_map == served
    assert sum(".experts." in name and ".routed_experts." not in name for name in weight_map) == 0


def test_everything_else_passes_through(sample_source: Path, sample_prepared: Path) -> None:
    before, after = read_tensors(sample_source), read_tensors(sample_prepared)
    others = {name for name in before if ".mlp.experts." not in name}
    assert any("shared_experts" in name for name in others)
    for name in others:
        assert after[name] == before[name]


def test_config_carries_the_stamp(sample_source: Path, sample_prepared: Path) -> None:
    before = json.loads((sample_source / "config.json").read_text())
    after = json.loads((sample_prepared / "config.json").read_text())
    stamp = after.pop("quantization_config")
    assert stamp["source"] == before.pop("quantization_config")
    assert after == before
    assert stamp["quant_method"] == "nvfp4_prep"
    assert stamp["layout"]["gate_up_block"] == 64
    assert not (sample_prepared / "hf_quant_config.json").exists()


def test_file_modes_follow_the_umask(sample_source: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        out = convert(sample_source, tmp_path / "out").path
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()} == {0o640}


@pytest.mark.parametrize("threads", [1, 7])
def test_bytes_do_not_depend_on_threads(
    sample_source: Path, sample_prepared: Path, tmp_path: Path, threads: int
) -> None:
    assert file_digests(convert(sample_source, tmp_path / "out", threads=threads).path) == file_digests(sample_prepared)


@pytest.mark.slow
def test_bytes_do_not_depend_on_the_memory(sample_source: Path, sample_prepared: Path, tmp_path: Path) -> None:
    for memory in (3_000_000, 10**9):
        out = convert(sample_source, tmp_path / "out", memory_nbytes=memory).path
        assert file_digests(out) == file_digests(sample_prepared)
        back = restore(out, tmp_path / "back", memory_nbytes=memory).path
        assert restore(out, tmp_path / "back2").path.exists()
        assert file_digests(back) == file_digests(tmp_path / "back2")
        assert verify(out, source=sample_source, memory_nbytes=memory).ok
        narrow = relayout(out, tmp_path / "narrow", gate_up_block=16, memory_nbytes=memory).path
        assert verify(narrow, source=sample_source, memory_nbytes=memory).ok
        for folder in ("out", "back", "back2", "narrow"):
            shutil.rmtree(tmp_path / folder)


def test_too_little_memory_is_refused_and_the_same_command_continues(
    sample_source: Path, sample_prepared: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="too small for one piece of work"):
        convert(sample_source, tmp_path / "out", memory_nbytes=1000)
    assert not list(tmp_path.glob("out/*.safetensors"))
    assert file_digests(convert(sample_source, tmp_path / "out").path) == file_digests(sample_prepared)


@pytest.mark.parametrize("files", [1, 2, 4])
def test_stopped_and_continued_gives_the_same_bytes(
    sample_source: Path, sample_prepared: Path, tmp_path: Path, files: int
) -> None:
    out = tmp_path / "out"
    with pytest.raises(Stop):
        convert(sample_source, out, sink=StopAfter(files))
    assert not (out / "config.json").exists()
    assert not (out / "nvfp4_prep.json").exists()
    result = convert(sample_source, out)
    assert result.resumed
    assert result.written_nbytes < plan(sample_source).output_nbytes
    assert file_digests(out) == file_digests(sample_prepared)


def test_finished_files_are_not_written_again(sample_source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Stop):
        convert(sample_source, out, sink=StopAfter(3), threads=1)
    done = {path.name: path.stat().st_ino for path in out.glob("*.safetensors")}
    assert len(done) == 3
    convert(sample_source, out)
    assert {name: (out / name).stat().st_ino for name in done} == done


@pytest.mark.parametrize("left_nbytes", [0, 5, 5000])
def test_finished_file_that_was_cut_off_is_made_again(
    sample_source: Path, sample_prepared: Path, tmp_path: Path, left_nbytes: int
) -> None:
    out = tmp_path / "out"
    with pytest.raises(Stop):
        convert(sample_source, out, sink=StopAfter(2), threads=1)
    os.truncate(next(out.glob("*.safetensors")), left_nbytes)
    convert(sample_source, out)
    assert file_digests(out) == file_digests(sample_prepared)


def convert_and_kill(source: Path, out: Path, seconds: float) -> None:
    """Converts in a child process and kills it after a while, if it is not done by then."""
    child = os.fork()
    if child == 0:
        try:
            convert(source, out, threads=2)
        finally:
            os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.mark.slow
def test_twenty_kills_at_random_moments(tmp_path: Path) -> None:
    """SIGKILL until it has hit twenty conversions at work; in the end the bytes are an uninterrupted run's."""
    source = tmp_path / "source"
    write_sample(source, SampleModel(layers=4, experts=16, intermediate=512, hidden=1024, shard_nbytes=20_000_000))
    begin = time.monotonic()
    reference = file_digests(convert(source, tmp_path / "reference").path)
    whole = time.monotonic() - begin
    chance = random.Random(1)
    out = tmp_path / "out"
    hits = 0
    while hits < 20:
        convert_and_kill(source, out, chance.uniform(0.02, 0.5) * whole)
        if (out / WORK_FOLDER).exists():
            hits += 1  # it was at work
        elif out.exists() and any(out.iterdir()):  # killed between two mkdirs it is empty
            assert file_digests(out) == reference
            shutil.rmtree(out)
    convert(source, out)
    assert file_digests(out) == reference


@pytest.mark.slow
def test_terminated_run_says_how_to_continue(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_sample(source, SampleModel(layers=4, experts=32, intermediate=512, hidden=1024))
    script = "from nvfp4_prep.cli import main; main()"
    command = [sys.executable, "-c", script, "convert", str(source), str(tmp_path / "out"), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "out" / WORK_FOLDER / "journal.jsonl").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    output, messages = process.communicate()
    assert process.returncode == ConversionInterrupted.exit_code
    assert "Run the same command" in messages  # again, or to resume, as far as it was
    assert json.loads(output)["error"] == "ConversionInterrupted"
    assert "Traceback" not in messages


def test_changed_options_are_refused_by_name(sample_source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Stop):
        convert(sample_source, out, sink=StopAfter(1))
    with pytest.raises(ResumeConflictError, match=r"options\.gate_up_block was 64, now 16"):
        convert(sample_source, out, ConvertOptions(gate_up_block=16))
    assert (
        convert(sample_source, out, ConvertOptions(gate_up_block=16), restart=True).manifest.options.gate_up_block == 16
    )


def test_another_source_is_refused_by_its_name_first(sample_source: Path, tmp_path: Path) -> None:
    """Not by the digests of its shards, which say nothing to anybody."""
    out, big = tmp_path / "out", tmp_path / "big"
    write_sample(big, SampleModel(layers=4, experts=16, shard_nbytes=200_000))
    with pytest.raises(Stop):
        convert(big, out, sink=StopAfter(1))
    with pytest.raises(ResumeConflictError) as caught:
        convert(sample_source, out, ConvertOptions(gate_up_block=16))
    begin = f'source was "big", now "{sample_source.name}"; options.gate_up_block was 64, now 16; '
    assert caught.value.what.startswith("holds an unfinished run of something else: " + begin)
    assert "Repeat the first run's command" in str(caught.value)
    assert "headers differs for " in caught.value.what
    assert not re.search("[0-9a-f]{64}", caught.value.what)


class TouchShard(KeepFiles):
    """A sink that changes a source file while the conversion runs."""

    def __init__(self, victim: Path) -> None:
        self._victim = victim

    def file_done(self, name: str, path: Path, nbytes: int, sha256: str | None) -> None:
        os.utime(self._victim)


def test_source_that_changes_meanwhile_leaves_nothing_that_looks_whole(sample_source: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(sample_source, tmp_path / "source"))
    victim = next(source.glob("*.safetensors"))
    with pytest.raises(SourceError, match="changed while it was converted"):
        convert(source, tmp_path / "out", sink=TouchShard(victim))
    assert not {"config.json", "nvfp4_prep.json"} & {path.name for path in (tmp_path / "out").iterdir()}
    with pytest.raises(ResumeConflictError, match=victim.name) as caught:
        convert(source, tmp_path / "out")
    assert "the source's files changed since then" in caught.value.what
    assert caught.value.next_step == "Only --restart helps: it discards that run and begins anew."
    assert convert(source, tmp_path / "out", restart=True).manifest.layers


def test_another_source_with_the_same_files_is_not_complete_already(sample_source: Path, tmp_path: Path) -> None:
    """Another fine-tune: names, sizes and configs are alike, only the weights differ."""
    source = Path(shutil.copytree(sample_source, tmp_path / "source"))
    convert(source, tmp_path / "out")
    assert convert(source, tmp_path / "out").already_complete
    for shard in source.glob("*.safetensors"):
        tensors = load_file(shard)
        for name in [name for name in tensors if name.endswith("weight_scale_2")]:
            tensors[name] = tensors[name] * 2
        save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(
        TargetError, match="something else: its source had the same name, and differs in values of"
    ) as caught:
        convert(source, tmp_path / "out")
    assert caught.value.expected is None


def test_another_source_with_other_side_files_is_not_complete_already(sample_source: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(sample_source, tmp_path / "source"))
    convert(source, tmp_path / "out")
    (source / "tokenizer.json").write_text("{}")
    with pytest.raises(TargetError, match="something else"):
        convert(source, tmp_path / "out")


def test_a_finished_conversion_without_one_of_its_files(sample_source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(sample_source, out)
    victim = next(out.glob("experts-layer-*.safetensors"))
    nbytes = victim.stat().st_size
    os.truncate(victim, nbytes - 1)
    with pytest.raises(VerificationError, match=rf"{victim.name}.*found {nbytes - 1} bytes.*verify"):
        convert(sample_source, out)
    victim.unlink()
    with pytest.raises(VerificationError, match=f"{victim.name}.*but damaged.*found nothing"):
        convert(sample_source, out)


def test_changed_source_is_refused_by_name(sample_source: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(sample_source, source)
    with pytest.raises(Stop):
        convert(source, out, sink=StopAfter(1))
    shard = sorted(source.glob("model-*.safetensors"))[1]
    shard.touch()
    with pytest.raises(ResumeConflictError, match=shard.name):
        convert(source, out)


def test_second_run_on_one_target_is_refused(sample_source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    inside, leave = threading.Event(), threading.Event()

    class Wait(KeepFiles):
        def file_done(self, name: str, path: Path, nbytes: int, sha256: str | None) -> None:
            inside.set()
            leave.wait(10)

    first = threading.Thread(target=convert, args=(sample_source, out), kwargs={"sink": Wait()})
    first.start()
    assert inside.wait(10)
    try:
        with pytest.raises(BusyError, match="another run"):
            convert(sample_source, out)
    finally:
        leave.set()
        first.join()
    assert (out / "config.json").exists()


def test_lock_of_a_dead_process_does_not_hold(sample_source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / WORK_FOLDER).mkdir(parents=True)
    lock = (out / WORK_FOLDER / "lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(BusyError):
        convert(sample_source, out)
    lock.close()
    convert(sample_source, out)


def test_complete_target_is_left_alone(sample_source: Path, tmp_path: Path) -> None:
    out = convert(sample_source, tmp_path / "out").path
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert convert(sample_source, out).already_complete
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with pytest.raises(TargetError, match="other options: gate_up_block is 64, requested 32") as caught:
        convert(sample_source, out, ConvertOptions(gate_up_block=32))
    assert caught.value.where == str(out)


@pytest.mark.parametrize("place", ["same", "inside", "around"])
def test_target_must_lie_apart_from_the_source(sample_source: Path, tmp_path: Path, place: str) -> None:
    source = tmp_path / "a" / "source"
    shutil.copytree(sample_source, source)
    before = file_digests(source)
    target = {"same": source, "inside": source / "out", "around": tmp_path / "a"}[place]
    with pytest.raises(TargetError, match="source"):
        convert(source, target)
    assert file_digests(source) == before


def test_foreign_target_is_refused(sample_source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("three years")
    with pytest.raises(TargetError, match=r"thesis\.tex"):
        convert(sample_source, out)
    assert (out / "thesis.tex").read_text() == "three years"
    with pytest.raises(TargetError, match="not a directory"):
        convert(sample_source, out / "thesis.tex")


def test_foreign_file_in_an_unfinished_target_is_refused(sample_source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Stop):
        convert(sample_source, out, sink=StopAfter(1))
    (out / "notes.txt").write_text("mine")
    with pytest.raises(TargetError, match=r"notes\.txt"):
        convert(sample_source, out)


def test_unwritable_target_is_refused(sample_source: Path) -> None:
    with pytest.raises(TargetError, match="cannot be written"):
        convert(sample_source, Path("/proc/nvfp4-prep-out"))


def test_too_little_space_is_found_before_the_first_byte(
    sample_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    with pytest.raises(NoSpaceError, match=r"needed, 1\.00 MB free"):
        convert(sample_source, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_disk_that_fills_up_on_the_way_can_be_continued(
    sample_source: Path, sample_prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.posix_fallocate
    calls = 0

    def full(descriptor: int, offset: int, nbytes: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise OSError(28, "No space left on device")
        real(descriptor, offset, nbytes)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(NoSpaceError, match="Free disk space and run the same command again"):
            convert(sample_source, out, threads=1)
    assert {path.name for path in (out / WORK_FOLDER).rglob("*") if path.is_file()} == {"lock", "journal.jsonl"}
    convert(sample_source, out)
    assert file_digests(out) == file_digests(sample_prepared)


def test_source_that_shrinks_while_it_is_read(sample_source: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(sample_source, source)
    opened = LocalSource(source)
    plan(opened)
    shard = sorted(source.glob("model-*.safetensors"))[0]
    with shard.open("r+b") as stream:
        stream.truncate(shard.stat().st_size - 5000)
    with pytest.raises(SourceError, match=shard.name):
        convert(opened, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


def test_prepared_source_is_refused(sample_prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedCheckpointError, match="prepared already"):
        convert(sample_prepared, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_inverse_is_caught_before_it_is_written(
    sample_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A transform that drops one byte does not survive the check on the way."""
    from nvfp4_prep.errors import VerificationError
    from nvfp4_prep_kernels import MoeLayout

    real = MoeLayout.apply

    def faulty(self: MoeLayout, tensor: Any, *parts: torch.Tensor, **out: Any) -> torch.Tensor:
        made = real(self, tensor, *parts, **out).clone()
        made.view(-1)[7] ^= 1
        return made

    monkeypatch.setattr(MoeLayout, "apply", faulty)
    with pytest.raises(VerificationError, match="inverse transform"):
        convert(sample_source, tmp_path / "out")
    assert not list((tmp_path / "out").glob("experts-*"))


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_experts(tmp_path: Path) -> None:
    """Peak resident memory of conversions of 24 and of 64 experts of 3.5 MB, with buffers that both of them fill.

    Freed memory goes back to the system at once here: glibc keeps some, more for the larger one.
    """
    peaks = []
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    for experts in (24, 64):
        source = tmp_path / f"source{experts}"
        write_sample(source, SampleModel(layers=2, experts=experts, intermediate=1024, hidden=2048, vocabulary=64))
        script = (
            "import resource, nvfp4_prep, sys;"
            "nvfp4_prep.convert(sys.argv[1], sys.argv[2], threads=3, memory_nbytes=70_000_000, smoke=None);"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        command = [sys.executable, "-c", script, str(source), str(tmp_path / f"out{experts}")]
        run = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        peaks.append(int(run.stdout))
    assert peaks[1] - peaks[0] < 50_000
