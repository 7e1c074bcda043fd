"""Convert, restore and relayout stopped in each of their last steps: the same command completes."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from nvfp4_prep import convert, relayout, restore
from nvfp4_prep.checkpoint.filenames import WORK_FOLDER
from nvfp4_prep.errors import NvfpPrepError, TargetError
from nvfp4_prep.output.target import Target
from nvfp4_prep.output.target_root import TargetRoot
from support.checkpoint_files import file_digests

pytestmark = pytest.mark.slow

Run = Callable[[Path], object]
MUTATING = ("move", "unlink", "remove_tree", "sync")
COMMANDS = ("convert", "restore", "relayout")


@pytest.fixture
def runs(sample_source: Path, sample_prepared: Path) -> dict[str, Run]:
    return {
        "convert": lambda out: convert(sample_source, out, smoke=None),
        "restore": lambda out: restore(sample_prepared, out),
        "relayout": lambda out: relayout(sample_prepared, out, gate_up_block=16),
    }


class Killed(BaseException):
    pass


def stop_at(
    patch: pytest.MonkeyPatch, last: int, failure: Callable[[], BaseException], *, after: bool = False
) -> Callable[[], int]:
    """Makes every mutating call from the given one on fail; returns how many calls there were."""
    calls = 0

    def wrap(name: str) -> None:
        real = getattr(TargetRoot, name)

        def call(self: TargetRoot, *args: object, **options: object) -> object:
            nonlocal calls
            calls += 1
            if calls > last or (calls == last and not after):
                raise failure()
            result = real(self, *args, **options)
            if calls == last:
                raise failure()
            return result

        patch.setattr(TargetRoot, name, call)

    for name in MUTATING:
        wrap(name)
    return lambda: calls


@pytest.mark.parametrize("back", range(8))
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", ["kill", "kill after", "EIO", "ENOSPC"])
def test_the_same_command_completes(
    runs: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, back: int, kind: str
) -> None:
    run, out = runs[command], tmp_path / "out"
    with monkeypatch.context() as patch:
        count = stop_at(patch, 10**9, Killed)
        run(tmp_path / "whole")
    number = getattr(errno, kind, 0)
    failure = (lambda: OSError(number, os.strerror(number))) if number else Killed
    with monkeypatch.context() as patch:
        stop_at(patch, count() - back, failure, after=kind == "kill after")
        with pytest.raises((Killed, NvfpPrepError)):
            run(out)
    run(out)
    assert not (out / WORK_FOLDER).exists()
    assert file_digests(out) == file_digests(tmp_path / "whole")
    run(out)  # and again


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("harm", ["removed", "cut", "replaced"])
def test_a_finished_file_that_was_changed_meanwhile_is_noticed(
    runs: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, harm: str
) -> None:
    run, out = runs[command], tmp_path / "out"
    check, harmed = Target.check_files, False

    def check_later(self: Target) -> None:
        nonlocal harmed
        if not harmed:
            harmed = True
            path = self.path / min(name for name in self.done if name.endswith(".safetensors"))
            data = path.read_bytes()
            if harm == "removed":
                path.unlink()
            elif harm == "cut":
                path.write_bytes(data[:-1])
            else:
                (tmp_path / "other").write_bytes(data)
                (tmp_path / "other").replace(path)
        check(self)

    monkeypatch.setattr(Target, "check_files", check_later)
    with pytest.raises(TargetError, match="changed or removed by another program") as caught:
        run(out)
    assert not (out / "config.json").exists()
    if harm == "cut":
        assert "Remove that file" in (caught.value.next_step or "")
        Path(caught.value.where or "").unlink()
    run(out)
    run(tmp_path / "whole")
    assert file_digests(out) == file_digests(tmp_path / "whole")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "experts"])
def test_a_foreign_file_under_a_final_name_is_not_overwritten(
    runs: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, name: str
) -> None:
    run, out = runs[command], tmp_path / "out"
    move, names = TargetRoot.move, []

    def meddle(self: TargetRoot, old: str, new: str, **options: object) -> None:
        if not names and (new == name or (name == "experts" and new.endswith(".safetensors"))):
            names.append(new)
            (self.path / new).write_bytes(b"mine")
        move(self, old, new, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(TargetRoot, "move", meddle)
        with pytest.raises(TargetError, match="another program put there"):
            run(out)
    assert (out / names[0]).read_bytes() == b"mine"
    (out / names[0]).unlink()
    run(out)
    run(tmp_path / "whole")
    assert file_digests(out) == file_digests(tmp_path / "whole")
