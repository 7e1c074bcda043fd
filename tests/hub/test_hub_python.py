"""The Hub from Python, by the same rules as on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from nvfp4_prep import convert, inspect, plan, push, verify, verify_published
from nvfp4_prep.errors import UsageError
from support.hub_server import LoopbackHub
from support.hub_support import make_checkpoint, write_checkpoint

pytestmark = pytest.mark.default_smoke

REPO = "alice/small-moe"


@pytest.mark.slow
def test_a_hub_id_is_a_source_everywhere(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    hub.store.publish(REPO, make_checkpoint())
    assert plan(REPO).source_label == REPO
    assert inspect(f"hf://{REPO}").path == REPO
    result = convert(REPO, tmp_path / "out")
    assert result.manifest.source == REPO and result.smoke is not None and result.smoke.reference == "restored"
    assert not (tmp_path / "out" / ".nvfp4_prep").exists()
    assert verify(tmp_path / "out", source=f"hf://{REPO}", quick=True).ok
    assert push(tmp_path / "out", "alice/prepared").repo_id == "alice/prepared"
    for address in ("hf://alice/prepared", "alice/prepared"):
        report = verify(address)
        assert report.ok and report.depth == "published"
    assert verify_published("hf://alice/prepared").checks == report.checks
    with pytest.raises(UsageError, match="--source and --quick and --threads: what is published is checked by"):
        verify("hf://alice/prepared", source=REPO, quick=True, threads=2)


def test_a_directory_of_that_name_wins(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "alice" / "small-moe", make_checkpoint())
    assert plan(REPO).source_revision is None
    assert hub.requests("GET", "/") == []
