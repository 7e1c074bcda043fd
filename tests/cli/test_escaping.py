"""Nothing from outside reaches the terminal as it is: file names, configs, manifests, arguments, log lines."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from nvfp4_prep._util.printable import escape_logs, join_lines, printable, printable_text
from nvfp4_prep._util.progress import LogProgress
from nvfp4_prep.cli import cli
from nvfp4_prep.cli.output import hint, say, shell_line

HOSTILE = "x\x1b]52;c;ZXZpbA==\x07\x1b[2J\x9b31m\u202egpj.\u2066\r\nerror: forged\u2028y\ud800"
"""OSC 52 (clipboard), CSI in both forms, bidirectional overrides, a line break, a lone surrogate."""
UNSAFE = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)
MAIN = [sys.executable, "-c", "from nvfp4_prep.cli import main; main()"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def check(done: Result) -> None:
    """No raw character, no line that a name began, no traceback."""
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    for text in (done.stdout, done.stderr):
        assert UNSAFE.search(text) is None, repr(text)
        assert not any(line.startswith("error: forged") for line in text.splitlines())


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("a\nb\tc\r", r"a\nb\tc\r"),
        ("\x1b[2J", r"\x1b[2J"),
        ("\x7f\x85\x9b", r"\x7f\x85\x9b"),
        ("\u202e\u2066\u200b\ufeff\U000e0041", r"\u202e\u2066\u200b\ufeff\U000e0041"),
        ("\u2028\u2029", r"\u2028\u2029"),
        ("\ud800", r"\ud800"),
        (os.fsdecode(b"\xff.bin"), r"\xff.bin"),
        ("日本語 é 👩\u200d🔬 back\\slash", "日本語 é 👩\u200d🔬 back\\slash"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable(shown) == shown


def test_own_line_breaks_stay_and_those_of_names_do_not() -> None:
    assert printable_text(join_lines(["a\nb", "c"])) == "a\\nb\nc"


def _config(folder: Path, change: Callable[[dict[str, object]], object]) -> None:
    path = folder / "config.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def _index(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    value = json.loads(path.read_text())
    value["weight_map"] |= {HOSTILE: "missing" + HOSTILE + ".safetensors"}
    path.write_text(json.dumps(value))


def _unused(folder: Path) -> None:
    (folder / os.fsdecode(b"unused \x1b]0;title\x07\n\xff.safetensors")).write_bytes(b"\x08" + bytes(7) + b"{}      ")


def _tensor_names(folder: Path) -> None:
    """Renames a module in all headers and the index, to a name of the same length."""
    for path in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        path.write_bytes(path.read_bytes().replace(b"mlp.experts", b"m\xc2\x9b.experts"))


SOURCES: dict[str, Callable[[Path], object]] = {
    "architectures": lambda folder: _config(folder, lambda value: value.update(architectures=[HOSTILE])),
    "model_type": lambda folder: _config(folder, lambda value: value.update(architectures=[], model_type=HOSTILE)),
    "quant_algo": lambda folder: _config(
        folder, lambda value: value.update(quantization_config={"quant_algo": HOSTILE, HOSTILE: HOSTILE})
    ),
    "hidden_act": lambda folder: _config(folder, lambda value: value.update(hidden_act=HOSTILE)),
    "index": _index,
    "unused weights": _unused,
    "tensor names": _tensor_names,
    "damaged shard": lambda folder: next(folder.glob("model-*")).rename(folder / f"model-{HOSTILE[:-1]}.safetensors"),
    "config": lambda folder: (folder / "config.json").write_text('{"a": \x1b[2J}'),
}


@pytest.mark.parametrize("case", SOURCES)
@pytest.mark.parametrize("json_option", [[], ["--json"]])
@pytest.mark.slow
def test_a_hostile_source(sample_source: Path, tmp_path: Path, case: str, json_option: list[str]) -> None:
    folder = Path(shutil.copytree(sample_source, tmp_path / "source"))
    SOURCES[case](folder)
    check(run("inspect", folder, *json_option))
    check(run("convert", folder, tmp_path / "out", "--dry-run", *json_option))
    check(run("convert", folder, tmp_path / "out", "--no-smoke", *json_option))


def _put(*keys: str) -> Callable[[dict[str, object]], None]:
    def change(value: dict[str, object]) -> None:
        inner = value
        for key in keys[:-1]:
            inner = inner[key]  # type: ignore[assignment]
        inner[keys[-1]] = HOSTILE

    return change


MANIFESTS: dict[str, Callable[[dict[str, object]], None]] = {
    "/".join(keys): _put(*keys)
    for keys in (
        ("source", "name"),
        ("source", "revision"),
        ("source", "quantization", HOSTILE),
        ("tool", "version"),
        ("format_version",),
        (HOSTILE,),
        ("files", HOSTILE),
        ("passed_through_experts", HOSTILE),
        ("options", "layout"),
    )
}


@pytest.mark.parametrize("case", MANIFESTS, ids=printable)
def test_a_hostile_manifest(sample_source: Path, sample_prepared: Path, tmp_path: Path, case: str) -> None:
    folder = Path(shutil.copytree(sample_prepared, tmp_path / "prepared"))
    path = folder / "nvfp4_prep.json"
    value = json.loads(path.read_text())
    MANIFESTS[case](value)
    path.write_text(json.dumps(value))
    (folder / os.fsdecode(b"extra\x1b[2J\n\xff.json")).write_text("{}")
    for words in (["inspect"], ["verify", "--quick"], ["verify", "--quick", "--source", sample_source]):
        check(run(words[0], folder, *words[1:]))
    check(run("restore", folder, tmp_path / "back"))
    check(run("relayout", folder, tmp_path / "other", "--gate-up-block", 16))


@pytest.mark.parametrize(
    "words",
    [
        ["inspect", f"org/{HOSTILE[:-1]}"],
        ["inspect", f"hf://{HOSTILE[:-1]}"],
        ["verify", HOSTILE[:-1]],
        ["convert", HOSTILE[:-1], "x"],
        ["push", "x", HOSTILE[:-1]],
        [HOSTILE[:-1]],
        ["convert", "--no" + HOSTILE[:-1]],
        ["doctor", HOSTILE[:-1]],
    ],
)
def test_hostile_arguments(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    done = run(*words)
    check(done)
    assert done.exit_code != 0 and len(done.stderr.splitlines()) <= 2


@pytest.mark.parametrize("encoding", ["utf-8:strict", "ascii:strict", "latin-1:strict"])
@pytest.mark.slow
def test_paths_that_the_terminal_cannot_show(sample_source: Path, tmp_path: Path, encoding: str) -> None:
    """The output never turns a success into a failure."""
    target = os.path.join(os.fsencode(tmp_path), "out \xff 日本\n\x1b[2J".encode() + b"\xff\x1b")  # noqa: PTH118
    for command, *rest in (["convert", os.fsencode(sample_source), target, "--no-smoke"], ["verify", target]):
        done = subprocess.run(
            [*MAIN, command, *rest],
            capture_output=True,
            check=False,
            env={**os.environ, "PYTHONIOENCODING": encoding},
        )
        assert done.returncode == 0, done.stderr
        assert b"\x1b" not in done.stdout + done.stderr and b"\\xff" in done.stdout


def test_commands_can_be_pasted_whatever_the_path() -> None:
    word = os.fsdecode(b"a'b\\ \n\x1b\xff$x \xc3\xa9")
    line = shell_line("verify", word)
    assert printable(line) == line
    shown = subprocess.run(
        ["bash", "-c", f'nvfp4-prep() {{ printf %s "$2"; }}; {line}'], capture_output=True, check=True
    )
    assert shown.stdout == os.fsencode(word)


def test_progress_and_log_lines(capsys: pytest.CaptureFixture[str]) -> None:
    progress = LogProgress(sys.stderr, 0.0)
    progress.start(HOSTILE, 1)
    progress.advance(1, HOSTILE)
    progress.close()
    handler = logging.StreamHandler(sys.stderr)
    escape_logs([handler])
    handler.handle(logging.LogRecord("hub", logging.WARNING, "", 0, "the server said %s", (HOSTILE,), None))
    hint(HOSTILE)
    say(HOSTILE)
    written = capsys.readouterr()
    assert all(UNSAFE.search(text) is None for text in (written.err, written.out))
    assert written.out.count("\n") == 1


@pytest.mark.parametrize("words", [["--help"], ["convert", "--help"], ["verify", "--help"], ["--version"]])
@pytest.mark.slow
def test_help_on_a_terminal_without_unicode(words: list[str]) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict"}
    done = subprocess.run([*MAIN, *words], capture_output=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
