"""The rules of what may be asked for together, without the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nvfp4_prep import ConvertRequest, PublishOptions, convert, convert_part, preview_conversion
from nvfp4_prep.commands.preflight import TargetState
from nvfp4_prep.errors import UsageError, VerificationError


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"layers": "1", "join": True}, "Use one of them"),
        ({"layers": "1", "push_to": "a/b"}, "parts come from several"),
        ({"join": True, "push_to": "a/b"}, "parts come from several"),
        ({"join": True, "restart": True}, "what --join is to take"),
        ({"join": True, "device": "cuda"}, "prepared on the CPU"),
        ({"stream_out": True}, "but not where"),
        ({"publish_options": PublishOptions(private=True)}, "but not where"),
        ({"push_to": "nobody"}, "is not a repository"),
        ({"report": Path("page.html"), "smoke": False}, "--report"),
        ({"report": Path("page.html"), "dry_run": True}, "--report"),
        ({"report": Path("no/such/folder/page.html")}, "does not exist"),
    ],
)
def test_what_excludes_each_other_is_refused(tmp_path: Path, asked: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        ConvertRequest("source", tmp_path / "out", **asked).check()
    with pytest.raises(UsageError, match=words):  # before the source, which is not there, is looked for
        preview_conversion(ConvertRequest("source", tmp_path / "out", **asked))


@pytest.mark.parametrize("asked", [{}, {"layers": "1/2"}, {"join": True}, {"push_to": "a/b", "stream_out": True}])
def test_what_goes_together_passes(tmp_path: Path, asked: dict[str, Any]) -> None:
    ConvertRequest("source", tmp_path / "out", **asked).check()


def test_work_folder_is_where_downloads_go(tmp_path: Path) -> None:
    assert ConvertRequest("a/b", tmp_path).work_folder == tmp_path
    assert ConvertRequest("a/b", tmp_path, dry_run=True).work_folder is None
    part = ConvertRequest("a/b", tmp_path, layers="1/2").work_folder
    assert part is not None and part != tmp_path and part.is_relative_to(tmp_path)


def damage(target: Path) -> None:
    config = target / "config.json"
    config.write_text(config.read_text().replace("nvfp4_prep", "nvfp4_perp"))


def test_functions_find_a_damaged_finished_target_as_the_command_does(sample_source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    convert(sample_source, target, smoke=None)
    assert convert(sample_source, target, smoke=None).already_complete
    damage(target)
    with pytest.raises(VerificationError, match="is finished, but damaged"):
        convert(sample_source, target, smoke=None)
    with pytest.raises(VerificationError, match="is finished, but damaged"):
        convert_part(sample_source, target, "1/2")
    outlook = preview_conversion(ConvertRequest(str(sample_source), target, dry_run=True)).outlook
    assert outlook.state is TargetState.REFUSED
    assert isinstance(outlook.refusal, VerificationError)
