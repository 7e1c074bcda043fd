"""The command line: output, JSON, exit codes, and one line instead of a traceback."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from nvfp4_prep._version import __version__
from nvfp4_prep.cli import cli
from nvfp4_prep.cli.output import shell_line, to_json
from nvfp4_prep.errors import EXIT_CODES
from support.command_line import COMMANDS


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.mark.slow
def test_whole_life(sample_source: Path, tmp_path: Path) -> None:
    out, back = tmp_path / "out", tmp_path / "back"
    plan = run("convert", sample_source, out, "--dry-run")
    assert plan.exit_code == 0
    assert "2 MoE layers to prepare" in plan.output
    assert not out.exists()
    made = run("convert", sample_source, out, "-q")
    assert made.exit_code == 0, made.output
    assert "2 MoE layers prepared" in made.output
    assert "complete already" in run("convert", sample_source, out).output
    assert "verified (full with source" in run("verify", out, "--source", sample_source).output
    assert "prepared checkpoint" in run("inspect", out).output
    assert "convert would prepare it" in run("inspect", sample_source).output
    assert "tensors restored" in run("restore", out, back).output


@pytest.mark.slow
def test_json(sample_source: Path, sample_prepared: Path, tmp_path: Path) -> None:
    plan = json.loads(run("convert", sample_source, tmp_path / "out", "--dry-run", "--json").stdout)
    assert [layer["experts"] for layer in plan["layers"]] == [5, 5]
    assert plan["output_nbytes"] == sum(file["nbytes"] for file in plan["files"])
    made = json.loads(run("convert", sample_source, tmp_path / "out", "--json", "-q").stdout)
    assert made["tp_sizes"] == [1]
    report = json.loads(run("verify", sample_prepared, "--json", "-q").stdout)
    assert report["ok"] is True
    assert report["problems"] == []
    assert json.loads(run("inspect", sample_prepared, "--json").stdout)["prepared"] is True
    back = json.loads(run("restore", sample_prepared, tmp_path / "back", "--json", "-q").stdout)
    assert back["tensors"] > 100


def test_errors_are_one_line_with_the_next_step(sample_source: Path, sample_prepared: Path, tmp_path: Path) -> None:
    cases = [
        (("convert", tmp_path / "nowhere", tmp_path / "out"), 3, "does not exist"),
        (("convert", sample_prepared, tmp_path / "out"), 4, "prepared already"),
        (("convert", sample_source, sample_source / "out"), 8, "never touched"),
        (("verify", sample_source), 6, "Make one with nvfp4-prep convert"),
        (
            ("convert", sample_source, tmp_path / "o", "--layout", "cutedsl-batched", "--gate-up-block", "16"),
            2,
            "batched",
        ),
    ]
    for arguments, code, words in cases:
        result = run(*arguments)
        assert result.exit_code == code, result.output
        assert words in result.stderr
        assert "Traceback" not in result.output
        assert len([line for line in result.stderr.splitlines() if line.startswith("error:")]) == 1
        as_json = json.loads(run(*arguments, "--json").stdout)
        assert as_json["exit_code"] == code


def test_failed_verification_has_its_exit_code(sample_prepared: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(sample_prepared, tmp_path / "copy"))
    (copy / "expert-scales.safetensors").unlink()
    result = run("verify", copy, "-q")
    assert result.exit_code == 6
    assert "WRONG expert-scales.safetensors: is missing" in result.output


@pytest.mark.slow
def test_a_finished_target_is_not_called_right_without_a_look(
    sample_source: Path, sample_prepared: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(sample_prepared, tmp_path / "copy"))
    fine = run("convert", sample_source, copy, "-q")
    assert fine.exit_code == 0
    assert "the tensors' bytes were not read. To read them: nvfp4-prep verify " in fine.stdout
    for name, change in (
        ("model.safetensors.index.json", lambda path: path.unlink()),
        ("README.md", lambda path: path.write_text("mine")),
        ("config.json", lambda path: path.write_text("{}")),
        ("experts-layer-00001.safetensors", lambda path: path.unlink()),
        ("expert-scales.safetensors", lambda path: path.write_bytes(path.read_bytes()[:100])),
    ):
        broken = Path(shutil.copytree(sample_prepared, tmp_path / name))
        change(broken / name)
        for options in ([], ["--join"], ["--layers", "1"]):
            done = run("convert", sample_source, broken, "-q", *options)
            assert done.exit_code in (6, 8), (name, options)
            assert done.stdout == ""
            assert len(done.stderr.splitlines()) == 1 and str(broken) in done.stderr


def test_exit_codes_are_distinct_and_documented() -> None:
    text = " ".join(run("--help").output.split())
    for code, meaning in EXIT_CODES.items():
        assert f"{code} {meaning}" in text
    assert len(set(EXIT_CODES.values())) == len(EXIT_CODES)


def test_misuse_is_one_line_and_leaves_nothing(sample_source: Path, sample_prepared: Path, tmp_path: Path) -> None:
    cases = [
        (("convert", sample_source, ""), 2, "Is a variable of your shell not set?"),
        (("inspect", ""), 2, "an argument is empty"),
        (("push", sample_prepared, "nothub"), 2, "expected USER/NAME"),
        (("convert", sample_source, tmp_path / "x", "--push-to", "a/b/c"), 2, "expected USER/NAME"),
        (("convert", sample_source, tmp_path / "x", "--report", tmp_path / "no" / "page.html"), 2, "does not exist"),
        (("convert", sample_source, tmp_path / "x", "--layers", "1," * 150 + "1"), 2, "Write ranges"),
        (("verify", sample_prepared, "--source", sample_prepared), 2, "is a prepared checkpoint"),
        (("sample", tmp_path / "x", "--shard-mb", "nan"), 2, "--shard-mb"),
        (("sample", tmp_path / "x", "--seed", "-1"), 2, "--seed"),
        (("doctor", tmp_path / "x"), 2, "Give a directory that you can write to"),
        (("convert", sample_prepared / "config.json", tmp_path / "x"), 3, "is not a directory"),
        (("convert", sample_source, "/dev/null"), 8, "is not a directory"),
    ]
    for arguments, code, words in cases:
        done = run(*arguments)
        assert done.exit_code == code, (arguments, done.output)
        assert words in done.stderr and len(done.stderr.splitlines()) == 1 and done.stdout == ""
        assert json.loads(run(*arguments, "--json").stdout)["exit_code"] == code
        assert not (tmp_path / "x").exists()


def test_what_a_failed_restore_leaves_is_told(sample_prepared: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(sample_prepared, tmp_path / "copy"))
    damaged = bytearray((copy / "experts-layer-00002.safetensors").read_bytes())
    damaged[-1] ^= 1
    (copy / "experts-layer-00002.safetensors").write_bytes(damaged)
    for command in (["restore"], ["relayout", "--gate-up-block", "16"]):
        done = run(*command, copy, tmp_path / command[0], "-q", "--threads", "1")  # the first file is whole then
        assert done.exit_code == 6
        assert "holds what was written until then, without a config; remove it" in done.stderr
        assert not (tmp_path / command[0] / "config.json").exists()


def test_refusal_for_too_little_space_claims_nothing(
    sample_source: Path, sample_prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "new" / "b"
    with monkeypatch.context() as patch:
        patch.setattr("nvfp4_prep.output.target.free_nbytes", lambda path: 1000)
        for command in (
            ["restore", sample_prepared, out],
            ["relayout", sample_prepared, out, "--gate-up-block", "16"],
            ["convert", sample_source, out],
            ["convert", sample_source, out, "--layers", "1/2"],
        ):
            refused = run(*command)
            assert refused.exit_code == 5, refused.stderr
            assert list(tmp_path.iterdir()) == []
    assert run("relayout", sample_prepared, out, "--gate-up-block", "16", "-q").exit_code == 0


def test_what_the_system_refuses_is_one_line(sample_prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nvfp4_prep.commands.inspect

    def refuse(source: object) -> None:
        raise PermissionError(13, "Permission denied", "/secret")

    monkeypatch.setattr(nvfp4_prep.commands.inspect, "inspect", refuse)
    done = run("inspect", sample_prepared)
    assert (done.exit_code, done.stderr) == (
        1,
        "error: /secret: Permission denied. Check the permissions, or give another path.\n",
    )


@pytest.mark.slow
def test_a_torch_that_cannot_be_imported(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so: no such file')")
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from nvfp4_prep.cli import main; main()"
    for command in (["convert", "a", "b"], ["inspect", "a"], ["verify", "a"]):
        done = subprocess.run([sys.executable, "-c", script, *command], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert done.stderr == (
            "error: cannot work here: libcudart.so: no such file. nvfp4-prep doctor says what is missing.\n"
        )


def test_a_current_directory_that_was_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    done = run("inspect", ".")
    assert (done.exit_code, done.stderr) == (2, "error: the current directory was removed. Go to another one.\n")


def test_links_that_lead_nowhere(sample_source: Path, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("loop", "dangling"):
        for command in (["inspect"], ["convert", sample_source], ["verify"], ["sample"]):
            done = run(*command, tmp_path / name)
            assert done.exit_code not in (0, 130) and len(done.stderr.splitlines()) == 1, (name, command)
            assert done.stderr.startswith("error: ")


def test_a_name_that_is_no_path_is_looked_up_on_the_hub(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from nvfp4_prep.cli.output import tell_address

    for text, quiet, told in (("no/where", False, True), ("no/where", True, False), (str(tmp_path), False, False)):
        tell_address(text, quiet=quiet)
        assert ("is not a local path: looking for it on the Hugging Face Hub" in capsys.readouterr().err) == told


def test_usage_errors_are_one_line_too() -> None:
    for arguments, words in (
        (("convert", "--json"), "Missing argument 'SOURCE'. See nvfp4-prep convert --help."),
        (("convert", "a", "b", "--nope", "--json"), "See nvfp4-prep convert --help."),
        (
            ("convert", "a", "b", "--overwrite", "--json"),
            "No such option '--overwrite'. See nvfp4-prep convert --help.",
        ),
        (("convert", "a", "b", "--thread", "--json"), "Did you mean '--threads'?"),
        (("verify", "a", "--source"), "requires an argument. See nvfp4-prep verify --help."),
        (("conv", "--json"), "No such command 'conv'. "),
        (("--json",), "No such option '--json'. "),
    ):
        done = run(*arguments)
        assert done.exit_code == 2
        assert words in done.stderr and len(done.stderr.splitlines()) == 1
        assert not done.stdout or json.loads(done.stdout)["exit_code"] == 2
    assert run("conv").stdout == ""
    assert "Commands:" in run().stderr


@pytest.mark.slow
def test_output_that_cannot_be_written(sample_prepared: Path) -> None:
    script = [sys.executable, "-c", "from nvfp4_prep.cli import main; main()"]
    for arguments in (["inspect", str(sample_prepared)], ["--help"], ["completion", "bash"]):
        with open("/dev/full", "w") as full:
            done = subprocess.run([*script, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert (done.returncode, done.stderr) == (
            5,
            "error: stdout: No space left on device. Free disk space and run the command again.\n",
        )


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.slow
def test_a_log_that_cannot_be_written_stops_no_work(sample_source: Path, tmp_path: Path, buffered: bool) -> None:
    """Python keeps what a buffered stderr did not take, and fails with it when it ends."""
    script = [sys.executable, "-c", "from nvfp4_prep.cli import main; main()"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*script, "convert", str(sample_source), str(tmp_path / "out")],
            capture_output=False,
            stderr=full,
            check=False,
            env={**os.environ, "PYTHONUNBUFFERED": "" if buffered else "1"},
        )
    assert done.returncode == 0
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.slow
def test_a_closed_stdout_is_no_file_of_ours(sample_source: Path, sample_prepared: Path, tmp_path: Path) -> None:
    """What is printed must not land in the file that got the number of a closed stdout."""
    script = "from nvfp4_prep.cli import main; main()"
    command = f"{sys.executable} -c '{script}' convert {sample_source} {tmp_path / 'out'} >&- 2>&- <&-"
    assert subprocess.run(["bash", "-c", command], check=False).returncode == 0
    for path in sample_prepared.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_the_module_is_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nvfp4_prep", "verify", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert done.returncode == CliRunner().invoke(cli, ["verify", str(tmp_path)]).exit_code != 0


def test_usage() -> None:
    assert run("--version").output.strip().endswith(__version__)
    assert run("convert").exit_code == 2
    assert run("convert", "a", "b", "--threads", "0").exit_code == 2


def test_sample_and_threads(tmp_path: Path) -> None:
    assert run("sample", tmp_path / "s", "--experts", 2, "--layers", 2).exit_code == 0
    assert run("convert", tmp_path / "s", tmp_path / "o", "--threads", 3, "-q").exit_code == 0
    again = run("sample", tmp_path / "s")
    assert again.exit_code == 8
    assert "not empty" in again.stderr


@pytest.mark.slow
def test_progress_is_a_log_line_where_stderr_is_no_terminal(sample_source: Path, tmp_path: Path) -> None:
    result = run("convert", sample_source, tmp_path / "out")
    assert "convert: done in" in result.stderr
    assert "\r" not in result.stderr
    quiet = run("convert", sample_source, tmp_path / "quiet", "-q")
    assert "done in" not in quiet.stderr


@pytest.mark.slow
def test_closed_pipe_is_no_traceback(sample_prepared: Path) -> None:
    script = "from nvfp4_prep.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", script, "inspect", str(sample_prepared)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0


@pytest.mark.slow
def test_a_reader_that_has_gone_does_not_hide_damage(sample_prepared: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(sample_prepared, tmp_path / "copy"))
    (copy / "expert-scales.safetensors").unlink()
    script = [sys.executable, "-c", "from nvfp4_prep.cli import main; main()", "verify", str(copy), "-q"]
    with subprocess.Popen(script, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert b"Broken pipe" not in process.stderr.read()
    assert process.returncode == 6


def test_next_commands_can_be_typed(sample_source: Path, tmp_path: Path) -> None:
    done = run("convert", sample_source, tmp_path / "an out", "-q", "--no-smoke")
    assert f"next: nvfp4-prep verify '{tmp_path / 'an out'}' --source {sample_source}" in done.stderr
    assert shell_line("verify", Path("-out"), "--source", "it's") == """nvfp4-prep verify ./-out --source 'it'"'"'s'"""


@pytest.mark.parametrize("interval", [0.0])
def test_log_lines(interval: float, capsys: pytest.CaptureFixture[str]) -> None:
    from nvfp4_prep._util.progress import LogProgress

    progress = LogProgress(sys.stderr, interval)
    progress.start("convert", 4_000_000_000, 1_000_000_000)
    time.sleep(0.01)
    progress.advance(1_000_000_000, "layer 1")
    progress.advance(2_000_000_000, "layer 2")
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "convert: 4.00 GB, 1.00 GB done before"
    assert "2.00 GB of 4.00 GB (50 %)" in lines[1]
    assert lines[1].endswith("left, layer 1")
    assert lines[-1].startswith("convert: done in")


@pytest.mark.slow
def test_parts_and_join(sample_source: Path, sample_prepared: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = run("convert", sample_source, out, "--layers", "1/2", "-q")
    assert first.exit_code == 0, first.output
    assert "--join" in first.stderr
    missing = run("convert", sample_source, out, "--join", "-q")
    assert missing.exit_code == 13
    assert "convert with --layers 2" in missing.stderr
    part = json.loads(run("convert", sample_source, out, "--layers", "2", "--json", "-q").stdout)
    assert part["layers"] == [2]
    joined = run("convert", sample_source, out, "--join", "-q")
    assert "2 MoE layers prepared" in joined.stdout
    assert (out / "nvfp4_prep.json").read_bytes() == (sample_prepared / "nvfp4_prep.json").read_bytes()
    assert "complete already" in run("convert", sample_source, out, "--layers", "1/2", "-q").stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--layers", "1", "--join"], "Use one of them"),
        (["--layers", "1", "--push-to", "a/b"], "nvfp4-prep push"),
        (["--join", "--push-to", "a/b"], "nvfp4-prep push"),
        (["--join", "--restart"], "Leave one of them out"),
        (["--layers", "all"], "--layers 1-20"),
        (["--private"], "Add --push-to"),
        (["--report", "page.html", "--no-smoke"], "Leave --report out"),
        (["--report", "page.html", "--layers", "1"], "Leave --report out"),
    ],
)
def test_options_that_exclude_each_other(sample_source: Path, tmp_path: Path, options: list[str], words: str) -> None:
    result = run("convert", sample_source, tmp_path / "out", *options)
    assert result.exit_code == 2
    assert words in result.stderr
    assert not (tmp_path / "out").exists()


def test_help_of_every_command_teaches_by_example() -> None:
    for name in COMMANDS:
        text = run(name, "--help").stdout
        assert f"nvfp4-prep {name} " in text.split("Output and log:")[0].split("\n", 1)[1], name


def test_help_says_what_every_option_is() -> None:
    for name, command in COMMANDS.items():
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, (name, parameter.name)
    conditional = [line for line in run("convert", "--help").stdout.splitlines() if "With --push-to: " in line]
    assert [line.split()[0] for line in conditional] == ["--stream-out", "--private", "--revision", "--create-pr"]
    assert "--push-to" not in run("push", "--help").stdout


_TELLING_START = """
import signal
from nvfp4_prep.cli import main
take = signal.signal
def tell(number, handler):
    take(number, handler)
    if number == signal.SIGTERM: print("here", flush=True)
signal.signal = tell
main()
"""
_INTERRUPTED_IMPORT = """
import os, signal, sys
from nvfp4_prep.cli import main
from importlib.abc import MetaPathFinder
number, moment = int(sys.argv.pop(1)), sys.argv.pop(1)
class Finder(MetaPathFinder):
    seen = 0
    def find_spec(self, name, path=None, target=None):
        self.seen += 1
        if moment in (name, str(self.seen)): os.kill(os.getpid(), number)
sys.meta_path.insert(0, Finder())
assert not {"click", "torch"} & sys.modules.keys()
main()
"""


@pytest.mark.parametrize("command", [["convert", "a", "b"], ["inspect", "a", "--json"]])
@pytest.mark.parametrize("moment", ["1", "click", "60", "torch", "300", "numpy", "600", "torch._C", "torch._ops"])
@pytest.mark.slow
def test_interrupt_while_modules_are_imported_has_the_same_exit_code(command: list[str], moment: str) -> None:
    """Native modules lose an exception in the middle of their import, print it, or abort; click makes exit code 1."""
    number = signal.SIGTERM if moment.isdigit() else signal.SIGINT
    script = [sys.executable, "-c", _INTERRUPTED_IMPORT, str(int(number)), moment]
    done = subprocess.run([*script, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 130, done
    assert done.stderr == "error: interrupted. Run the same command again.\n"
    if "--json" in command:
        assert json.loads(done.stdout)["error"] == "ConversionInterrupted"
    else:
        assert done.stdout == ""


@pytest.mark.parametrize("delay_s", [0.0, 0.03, 0.1, 0.2, 0.3])
def test_interrupt_at_any_moment_of_the_start(sample_source: Path, tmp_path: Path, delay_s: float) -> None:
    """From the moment on at which the command has the signals, which is before click is imported."""
    words = ["convert", str(sample_source), str(tmp_path / "out"), "-q", "--no-smoke"]
    command = [sys.executable, "-c", _TELLING_START, *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay_s)
        process.send_signal(signal.SIGINT)
        messages = process.communicate()[1]
    assert process.returncode == 130, messages
    said = messages.lstrip("\n")  # click ends the line that ^C stands in, where it is the one that hears the signal
    assert said.startswith("error: ") and said.count("\n") == 1, messages


def test_json_is_strict() -> None:
    """NaN is no JSON, and a broken source can put one into a figure."""
    value = {"a": [float("nan"), 1.5, (float("inf"),)], "b": "NaN", "c": None}
    assert json.loads(to_json(value), parse_constant=pytest.fail) == {"a": [None, 1.5, [None]], "b": "NaN", "c": None}
