"""The command line against the loopback Hub, in processes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from nvfp4_prep.cli import cli
from nvfp4_prep.commands.convert import convert
from nvfp4_prep.commands.inspect import inspect
from nvfp4_prep.commands.verify_published import verify_published
from nvfp4_prep.errors import CheckpointError
from nvfp4_prep.hub.address import HubAddress
from nvfp4_prep.publish.push import push
from support.hub_server import LoopbackHub
from support.hub_support import QUICK, Files, assert_never_half, make_checkpoint, read_folder, write_checkpoint

SOURCE = "alice/small-moe"
REPO = "alice/prepared"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # the client's own
]


@pytest.fixture(scope="module")
def files() -> Files:
    return make_checkpoint()


@pytest.fixture(scope="module")
def made(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    convert(write_checkpoint(folder / "source", files), folder / "out")
    return folder / "out"


def start(hub: LoopbackHub, folder: Path, *arguments: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_valid", "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HOME": str(folder / "hf-home"), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", "from nvfp4_prep.cli import main; main()", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(hub: LoopbackHub, folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    with start(hub, folder, *arguments) as process:
        output, messages = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, output, messages)


def test_convert_push_and_verify(hub: LoopbackHub, files: Files, tmp_path: Path) -> None:
    commit = hub.store.publish(SOURCE, files)
    dry = run(hub, tmp_path, "convert", SOURCE, tmp_path / "out", "--dry-run", "--json")
    assert dry.returncode == 0, dry.stderr
    plan = json.loads(dry.stdout)
    assert (plan["source"], plan["revision"]) == (SOURCE, commit.oid)
    assert plan["peak_disk_nbytes"] == plan["output_nbytes"] + plan["download_nbytes"] + 64_000_000
    assert plan["target"]["needed_nbytes"] == plan["peak_disk_nbytes"]
    assert 0 < plan["download_nbytes"] < plan["source_nbytes"]
    assert not (tmp_path / "out").exists()
    through = CliRunner().invoke(
        cli, ["convert", SOURCE, str(tmp_path / "out"), "--dry-run", "--push-to", REPO, "--stream-out", "--json"]
    )
    assert json.loads(through.stdout)["peak_disk_nbytes"] < plan["peak_disk_nbytes"]
    assert REPO not in hub.store.repositories

    made = run(hub, tmp_path, "convert", f"hf://{SOURCE}@main", tmp_path / "out", "--quiet")
    assert made.returncode == 0, made.stderr
    assert not list((tmp_path / "hf-home").rglob("*.safetensors"))

    pushed = run(hub, tmp_path, "push", tmp_path / "out", REPO, "--full", "--private", "--json")
    assert pushed.returncode == 0, pushed.stderr
    assert json.loads(pushed.stdout)["page"] == f"{hub.url}/{REPO}"
    tree = hub.store.repositories[REPO].resolve("main").tree
    assert {name: blob.data for name, blob in tree.items() if name != ".gitattributes"} == read_folder(tmp_path / "out")

    checked = run(hub, tmp_path, "verify", REPO)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "verified (published" in checked.stdout


def test_straight_through(hub: LoopbackHub, files: Files, tmp_path: Path) -> None:
    hub.store.publish(SOURCE, files)
    done = run(hub, tmp_path, "convert", SOURCE, tmp_path / "out", "--push-to", REPO, "--stream-out", "--keep-source")
    assert done.returncode == 0, done.stderr
    assert f"{hub.url}/{REPO}: " in done.stdout
    assert f"serve it: vllm serve {REPO}" in done.stdout
    assert not list((tmp_path / "out").glob("*.safetensors"))
    assert len(list((tmp_path / "hf-home").rglob("snapshots/*/*.safetensors"))) == 8
    assert assert_never_half(hub.store.repositories[REPO]) == 1


def test_a_failed_smoke_run_keeps_the_stamp_back(
    hub: LoopbackHub, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nvfp4_prep.smoke import SmokeReport

    hub.store.publish(SOURCE, files)
    monkeypatch.setattr(SmokeReport, "passed", property(lambda report: False))
    for _ in range(2):  # the second time, the conversion is complete already
        failed = CliRunner().invoke(cli, ["convert", SOURCE, str(tmp_path / "out"), "--push-to", REPO])
        assert failed.exit_code == 6, failed.output
        assert assert_never_half(hub.store.repositories[REPO]) == 0


@pytest.mark.parametrize("skip", [0, 8], ids=["while planning", "while converting"])
def test_termination_is_prompt_though_the_network_hangs(
    hub: LoopbackHub, files: Files, tmp_path: Path, skip: int
) -> None:
    hub.store.publish(SOURCE, files)
    hub.fault("/objects/", "slow", seconds=60, skip=skip, times=10**6)
    process = start(hub, tmp_path, "convert", SOURCE, tmp_path / "out")
    while len(hub.requests("GET", "/objects/")) <= skip:
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.5)
    process.terminate()
    _, messages = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Run the same command" in messages  # again, or to resume, as far as it was
    assert "Traceback" not in messages


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["convert", "alice/nothing", "out"], 10, "alice/nothing: does not exist on the Hub"),
        (["convert", f"{SOURCE}@v9", "out"], 10, "has no such revision"),
        (["convert", SOURCE, "out", "--stream-out"], 2, "Add --push-to"),
        (["convert", SOURCE, "out", "--push-to", REPO, "--create-pr", "--revision", "x"], 2, "exclude each other"),
        (["convert", SOURCE, "out", "--push-to", "bob/x"], 10, "refused access"),
        (["verify", SOURCE], 6, "not a prepared checkpoint"),
        (["verify", SOURCE, "--source", "x"], 2, "checked by what the Hub lists"),
        (["verify", SOURCE, "--quick"], 2, "--quick: what is published"),
        (["verify", SOURCE, "--threads", "2", "--memory", "900"], 2, "--threads and --memory: what is published"),
        (["verify", SOURCE, "--smoke"], 2, "Download it first"),
        (["push", ".", REPO], 6, "not a prepared checkpoint"),
    ],
)
def test_errors_are_one_line(
    hub: LoopbackHub, files: Files, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    hub.store.publish(SOURCE, files)
    arguments = [str(tmp_path / "out") if argument == "out" else argument for argument in arguments]
    failed = CliRunner().invoke(cli, arguments)
    assert failed.exit_code == code, failed.output
    assert isinstance(failed.exception, SystemExit)
    assert message in failed.stderr


def test_verify_reads_a_small_part(hub: LoopbackHub, made: Path) -> None:
    push(made, REPO, patience=QUICK)
    hub.log.clear()
    report = verify_published(HubAddress(REPO), patience=QUICK)
    assert report.ok, report.problems
    assert report.depth == "published"
    assert all(request.range for request in hub.requests("GET", "/objects/"))
    assert report.checked_nbytes > 0


@pytest.mark.parametrize("damage", ["bytes", "missing", "side file", "config", "surplus", "shorter", "code"])
def test_verify_finds_what_is_wrong(hub: LoopbackHub, made: Path, damage: str) -> None:
    content = read_folder(made)
    victim = next(name for name in content if name.startswith("experts-"))
    if damage == "bytes":
        content[victim] = content[victim][:-1] + bytes([content[victim][-1] ^ 1])
    elif damage == "missing":
        del content[victim]
    elif damage == "shorter":
        content[victim] = content[victim][:-1]
    elif damage == "side file":
        content["tokenizer.json"] = content["tokenizer.json"].replace(b"0", b"1")
        victim = "tokenizer.json"
    elif damage == "config":
        config = json.loads(content["config.json"])
        config["quantization_config"]["layout"]["gate_up_block"] = 32
        content["config.json"] = json.dumps(config).encode()
        victim = "config.json"
    else:
        victim = "modeling_deepseek.py" if damage == "code" else "surplus.safetensors"
        content[victim] = b"x"
    hub.store.publish(REPO, content)
    report = verify_published(HubAddress(REPO), patience=QUICK)
    assert victim in {problem.where for problem in report.problems}
    deleted = {"surplus", "code"} & {damage}
    step = "Delete from the repository what is" if deleted else "Push it again from a directory that nvfp4-prep verify"
    assert report.next_step is not None and report.next_step.startswith(f"Do not serve this checkpoint. {step}")
    if deleted:
        del content[victim]
        hub.store.publish(REPO, content)
    push(made, REPO, patience=QUICK)
    assert verify_published(HubAddress(REPO), patience=QUICK).ok


def test_verify_of_an_unfinished_push(hub: LoopbackHub, made: Path) -> None:
    content = read_folder(made)
    del content["config.json"], content["nvfp4_prep.json"]
    hub.store.publish(REPO, content)
    with pytest.raises(CheckpointError, match="its upload is incomplete"):
        verify_published(HubAddress(REPO), patience=QUICK)


@pytest.mark.parametrize("damaged", [False, True])
def test_verify_against_a_source_on_the_hub(
    hub: LoopbackHub, files: Files, made: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    from nvfp4_prep.commands.verify import verify
    from nvfp4_prep.hub.range_source import RangeSource

    monkeypatch.setattr("nvfp4_prep.hub.range_source._HEAD_NBYTES", 20_000)
    shard = "model-00004-of-00008.safetensors"
    changed = files[shard][:-1] + bytes([files[shard][-1] ^ 1])
    hub.store.publish(SOURCE, {**files, shard: changed} if damaged else files)
    report = verify(made, source=RangeSource(HubAddress(SOURCE), patience=QUICK))
    assert report.ok != damaged
    assert all(request.range for request in hub.requests("GET", "/objects/"))


def test_inspect_of_source_and_prepared(hub: LoopbackHub, files: Files, made: Path) -> None:
    from nvfp4_prep.hub.source import HubSource

    hub.store.publish(SOURCE, files)
    hub.store.publish(REPO, read_folder(made))
    source = inspect(HubSource(HubAddress(SOURCE), patience=QUICK))
    prepared = inspect(HubSource(HubAddress(REPO), patience=QUICK))
    assert not source.prepared
    assert source.refusal == ""
    assert prepared.prepared
    assert len(prepared.layers) == 4
    assert all(request.range for request in hub.requests("GET", "/objects/"))
