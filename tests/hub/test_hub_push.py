"""Publishing to the loopback Hub: complete or not servable, at every commit, whatever happens on the way."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nvfp4_prep.commands.convert import convert
from nvfp4_prep.commands.verify_published import verify_published
from nvfp4_prep.errors import HubError, TargetError, VerificationError
from nvfp4_prep.hub.address import HubAddress
from nvfp4_prep.hub.errors import Patience
from nvfp4_prep.hub.publish_options import PublishOptions
from nvfp4_prep.options import ConvertOptions, GateUpPolicy
from nvfp4_prep.publish.push import PushResult, publish
from support.hub_server import LoopbackHub
from support.hub_store import Blob
from support.hub_support import QUICK, assert_never_half, make_checkpoint, read_folder, write_checkpoint

REPO = "alice/prepared"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # the client's own
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared checkpoint; four files of 0.8 MB and small ones."""
    folder = tmp_path_factory.mktemp("made")
    source = write_checkpoint(folder / "source", make_checkpoint())
    convert(source, folder / "out")
    return folder / "out"


@pytest.fixture(autouse=True)
def one_file_a_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nvfp4_prep.publish.push._BATCH_NBYTES", 100_000)


def send(directory: Path, patience: Patience = QUICK, **options: object) -> PushResult:
    return publish(directory, REPO, PublishOptions(**options), patience=patience)  # type: ignore[arg-type]


def assert_published(hub: LoopbackHub, directory: Path, branch: str = "main") -> None:
    repository = hub.store.repositories[REPO]
    tree = repository.resolve(branch).tree
    found = {name: blob.data for name, blob in tree.items() if name != ".gitattributes"}
    assert found == read_folder(directory)
    assert assert_never_half(repository, branch) == 1


def test_a_hub_that_was_never_reached_is_not_waited_for_long(
    hub: LoopbackHub, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One minute until the first answer; what docs/hub.md calls a bad night begins after it."""
    assert Patience().at_first_contact().give_up_after_s == 60.0
    monkeypatch.setattr("nvfp4_prep.hub.errors._FIRST_CONTACT_S", 0.05)
    hub.fault("/api/repos/create", "status", method="POST", status=503, times=1000)
    with pytest.raises(HubError, match=r"creating the repository failed .* without progress.*command again"):
        send(made, Patience(0.01, 0.02, 3600.0))


def test_push_publishes_everything_stamp_last(hub: LoopbackHub, made: Path) -> None:
    result = send(made)
    assert_published(hub, made)
    titles = [commit.title for commit in hub.store.repositories[REPO].history()]
    assert titles[-1].endswith(": stamp")
    assert len(titles) > 4
    assert result.commit == hub.store.repositories[REPO].heads["main"]
    assert result.page == f"{hub.url}/{REPO}"
    assert result.serve == f"vllm serve {REPO}"
    assert result.nbytes == sum(map(len, read_folder(made).values()))
    assert result.already_there == 0


def test_a_second_push_changes_nothing(hub: LoopbackHub, made: Path) -> None:
    first = send(made)
    hub.log.clear()
    second = send(made)
    assert second.commit == first.commit
    assert second.already_there == second.nbytes
    assert not hub.requests("PUT", "/")
    assert not hub.requests("POST", "/commit/")


def test_private_repository_branch_and_pull_request(hub: LoopbackHub, made: Path) -> None:
    send(made, private=True, revision="candidate")
    repository = hub.store.repositories[REPO]
    assert repository.private
    assert_published(hub, made, "candidate")
    assert "config.json" not in repository.resolve("main").tree
    result = send(made, create_pr=True)
    assert_published(hub, made, "refs/pr/1")
    assert result.page == f"{hub.url}/{REPO}/discussions/1"
    assert result.serve.endswith("--revision refs/pr/1")
    assert send(made, create_pr=True).commit == result.commit
    assert len(repository.pulls) == 1


def test_public_where_private_was_asked_for(hub: LoopbackHub, made: Path) -> None:
    hub.store.create(REPO)
    with pytest.raises(TargetError, match=r"is public, but --private"):
        send(made, private=True)


FAULTS = {
    "upload dropped": {"path": "/upload/", "kind": "reset", "method": "PUT", "times": 3},
    "upload refused": {"path": "/upload/", "kind": "status", "method": "PUT", "status": 500, "times": 8},
    "upload answer lost": {"path": "/upload/", "kind": "lost", "method": "PUT", "times": 2},
    "commit rate limited": {
        "path": "/commit/", "kind": "status", "method": "POST", "status": 429, "headers": {"Retry-After": "0"}
    },
    "commit fails": {"path": "/commit/", "kind": "status", "method": "POST", "status": 503, "times": 3},
    "commit answer lost": {"path": "/commit/", "kind": "lost", "method": "POST", "times": 2, "skip": 1},
    "tree fails": {"path": "/tree/", "kind": "status", "status": 502, "times": 7},
    "tree cut off": {"path": "/tree/", "kind": "drop", "after_bytes": 100, "times": 2},
    "batch fails": {"path": "/objects/batch", "kind": "status", "method": "POST", "status": 500, "times": 2},
    "create fails": {"path": "/repos/create", "kind": "status", "method": "POST", "status": 500},
    "create answer lost": {"path": "/repos/create", "kind": "lost", "method": "POST"},
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_faults_cost_time_only(hub: LoopbackHub, made: Path, name: str) -> None:
    hub.fault(**FAULTS[name])  # type: ignore[arg-type]
    send(made)
    assert [fault.times for fault in hub.faults] == [0], "the fault did not happen: the test shows nothing"
    assert_published(hub, made)
    titles = [commit.title for commit in hub.store.repositories[REPO].history()]
    assert len(titles) == len(set(titles)), "something was committed twice"


def test_a_lost_pull_request_answer_does_not_open_two(hub: LoopbackHub, made: Path) -> None:
    hub.fault("/discussions$", "lost", method="POST")
    send(made, create_pr=True)
    assert len(hub.store.repositories[REPO].pulls) == 1


def test_somebody_elses_commit_in_between(hub: LoopbackHub, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi

    original = HfApi.create_commit
    calls = 0

    def interfere(self: HfApi, *args: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 3:
            repository = hub.store.repositories[REPO]
            repository.add_commit("main", "somebody else's", repository.resolve("main").tree)
        return original(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(HfApi, "create_commit", interfere)
    send(made)
    assert_published(hub, made)
    assert "somebody else's" in [commit.title for commit in hub.store.repositories[REPO].history()]


def test_somebody_changes_weights_right_before_the_stamp(
    hub: LoopbackHub, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import HfApi

    original = HfApi.create_commit

    def interfere(self: HfApi, *args: object, **options: object) -> object:
        repository = hub.store.repositories[REPO]
        tree = dict(repository.resolve("main").tree)
        if str(options["commit_message"]).endswith(": stamp"):
            victim = next(name for name in tree if name.startswith("experts-"))
            repository.add_commit("main", "somebody else's", {**tree, victim: Blob(b"other weights", True)})
        return original(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(HfApi, "create_commit", interfere)
    with pytest.raises(VerificationError, match="published file has 13 bytes"):
        send(made)
    assert assert_never_half(hub.store.repositories[REPO]) == 0


def test_an_expired_token_stops_and_a_new_one_continues(hub: LoopbackHub, made: Path) -> None:
    hub.fault("/commit/", "revoke", method="POST", skip=2)
    with pytest.raises(HubError, match=r"token is invalid or has expired.*hf auth login.*continues"):
        send(made)
    assert assert_never_half(hub.store.repositories[REPO]) == 0
    hub.tokens["hf_valid"] = "alice"
    assert send(made).already_there > 0
    assert_published(hub, made)


def test_no_right_to_write(hub: LoopbackHub, made: Path) -> None:
    hub.tokens["hf_valid"] = "bob"
    with pytest.raises(HubError, match=r"refused access.*hf auth login"):
        send(made)


def test_changed_bytes_are_never_stamped(hub: LoopbackHub, made: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(made, tmp_path / "damaged")
    victim = next(damaged.glob("experts-*.safetensors"))
    content = bytearray(victim.read_bytes())
    content[-5] ^= 1
    victim.write_bytes(content)
    with pytest.raises(VerificationError, match=r"published file has sha256"):
        send(damaged)
    assert assert_never_half(hub.store.repositories[REPO]) == 0
    send(made)
    assert_published(hub, made)


def test_a_missing_file_is_refused_before_anything_is_sent(hub: LoopbackHub, made: Path, tmp_path: Path) -> None:
    partial = shutil.copytree(made, tmp_path / "partial")
    next(partial.glob("experts-*.safetensors")).unlink()
    with pytest.raises(VerificationError, match="neither published nor here"):
        send(partial)
    assert not hub.requests("POST", "/commit/")


def test_another_model_is_left_alone(hub: LoopbackHub, made: Path) -> None:
    hub.store.publish(REPO, {"model-00007-of-00009.safetensors": b"x", "config.json": b"{}"})
    before = hub.store.repositories[REPO].heads["main"]
    with pytest.raises(TargetError, match="holds another model"):
        send(made)
    assert hub.store.repositories[REPO].heads["main"] == before


FOREIGN = ["chat_template.jinja", "modeling_x.py", "training_args.pkl", "assets/logo.png", "hf_quant_config.json"]


@pytest.mark.parametrize("name", FOREIGN)
def test_what_verify_would_call_foreign_is_refused_before_anything_is_sent(
    hub: LoopbackHub, made: Path, name: str
) -> None:
    hub.store.publish(REPO, {name: b"x", ".gitattributes": b"", ".cache/x": b"x"})
    before = hub.store.repositories[REPO].heads["main"]
    with pytest.raises(
        TargetError, match=rf"holds files that do not belong to this checkpoint \('{name}'\).*Delete them"
    ):
        send(made)
    assert hub.store.repositories[REPO].heads["main"] == before
    assert not hub.requests("POST", "/commit/") and not hub.requests("PUT", "/")
    repository = hub.store.repositories[REPO]
    tree = {path: blob for path, blob in repository.resolve("main").tree.items() if path != name}
    repository.add_commit("main", "deleted", tree)
    send(made)
    assert verify_published(HubAddress(REPO)).ok


def test_a_foreign_file_that_comes_while_pushing_keeps_the_stamp_back(
    hub: LoopbackHub, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import HfApi

    original = HfApi.create_commit

    def interfere(self: HfApi, *args: object, **options: object) -> object:
        made_commit = original(self, *args, **options)  # type: ignore[arg-type]
        repository = hub.store.repositories[REPO]
        tree = repository.resolve("main").tree
        repository.add_commit("main", "somebody else's", {**tree, "modeling_x.py": Blob(b"x", False)})
        return made_commit

    monkeypatch.setattr(HfApi, "create_commit", interfere)
    with pytest.raises(TargetError, match=r"do not belong to this checkpoint \('modeling_x.py'\)"):
        send(made)
    assert assert_never_half(hub.store.repositories[REPO]) == 0


@pytest.mark.parametrize("other_weights", [False, True], ids=["side file only", "weights too"])
def test_a_file_that_the_new_version_does_not_have_goes_with_the_old_stamp(
    hub: LoopbackHub, tmp_path: Path, other_weights: bool
) -> None:
    source = write_checkpoint(tmp_path / "source", make_checkpoint(layers=2, experts=4, shards=1))
    (source / "chat_template.jinja").write_text("{{ evil }}")
    (source / "code").mkdir()
    (source / "code" / "modeling_x.py").write_text("x")
    send(convert(source, tmp_path / "first").path)
    (source / "chat_template.jinja").unlink()
    shutil.rmtree(source / "code")
    options = ConvertOptions(gate_up_block=32 if other_weights else 64)
    second = convert(source, tmp_path / "second", options).path
    send(second)
    assert verify_published(HubAddress(REPO)).ok
    repository = hub.store.repositories[REPO]
    found = {name: blob.data for name, blob in repository.resolve("main").tree.items() if name != ".gitattributes"}
    assert found == read_folder(second)
    assert assert_never_half(repository) == 2
    for commit in repository.history():  # never served beside the new files
        new = commit.tree.get("nvfp4_prep.json")
        if new is not None and new.data == (second / "nvfp4_prep.json").read_bytes():
            assert "chat_template.jinja" not in commit.tree and "code/modeling_x.py" not in commit.tree


def test_a_new_version_replaces_the_old_one_without_a_mixed_state(hub: LoopbackHub, made: Path, tmp_path: Path) -> None:
    send(made)
    files = make_checkpoint(layers=3, experts=4, shards=3)
    newer = tmp_path / "newer"
    convert(write_checkpoint(tmp_path / "source", files), newer, ConvertOptions(gate_up_scales=GateUpPolicy.VLLM))
    hub.fault("/commit/", "status", method="POST", skip=2, status=400)
    with pytest.raises(HubError):
        send(newer)
    assert "config.json" not in hub.store.repositories[REPO].resolve("main").tree
    send(newer)
    repository = hub.store.repositories[REPO]
    found = {name: blob.data for name, blob in repository.resolve("main").tree.items() if name != ".gitattributes"}
    assert found == read_folder(newer)
    assert assert_never_half(repository) == 2


PUSH = """
import sys
from pathlib import Path
import nvfp4_prep.publish.push as push
push._BATCH_NBYTES = 100_000
push.publish(Path(sys.argv[1]), sys.argv[2], push.PublishOptions())
"""


def test_killed_five_times_and_finished(hub: LoopbackHub, made: Path) -> None:
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    for path, kind, skip in (
        ("/repos/create", "kill-after", 0),
        ("/upload/", "kill", 2),
        ("/commit/", "kill-after", 1),
        ("/commit/", "kill", 1),
        ("/commit/", "kill", 2),
    ):
        hub.faults.clear()
        fault = hub.fault(path, kind, method="*", skip=skip)
        with subprocess.Popen([sys.executable, "-c", PUSH, str(made), REPO], env=environment) as process:
            hub.victim = process.pid
            assert process.wait(60) == -signal.SIGKILL
        assert fault.times == 0
        assert assert_never_half(hub.store.repositories[REPO]) == 0
    result = send(made)
    assert result.already_there > 0
    assert_published(hub, made)
