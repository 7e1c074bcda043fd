"""What errors advise about a prepared checkpoint: it fits however one came to it, and to follow it helps."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from nvfp4_prep import convert, relayout, restore, verify
from nvfp4_prep.cli import cli
from nvfp4_prep.errors import CheckpointError, VerificationError
from nvfp4_prep.load import load_layer
from nvfp4_prep.prepared.problems import Problem, renewal, steps_for
from support.cases import slow_after
from support.relayout_cases import flip

EXPERTS, COPIED = "experts-layer-00001.safetensors", "model-00001-of-00003.safetensors"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 446464\n"


@pytest.fixture
def copy(sample_prepared: Path, tmp_path: Path) -> Path:
    """A copy of a prepared checkpoint, to damage."""
    return Path(shutil.copytree(sample_prepared, tmp_path / "copy"))


def run(*words: object) -> Result:
    return CliRunner().invoke(cli, [*map(str, words), "-q"])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def flip_last(path: Path) -> None:
    flip(path, path.stat().st_size - 1)


@pytest.mark.parametrize("damage", [cut, Path.unlink, flip_last], ids=["short", "missing", "flipped"])
@pytest.mark.parametrize("name", [EXPERTS, COPIED, "source-scales.safetensors"])
@pytest.mark.slow
def test_a_damaged_file_of_a_copy_is_copied_again(
    copy: Path, sample_prepared: Path, damage: Callable[[Path], object], name: str
) -> None:
    damage(copy / name)
    done = run("verify", copy)
    assert done.exit_code == 6
    step = f"next: Do not serve this checkpoint. Copy or download {name} again; if that does not help, or this is the"
    assert f"{step} original, remove the directory and convert again." in done.stderr
    shutil.copy(sample_prepared / name, copy / name)
    assert run("verify", copy).exit_code == 0


@pytest.mark.parametrize("name", [EXPERTS, "nvfp4_prep.json", "config.json"])
@pytest.mark.parametrize(
    "words",
    [
        "convert SOURCE COPY",
        "convert SOURCE COPY --dry-run",
        "restore COPY NEW",
        "relayout COPY NEW --gate-up-block 16",
        "restamp COPY",
        "inspect COPY",
        "push COPY a/b",
        "bench-load COPY --device cpu",
    ],
)
def test_every_command_advises_the_same(copy: Path, sample_source: Path, tmp_path: Path, words: str, name: str) -> None:
    cut(copy / name)
    if name == "config.json":
        (copy / name).unlink()
    places = {"SOURCE": sample_source, "COPY": copy, "NEW": tmp_path / "new"}
    done = run(*(places.get(word, word) for word in words.split()))
    codes = {("inspect", EXPERTS): 3, ("inspect", "config.json"): 3, ("convert", "config.json"): 8}
    assert done.exit_code == codes.get((words.split()[0], name), 6)
    assert renewal(name) in done.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", [EXPERTS, COPIED])
@pytest.mark.parametrize("command", [restore, relayout], ids=["restore", "relayout"])
@pytest.mark.slow
def test_what_stopped_at_damage_ends_well_as_advised(
    copy: Path, sample_prepared: Path, tmp_path: Path, command: Callable[..., object], name: str
) -> None:
    """The finished files of the stopped run hold the damage: only ``--restart`` makes them anew."""
    options = {} if command is restore else {"gate_up_block": 16}
    flip_last(copy / name)
    with pytest.raises(VerificationError, match="with --restart") as caught:
        command(copy, tmp_path / "new", **options)
    assert f"Copy or download {name} again" in str(caught.value)
    shutil.copy(sample_prepared / name, copy / name)
    command(copy, tmp_path / "new", restart=True, **options)
    if command is relayout:
        assert verify(tmp_path / "new").ok


def test_kept_block_scales_that_are_damaged_are_named(copy: Path, tmp_path: Path) -> None:
    """The experts' own bytes fit their checksums then: to copy them again would not help."""
    name = "source-block-scales-layer-00001.safetensors"
    flip_last(copy / name)
    for command in (lambda: restore(copy, tmp_path / "a"), lambda: relayout(copy, tmp_path / "b", layout="trtllm")):
        with pytest.raises(VerificationError, match=f"Copy or download {name} again"):
            command()


def test_a_pointer_in_the_place_of_the_scales_is_pulled_too(copy: Path) -> None:
    """Every tensor in it is missing then, which is no reason to convert again."""
    (copy / "expert-scales.safetensors").write_bytes(POINTER)
    steps = verify(copy).next_step or ""
    assert "git lfs pull" in steps and "convert again" not in steps


@pytest.mark.parametrize("words", ["verify COPY --quick", "restore COPY NEW", "inspect COPY", "bench-load COPY"])
def test_a_pointer_of_git_lfs_is_pulled(copy: Path, tmp_path: Path, words: str) -> None:
    (copy / EXPERTS).write_bytes(POINTER)
    places = {"COPY": copy, "NEW": tmp_path / "new"}
    done = run(*(places.get(word, word) for word in words.split()))
    assert "is a git-lfs pointer, not the file itself" in done.output and "git lfs pull" in done.stderr
    assert "Copy or download" not in done.output


def test_many_damaged_files_are_one_sentence() -> None:
    names = [f"experts-layer-{number:05d}.safetensors" for number in range(60)]
    problems = [Problem(name, "is missing") for name in names]
    step = steps_for(problems, names, "here")
    assert step is not None and "00003.safetensors and 56 more files again" in step and len(step) < 400
    assert "Copy or download a, b and c again" in renewal("a", "b", "c")
    assert "Copy or download a and b again" in renewal("a", "b")


def test_what_no_copy_would_mend_is_converted_again(copy: Path) -> None:
    """Every file is what the manifest says, and still wrong: it was made so."""
    problems = [Problem("model.layers.1.mlp.experts", "the inverse transform does not give the source's tensors")]
    assert steps_for(problems, ["a"], "here") == "Do not serve this checkpoint: remove it and convert again."
    assert steps_for([], ["a"], "here") is None


def test_a_difference_from_the_source_may_be_the_sources(copy: Path, sample_source: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(sample_source, tmp_path / "other"))
    (other / "generation_config.json").write_text("{}")
    done = run("verify", copy, "--source", other, "--quick")
    assert done.exit_code == 6 and "next: Give the source that it was made from. If this is it, do not" in done.stderr


def make_parts(source: Path, target: Path) -> None:
    assert run("convert", source, target, "--layers", "1/2").exit_code == 0


PLACES: dict[str, tuple[Callable[[Path, Path, Path], object], str]] = {
    "source": (
        lambda place, source, out: shutil.copytree(source, place),
        "is not a prepared checkpoint (no nvfp4_prep",
    ),
    "empty": (lambda place, source, out: place.mkdir(), "Make one with nvfp4-prep convert, or, if it was one, copy or"),
    "file": (lambda place, source, out: place.write_text(""), "is not a directory. Give the directory of a prepared"),
    "missing": (lambda place, source, out: None, "does not exist. Give the directory of a prepared checkpoint."),
    "parts": (lambda place, source, out: make_parts(source, place), "holds parts of a conversion that are not joined."),
    "unfinished": (
        lambda place, source, out: (place / ".nvfp4_prep").mkdir(parents=True),
        "holds an unfinished run. Repeat the command that was stopped: it continues.",
    ),
    "above": (lambda place, source, out: shutil.copytree(out, place / "below"), "Give the folder: …/below."),
}


@pytest.mark.parametrize("kind", PLACES)
@pytest.mark.parametrize(
    "words",
    slow_after(2, ["verify --smoke", "bench-load", "verify", "restore NEW", "relayout NEW", "restamp", "push a/b"]),
)
def test_what_is_not_a_prepared_checkpoint_is_told_in_the_same_words(
    sample_source: Path, sample_prepared: Path, tmp_path: Path, words: str, kind: str
) -> None:
    make, message = PLACES[kind]
    make(tmp_path / "place", sample_source, sample_prepared)
    command, *rest = [str(tmp_path / "new") if word == "NEW" else word for word in words.split()]
    done = run(command, tmp_path / "place", *rest)
    assert done.exit_code == (3 if kind == "missing" and command != "bench-load" else 6)
    assert f"error: {tmp_path / 'place'}: " in done.stderr and message in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", PLACES)
def test_the_api_says_it_too(sample_source: Path, sample_prepared: Path, tmp_path: Path, kind: str) -> None:
    make, message = PLACES[kind]
    make(tmp_path / "place", sample_source, sample_prepared)
    with pytest.raises(CheckpointError) as caught:
        load_layer(tmp_path / "place", 1)
    assert message in str(caught.value)


def test_parts_are_joined_as_advised(sample_source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make_parts(sample_source, out)
    assert run("convert", sample_source, out, "--layers", "2/2").exit_code == 0
    assert "with --join in the place of --layers" in run("verify", out).stderr
    assert run("convert", sample_source, out, "--join", "--no-smoke").exit_code == 0
    assert run("verify", out).exit_code == 0


@pytest.fixture(scope="module")
def whole(sample_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished conversion, to be copied."""
    return convert(sample_source, tmp_path_factory.mktemp("whole") / "out").path


def swap(path: Path, kind: str) -> None:
    """Put something else in the place of a file, or nothing."""
    path.rename(path.parent.parent / f"{path.name}.kept")
    if kind == "a symbolic link":
        path.symlink_to(path.parent.parent / f"{path.name}.kept")
    elif kind == "a dangling link":
        path.symlink_to("nowhere")
    elif kind == "a directory":
        path.mkdir()
    elif kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a git-lfs pointer":
        path.write_bytes(POINTER)


def follow(advice: str, path: Path) -> None:
    """Do what an advice says about a file."""
    assert any(words in advice for words in ("Put the file itself in its place", "Copy or download", "git lfs pull"))
    if "Remove it." in advice and path.is_dir():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
    (path.parent.parent / f"{path.name}.kept").rename(path)


KINDS = ("nothing", "a symbolic link", "a dangling link", "a directory", "a FIFO", "a git-lfs pointer")


@pytest.mark.parametrize("name", [EXPERTS, "expert-scales.safetensors"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_convert_says_what_stands_in_the_place_of_a_file(
    whole: Path, sample_source: Path, tmp_path: Path, kind: str, name: str
) -> None:
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    swap(out / name, kind)
    words = ["convert", sample_source, out, "--no-smoke"]
    for done in (run(*words), run(*words, "--dry-run")):
        assert done.exit_code == 6
        assert f"found {kind.replace('dangling', 'symbolic')}. " in done.stderr
        assert ("git lfs pull" in done.stderr) == (kind == "a git-lfs pointer")
    follow(done.stderr, out / name)
    assert "complete" in run(*words).stdout


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("a symbolic link", "a git-lfs pointer")])
@pytest.mark.parametrize("words", ["convert SOURCE OUT --no-smoke", "inspect OUT", "verify OUT", "restore OUT NEW"])
def test_what_stands_in_the_place_of_the_manifest_is_told_by_all(
    whole: Path, sample_source: Path, tmp_path: Path, kind: str, words: str
) -> None:
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    swap(out / "nvfp4_prep.json", kind)
    places = {"SOURCE": sample_source, "OUT": out, "NEW": tmp_path / "new"}
    command = [places.get(word, word) for word in words.split()]
    done = run(*command)
    assert done.exit_code == (8 if command[0] == "convert" else 6)
    told = f"that is not a regular file ({kind.replace('dangling', 'symbolic')})"
    assert ("is a prepared checkpoint without its nvfp4_prep.json" if kind == "nothing" else told) in done.stderr
    follow(done.stderr, out / "nvfp4_prep.json")
    assert run(*command).exit_code == 0


@pytest.mark.parametrize("words", ["convert SOURCE OUT --no-smoke", "inspect OUT", "verify OUT"])
def test_a_manifest_behind_a_link_gets_one_advice(whole: Path, sample_source: Path, tmp_path: Path, words: str) -> None:
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    swap(out / "nvfp4_prep.json", "a symbolic link")
    command = [{"SOURCE": sample_source, "OUT": out}.get(word, word) for word in words.split()]
    done = run(*command)
    assert done.exit_code == 6 and "symbolic link leaves the checkpoint" in done.stderr
    follow(done.stderr, out / "nvfp4_prep.json")
    assert run(*command).exit_code == 0


def test_a_source_is_not_called_prepared(sample_source: Path) -> None:
    assert run("inspect", sample_source).exit_code == 0
    assert "without its nvfp4_prep.json" not in run("verify", sample_source).stderr
