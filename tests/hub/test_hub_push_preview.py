"""``push --dry-run``: what it shows, that it writes nothing, and that it refuses what the push would refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from nvfp4_prep import PublishOptions, preview_push, push
from nvfp4_prep.cli import cli
from nvfp4_prep.commands.convert import convert
from nvfp4_prep.errors import HubError, NvfpPrepError, TargetError, UsageError, VerificationError
from nvfp4_prep.hub.errors import Patience
from support.hub_server import LoopbackHub
from support.hub_support import make_checkpoint, read_folder, write_checkpoint

REPO = "alice/prepared"
QUICK = Patience(0.01, 0.02, 0.05)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # the client's own
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    source = write_checkpoint(folder / "source", make_checkpoint(layers=2, experts=4, shards=2))
    convert(source, folder / "out")
    return folder / "out"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def assert_only_read(hub: LoopbackHub) -> None:
    """The client asks by POST whether a card is well formed and what is on a path; everything else that writes is not
    allowed."""
    assert {request.method for request in hub.log} <= {"GET", "HEAD"}, [(it.method, it.path) for it in hub.log]


def test_a_new_repository_gets_every_file(hub: LoopbackHub, made: Path) -> None:
    preview = preview_push(made, REPO, PublishOptions(revision="candidate"))
    sizes = {name: len(data) for name, data in read_folder(made).items()}
    assert {file.name: file.nbytes for file in preview.files} == sizes
    assert (preview.repository, preview.revision) == ("new", "candidate")
    assert preview.upload_nbytes == preview.nbytes == sum(sizes.values())
    assert preview.card == (made / "README.md").read_text()
    assert not hub.store.repositories
    assert_only_read(hub)


def test_what_is_there_is_not_sent_again(hub: LoopbackHub, made: Path) -> None:
    push(made, REPO)
    hub.log.clear()
    preview = preview_push(made, REPO)
    assert preview.repository == "exists" and preview.upload_nbytes == 0 and all(file.there for file in preview.files)
    branch = preview_push(made, REPO, PublishOptions(revision="other"))
    assert (branch.repository, branch.upload_nbytes) == ("exists", 0)
    opened = preview_push(made, REPO, PublishOptions(create_pr=True))
    assert opened.revision == "refs/pr/new"
    assert_only_read(hub)
    assert not hub.store.repositories[REPO].pulls


def test_files_of_an_older_checkpoint_are_told(hub: LoopbackHub, made: Path, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", make_checkpoint(layers=3, experts=4, shards=2))
    push(convert(source, tmp_path / "older", smoke=None).path, REPO)
    preview = preview_push(made, REPO)
    assert preview.removed and not {file.name for file in preview.files} & {*preview.removed}
    assert preview.upload_nbytes > 0
    assert "nvfp4_prep.json" in {file.name for file in preview.files if not file.there}


def test_no_network_leaves_files_and_card(hub: LoopbackHub, made: Path) -> None:
    hub.fault("/api/models/", "reset", times=1000)
    preview = preview_push(made, REPO, patience=QUICK)
    assert preview.repository == "unknown" and "listing alice/prepared failed" in preview.why_unknown
    assert preview.card and {file.there for file in preview.files} == {None}
    assert preview.upload_nbytes == preview.nbytes


def test_without_a_token_nothing_is_claimed(
    hub: LoopbackHub, made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.store.create(REPO, private=True)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    preview = preview_push(made, REPO)
    assert preview.repository == "unknown" and "does not exist on the Hub, or is private" in preview.why_unknown


def foreign(hub: LoopbackHub, made: Path) -> None:
    hub.store.publish(REPO, {"model.safetensors": b"another", "config.json": b"{}"})


def public(hub: LoopbackHub, made: Path) -> None:
    hub.store.create(REPO)


def damaged(hub: LoopbackHub, made: Path) -> None:
    (made / "generation_config.json").write_text("{ }")


def edited_card(hub: LoopbackHub, made: Path) -> None:
    card = made / "README.md"
    card.write_bytes(card.read_bytes().replace(b"e", b"E", 1))


def bad_token(hub: LoopbackHub, made: Path) -> None:
    hub.fault("/api/models/", "status", status=403, times=1000)


@pytest.mark.parametrize(
    ("prepare", "options", "kind"),
    [
        (foreign, PublishOptions(), TargetError),
        (public, PublishOptions(private=True), TargetError),
        (damaged, PublishOptions(), VerificationError),
        (edited_card, PublishOptions(), VerificationError),
        (bad_token, PublishOptions(), HubError),
    ],
)
def test_refusals_are_those_of_the_push(
    hub: LoopbackHub, made: Path, tmp_path: Path, prepare: object, options: PublishOptions, kind: type[NvfpPrepError]
) -> None:
    copy = Path(shutil.copytree(made, tmp_path / "copy"))
    prepare(hub, copy)  # type: ignore[operator]
    with pytest.raises(kind) as previewed:
        preview_push(copy, REPO, options, patience=QUICK)
    if prepare is bad_token:  # the push is refused at another request, which creates the repository
        return
    with pytest.raises(kind) as pushed:
        push(copy, REPO, options, patience=QUICK)
    assert str(previewed.value) == str(pushed.value)


def test_names_that_are_not_repositories_are_refused(made: Path) -> None:
    with pytest.raises(UsageError, match="USER/NAME"):
        preview_push(made, "just-a-name")


def test_command_line(hub: LoopbackHub, made: Path) -> None:
    shown = run("push", made, REPO, "--dry-run")
    assert shown.exit_code == 0, shown.output
    assert "repository would be created" in shown.stdout and "nothing was published (--dry-run)" in shown.stdout
    for path in made.iterdir():
        assert f"  {path.name}\n" in shown.stdout
    for line in (made / "README.md").read_text().splitlines():
        assert f"  | {line}" in shown.stdout
    value = json.loads(run("push", made, REPO, "--dry-run", "--json").stdout)
    assert value["repository"] == "new" and len(value["files"]) == len(list(made.iterdir()))
    assert not hub.store.repositories
