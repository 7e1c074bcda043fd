"""The journal is text that anybody may have changed: it is checked where it is read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvfp4_prep import convert
from nvfp4_prep.checkpoint.filenames import WORK_FOLDER
from nvfp4_prep.errors import ConversionInterrupted, ResumeConflictError, TargetError
from nvfp4_prep.output.experts_fact import ExpertsFact
from nvfp4_prep.output.journal_entry import JournalEntry
from nvfp4_prep.output.journal_line import read_line, to_line
from nvfp4_prep.output.target import Target
from nvfp4_prep_kernels import PreparedTensor
from support.checkpoint_files import file_digests

SHA256 = "0" * 64
FACT = {"tensor": "w13_weight", "crc32": [1], "reconciled": [], "errors": [[1.0, 2, 3]]}
OUTCOME = {"expert": 0, "rounded": 1, "underflowed": 0, "worst_relative": 0.1, "side": "up"}
ENTRY = {"file": "a", "nbytes": 1, "sha256": SHA256, "digests": {"k": SHA256}, "facts": [FACT], "mtime_ns": 7}


def edit_finished(journal: Path, edit: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Edit all lines but the first, each with the checksum that belongs to it."""
    first, *others = journal.read_bytes().splitlines(keepends=True)
    lines = [read_line(line).value for line in others]
    journal.write_bytes(b"".join([first, *(to_line(edit(line)) for line in lines if line is not None)]))


def test_a_right_entry_is_read() -> None:
    entry = JournalEntry.parse(ENTRY | {"facts": [FACT | {"reconciled": [OUTCOME]}]})
    assert entry is not None
    assert (entry.file, entry.nbytes, entry.sha256, entry.digests) == ("a", 1, SHA256, {"k": SHA256})
    assert json.loads(json.dumps(entry.to_json())) == ENTRY | {"facts": [FACT | {"reconciled": [OUTCOME]}]}
    assert JournalEntry.parse(entry.to_json()) == entry


def test_a_fact_may_lack_what_it_has_nothing_of() -> None:
    """Journals of relayout had no errors."""
    entry = JournalEntry.parse(ENTRY | {"facts": [{"tensor": "w2_weight", "crc32": [7]}]})
    assert entry is not None
    assert entry.facts == (ExpertsFact(PreparedTensor.W2_WEIGHT, (7,)),)


WRONG: list[dict[str, Any]] = [
    {"file": None},
    {"file": "../a"},
    {"file": ["a"]},
    {"nbytes": "1"},
    {"nbytes": True},
    {"nbytes": -1},
    {"nbytes": 1.0},
    {"sha256": 5},
    {"sha256": "abc"},
    {"digests": []},
    {"digests": {"k": None}},
    {"mtime_ns": "7"},
    {"mtime_ns": True},
    {"mtime_ns": 7.0},
    {"facts": {}},
    {"facts": [None]},
    {"facts": [[]]},
    {"facts": [FACT | {"tensor": "x"}]},
    {"facts": [FACT | {"tensor": []}]},
    {"facts": [FACT | {"crc32": None}]},
    {"facts": [FACT | {"crc32": ["1"]}]},
    {"facts": [FACT | {"crc32": [2**32]}]},
    {"facts": [FACT | {"reconciled": None}]},
    {"facts": [FACT | {"reconciled": [{}]}]},
    {"facts": [FACT | {"reconciled": [OUTCOME | {"side": []}]}]},
    {"facts": [FACT | {"reconciled": [OUTCOME | {"worst_relative": "x"}]}]},
    {"facts": [FACT | {"errors": [[1, 2]]}]},
    {"facts": [FACT | {"errors": [["1", 2, 3]]}]},
]


@pytest.mark.parametrize("change", WRONG, ids=str)
def test_a_wrong_entry_is_none(change: dict[str, Any]) -> None:
    assert JournalEntry.parse(ENTRY | change) is None


def interrupt(source: Path, out: Path) -> Path:
    """A conversion that is stopped before its last files; returns its journal."""

    def stop(self: Target) -> None:
        raise ConversionInterrupted("stopped")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Target, "check_files", stop)
        with pytest.raises(ConversionInterrupted):
            convert(source, out, smoke=None)
    return out / WORK_FOLDER / "journal.jsonl"


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [{"sha256": None}, {"sha256": 7}, {"digests": None}, {"digests": {"k": 1}}, {"facts": [None]}, {"facts": 3}],
    ids=str,
)
def test_files_of_wrong_entries_are_made_again(
    sample_source: Path, sample_prepared: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    journal = interrupt(sample_source, tmp_path / "out")
    edit_finished(journal, lambda line: line | change)
    result = convert(sample_source, tmp_path / "out", smoke=None)
    assert result.resumed
    assert result.written_nbytes > 0
    assert file_digests(tmp_path / "out") == file_digests(sample_prepared)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change", [{"digests": {}}, {"facts": []}, {"facts": [{"tensor": "w2_weight", "crc32": [1]}]}], ids=str
)
def test_entries_that_lack_something_end_with_an_error(
    sample_source: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    out = tmp_path / "out"
    journal = interrupt(sample_source, out)
    edit_finished(journal, lambda line: line | change)
    with pytest.raises(TargetError, match="do not fit together"):
        convert(sample_source, out, smoke=None)
    assert not (out / "config.json").exists()
    assert not (out / "nvfp4_prep.json").exists()
    assert not convert(sample_source, out, smoke=None, restart=True).resumed


@pytest.mark.parametrize("line", [b"[" * 100_000, b'{"file":' * 300 + b"1" + b"}" * 300, b"\xff\xfe", b"[" * 400])
def test_hostile_lines_do_not_count(tmp_path: Path, line: bytes) -> None:
    with Target.open(tmp_path, {"a": 1}):
        pass
    journal = tmp_path / WORK_FOLDER / "journal.jsonl"
    journal.write_bytes(journal.read_bytes() + line + b"\n")
    with Target.open(tmp_path, {"a": 1}) as target:
        assert (target.resumed, target.done) == (True, {})


def test_a_journal_without_end_is_refused(tmp_path: Path) -> None:
    with Target.open(tmp_path, {"a": 1}):
        pass
    with (tmp_path / WORK_FOLDER / "journal.jsonl").open("r+b") as stream:
        stream.truncate(20 * 2**30)
    with pytest.raises(TargetError, match="too large"):
        Target.open(tmp_path, {"a": 1})


def test_nan_is_equal_to_itself(tmp_path: Path) -> None:
    identity = {"config": {"x": float("nan")}, "a": 1}
    with Target.open(tmp_path, identity):
        pass
    with Target.open(tmp_path, identity) as target:
        assert target.resumed
    with pytest.raises(ResumeConflictError) as caught:
        Target.open(tmp_path, identity | {"a": 2})
    assert "config" not in str(caught.value)


@pytest.mark.parametrize("value", [{}, {"file": "a", "nbytes": 1}, {"x": float("nan"), "é": ["\ud800", 1e-300, None]}])
def test_a_line_gives_back_its_object(value: dict[str, Any]) -> None:
    line = to_line(value)
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    assert repr(read_line(line).value) == repr(dict(sorted(value.items())))


@given(st.data())
def test_a_line_with_another_byte_is_not_believed(data: st.DataObject) -> None:
    line = bytearray(to_line(ENTRY))
    place = data.draw(st.integers(0, len(line) - 2))
    line[place] ^= data.draw(st.integers(1, 255))
    found = read_line(bytes(line)).value
    assert found is None or found == ENTRY or JournalEntry.parse(found) is None


def test_a_damaged_line_still_says_what_a_run_must_heed() -> None:
    line = to_line(ENTRY | {"identity": {"a": 1}, "verdict": "wrong", "layers": [1]})
    damaged = line.replace(b'"crc32": [1]', b'"crc32": [2]')
    assert damaged != line
    assert read_line(damaged).value == {"file": "a", "identity": {"a": 1}, "verdict": "wrong"}


def test_a_file_whose_line_was_damaged_is_made_again(
    sample_source: Path, sample_prepared: Path, tmp_path: Path
) -> None:
    """A CRC-32 of an expert in the journal goes into the manifest: one wrong digit would call right bytes wrong."""
    out = tmp_path / "out"
    journal = interrupt(sample_source, out)
    text = journal.read_text()
    damaged = re.sub(r'("crc32": \[\d*)(\d)(?=[],])', lambda found: f"{found[1]}{(int(found[2]) + 1) % 10}", text)
    assert damaged != text
    journal.write_text(damaged)
    result = convert(sample_source, out, smoke=None)
    assert result.resumed
    assert result.written_nbytes > 0
    assert file_digests(out) == file_digests(sample_prepared)
