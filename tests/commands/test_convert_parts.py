"""Parts of a conversion, and their join: the bytes of an undivided one, whatever happens in between."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
from click.testing import CliRunner

from nvfp4_prep import (
    ConvertOptions,
    GateUpPolicy,
    SampleModel,
    convert,
    convert_part,
    join_parts,
    plan,
    verify,
    write_sample,
)
from nvfp4_prep._util.text import spans
from nvfp4_prep.checkpoint.filenames import WORK_FOLDER
from nvfp4_prep.cli import cli
from nvfp4_prep.commands import part_checks as parts
from nvfp4_prep.errors import (
    BusyError,
    PartsMissingError,
    ResumeConflictError,
    TargetError,
    UnsupportedCheckpointError,
    UsageError,
    VerificationError,
)
from nvfp4_prep.output.journal_line import to_line
from nvfp4_prep.output.layer_selection import LayerSelection, part_folder
from nvfp4_prep.output.target import Target
from support.cases import slow_after
from support.checkpoint_files import file_digests


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five MoE layers, 1 to 5, with differing gate/up scales, spread over shards."""
    folder = tmp_path_factory.mktemp("parts") / "source"
    write_sample(folder, SampleModel(layers=6, experts=4, shard_nbytes=300_000, differing=0.5))
    return folder


@pytest.fixture(scope="module")
def whole(source: Path) -> dict[str, str]:
    """Digests of an undivided conversion."""
    return file_digests(convert(source, source.parent / "whole").path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "cuts", slow_after(1, [["5", "1,3", "2,4"], ["1/3", "2/3", "3/3"], ["1-2", "3-5"], ["0-3", "2-99"]])
)
def test_joined_bytes_are_those_of_one_conversion(
    source: Path, whole: dict[str, str], tmp_path: Path, cuts: list[str]
) -> None:
    out = tmp_path / "out"
    for cut in cuts:
        assert convert_part(source, out, cut).written_nbytes > 0
    assert {path.name for path in out.iterdir()} == {WORK_FOLDER}  # nothing that looks like a checkpoint
    assert not join_parts(source, out).already_complete
    assert file_digests(out) == whole
    assert verify(out, source=source).ok
    assert join_parts(source, out).already_complete
    late = convert_part(source, out, cuts[0])
    assert late.joined
    assert file_digests(out) == whole


@pytest.mark.slow
def test_parts_of_several_processes_at_once(source: Path, whole: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    context = multiprocessing.get_context("spawn")
    running = [context.Process(target=convert_part, args=(source, out, f"{n}/3")) for n in (1, 2, 3)]
    for process in running:
        process.start()
    for process in running:
        process.join()
    assert [process.exitcode for process in running] == [0, 0, 0]
    join_parts(source, out)
    assert file_digests(out) == whole


def test_missing_layers_are_named_and_nothing_changes(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert_part(source, out, "2-3")
    before = file_digests(out)
    with pytest.raises(PartsMissingError, match=r"3 of 5 MoE layers are not made yet: 1,4-5.*--layers 1,4-5"):
        join_parts(source, out)
    assert file_digests(out) == before
    convert_part(source, out, "1,4-5")
    join_parts(source, out)


@pytest.mark.slow
def test_killed_part_continues(source: Path, whole: dict[str, str], tmp_path: Path) -> None:
    """A part that died in its second file: the first stays, the join refuses, the same part finishes."""
    out = tmp_path / "out"
    folder = part_folder(out, LayerSelection.parse("1-5"))
    child = os.fork()
    if child == 0:
        created = Target.create

        def create(self: Target, name: str, nbytes: int):  # type: ignore[no-untyped-def]
            if len(self.done) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return created(self, name, nbytes)

        Target.create = create  # type: ignore[method-assign]
        convert_part(source, out, "1-5", threads=1)
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    done = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(done) == 2
    with pytest.raises(PartsMissingError):
        join_parts(source, out)
    kept = {name: (folder / name).stat().st_ino for name in done}
    assert convert_part(source, out, "1-5").resumed
    assert {name: (folder / name).stat().st_ino for name in done} == kept
    join_parts(source, out)
    assert file_digests(out) == whole


@pytest.mark.parametrize("after", slow_after(1, range(0, 12, 2)))
def test_join_killed_while_it_takes_files_over(
    source: Path, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    out = tmp_path / "out"
    convert_part(source, out, "1-2")
    convert_part(source, out, "3-5")
    adopt, count = Target.adopt, 0

    def stumble(self: Target, entry: dict[str, object], path: Path) -> None:
        nonlocal count
        count += 1
        if count > after // 2:
            if after % 4 == 0:
                self.note(entry)  # noted, but not renamed
            raise KeyboardInterrupt
        adopt(self, entry, path)

    with monkeypatch.context() as patch:
        patch.setattr(Target, "adopt", stumble)
        with pytest.raises(KeyboardInterrupt):
            join_parts(source, out)
    with pytest.raises(ResumeConflictError, match="joined"):
        convert_part(source, out, "1-2")
    with pytest.raises(ResumeConflictError, match="--join"):
        convert(source, out)
    join_parts(source, out)
    assert file_digests(out) == whole


def test_a_restart_that_is_refused_keeps_the_parts(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert_part(source, out, "1-5", ConvertOptions(gate_up_scales=GateUpPolicy.VLLM))
    before = file_digests(out)
    with pytest.raises(UnsupportedCheckpointError, match="different global scales"):
        convert(source, out, ConvertOptions(gate_up_scales=GateUpPolicy.ERROR), restart=True)
    assert file_digests(out) == before


def test_one_part_on_two_machines_is_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert_part(source, out, "1-5")
    with Target.open(part_folder(out, LayerSelection.parse("1-5")), _identity(out, "1-5")):
        with pytest.raises(BusyError):
            convert_part(source, out, "1-5")
        with pytest.raises(BusyError):
            join_parts(source, out)
        with pytest.raises(BusyError):
            convert(source, out, restart=True)


def _identity(out: Path, text: str) -> dict[str, object]:
    journal = part_folder(out, LayerSelection.parse(text)) / WORK_FOLDER / "journal.jsonl"
    return dict(json.loads(journal.read_text().splitlines()[0])["identity"])


def test_files_of_two_writers_never_share_a_name(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks across machines: each writes its own temporary file."""
    from nvfp4_prep.output import target

    with Target.open(tmp_path / "out", {}) as place:
        mine = place.create("a", 3)
        monkeypatch.setattr(target.socket, "gethostname", lambda: "elsewhere")
        theirs = place.create("a", 3)
        mine.write(0, b"one")
        theirs.write(0, b"one")
        mine.commit({"sha256": "1"})
        theirs.commit({"sha256": "1"})
    assert (tmp_path / "out" / "a").read_bytes() == b"one"


@pytest.mark.slow
def test_parts_that_do_not_belong_together(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    convert_part(source, out, "1-3")
    convert_part(source, out, "4-5", ConvertOptions(gate_up_block=32))
    with pytest.raises(ResumeConflictError, match=r"options\.gate_up_block was 32, now 64"):
        join_parts(source, out)
    convert_part(source, out, "4-5", restart=True)
    monkeypatch.setattr(parts, "__version__", "9.9")
    with pytest.raises(ResumeConflictError, match=r'tool was ".*", now "9\.9"'):
        join_parts(source, out)
    monkeypatch.undo()
    journal = part_folder(out, LayerSelection.parse("4-5")) / WORK_FOLDER / "journal.jsonl"
    shutil.copytree(journal.parent.parent, part_folder(out, LayerSelection.parse("4,5")))
    _forge(part_folder(out, LayerSelection.parse("4,5")) / WORK_FOLDER / "journal.jsonl")
    with pytest.raises(VerificationError, match="different bytes"):
        join_parts(source, out)


def _forge(journal: Path) -> None:
    first, *others = (json.loads(line) for line in journal.read_text().splitlines())
    first["identity"]["layers"] = "4,5"
    changed = [first, *(line | {"sha256": "0" * 64} for line in others)]
    for line in changed:
        line.pop("checksum")
    journal.write_bytes(b"".join(to_line(line) for line in changed))


def test_foreign_and_undivided_targets(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(TargetError, match="not empty"):
        convert_part(source, out, "1-2")
    assert [path.name for path in out.iterdir()] == ["mine"]
    with Target.open(tmp_path / "busy", {}), pytest.raises(ResumeConflictError, match="as a whole"):
        convert_part(source, tmp_path / "busy", "1-2")


def test_restart_of_the_whole_discards_parts(source: Path, whole: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert_part(source, out, "1-2")
    with pytest.raises(ResumeConflictError, match=r"--layers 1-2.*--join.*--restart"):
        convert(source, out)
    convert(source, out, restart=True)
    assert file_digests(out) == whole


def test_selection_of_no_layer(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"selects none.*They are 1-5"):
        convert_part(source, tmp_path / "out", "0")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_numbers_that_are_not_moe_layers_are_told(source: Path, tmp_path: Path, dry: list[str]) -> None:
    """A mistyped range would else pass in silence."""

    def told(layers: str) -> str:
        done = CliRunner().invoke(
            cli, ["convert", str(source), str(tmp_path / layers[0]), "--layers", layers, "-q", *dry]
        )
        assert done.exit_code == 0, done.stderr
        return done.stderr

    present = [layer.index for layer in plan(source).layers]
    last = present[-1]
    assert f"note: --layers {last}-99 also names what is not a MoE layer; the part has layers {last}" in told(
        f"{last}-99"
    )
    assert "note:" not in told(spans(present)) and "note:" not in told("1/2")


@pytest.mark.parametrize("options", [[], ["--layout", "trtllm", "--moe-tp", "2"], ["--gate-up-block", "32"]])
def test_the_join_that_a_part_names_has_its_options(source: Path, tmp_path: Path, options: list[str]) -> None:
    made = CliRunner().invoke(cli, ["convert", str(source), str(tmp_path / "out"), *options, "--layers", "1/1"])
    (line,) = (line for line in made.stderr.splitlines() if line.startswith("next, when all parts are made: "))
    words = line.removeprefix("next, when all parts are made: nvfp4-prep ").split()
    assert words[3:-1] == options
    joined = CliRunner().invoke(cli, [*words, "--no-smoke"])
    assert joined.exit_code == 0, joined.stderr
