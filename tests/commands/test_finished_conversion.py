"""Finished targets whose source was changed under the same name: what changed is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nvfp4_prep import convert
from nvfp4_prep.errors import TargetError


def _add(source: Path) -> None:
    (source / "added.txt").write_text("hi")


def _remove(source: Path) -> None:
    (source / "tokenizer.json").unlink()


def _lengthen(source: Path) -> None:
    (source / "tokenizer.json").write_text("{} ")


def _edit_config(source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "eos_token_id": 7}))


@pytest.fixture(scope="session")
def finished(sample_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source with a tokenizer, and its conversion beside it."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(sample_source, folder / "source")
    (folder / "source" / "tokenizer.json").write_text("{}")
    convert(folder / "source", folder / "out")
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_add, r"differs in added added\.txt\. "),
        (_remove, r"differs in removed tokenizer\.json\. "),
        (_lengthen, r"differs in size of tokenizer\.json\. "),
        (_edit_config, r"differs in bytes of config\.json\. "),
    ],
)
@pytest.mark.slow
def test_what_changed_in_the_source_is_named(
    finished: Path, tmp_path: Path, change: Callable[[Path], None], said: str
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "copy"))
    assert convert(folder / "source", folder / "out").already_complete
    change(folder / "source")
    with pytest.raises(TargetError, match=said):
        convert(folder / "source", folder / "out")
