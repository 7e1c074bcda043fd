"""Edits of config.json: named exactly, kept by restamp, and never the stamp's."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from nvfp4_prep import convert, convert_part, join_parts, relayout, restamp, restore, verify
from nvfp4_prep.checkpoint.filenames import MANIFEST
from nvfp4_prep.cli.commands import cli
from nvfp4_prep.errors import BusyError, CheckpointError, TargetError, VerificationError
from nvfp4_prep.prepared.config_edits import (
    ConfigEdit,
    apply_edits,
    edits_from_json,
    edits_to_json,
    find_edits,
    same_value,
)
from nvfp4_prep.prepared.manifest import Manifest
from nvfp4_prep.prepared.served_config import STAMP
from support.cases import slow_after

NAN = float("nan")


@pytest.fixture
def copy(sample_prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sample_prepared, tmp_path / "prepared"))


def change(folder: Path, **keys: Any) -> None:
    """Edits keys of the config; a value of ``...`` removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | keys
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}, indent=2))


def test_only_the_formatting(copy: Path) -> None:
    with (copy / "config.json").open("a") as stream:
        stream.write("\n")
    report = verify(copy, quick=True)
    assert [str(problem) for problem in report.problems] == [
        "config.json: was edited; these keys differ: none, only its formatting"
    ]
    assert report.next_step is not None
    assert "nvfp4-prep restamp" in report.next_step
    assert "convert" not in report.next_step
    assert restamp(copy).edits == ()
    assert verify(copy).ok
    assert "config_edits" not in json.loads((copy / MANIFEST).read_text())


def test_edits_are_kept(copy: Path, sample_source: Path, tmp_path: Path) -> None:
    change(copy, rope_scaling={"type": "yarn", "factor": 4.0}, eos_token_id=None, model_type=...)
    report = verify(copy, quick=True)
    assert [str(it) for it in report.problems] == ["config.json: was edited: eos_token_id, model_type, rope_scaling"]
    served = (copy / "config.json").read_bytes()

    result = restamp(copy)
    assert (result.edits, result.written) == (("eos_token_id", "model_type", "rope_scaling"), True)
    assert not restamp(copy).written
    assert (copy / "config.json").read_bytes() == served
    report = verify(copy, source=sample_source)
    assert report.ok
    assert any("eos_token_id, model_type, rope_scaling" in line for line in report.checks)
    assert report.to_dict()["config_edits"] == ["eos_token_id", "model_type", "rope_scaling"]

    back = restore(copy, tmp_path / "back").path
    assert (back / "config.json").read_bytes() == (sample_source / "config.json").read_bytes()
    other = relayout(copy, tmp_path / "other", gate_up_block=16).path
    config = json.loads((other / "config.json").read_text())
    assert config["rope_scaling"] == {"type": "yarn", "factor": 4.0}
    assert config["quantization_config"]["layout"]["gate_up_block"] == 16
    assert config["eos_token_id"] is None
    assert "model_type" not in config
    assert verify(other, source=sample_source).ok


def test_an_edit_after_the_recorded_one_is_named_alone(copy: Path) -> None:
    change(copy, first=1)
    restamp(copy)
    change(copy, second=2)
    assert [problem.what for problem in verify(copy, quick=True).problems] == ["was edited: second"]
    assert restamp(copy).edits == ("first", "second")


def test_a_config_that_was_put_back_loses_its_record(copy: Path, sample_prepared: Path) -> None:
    change(copy, first=1)
    restamp(copy)
    shutil.copy(sample_prepared / "config.json", copy / "config.json")
    assert restamp(copy).edits == ()
    assert (copy / MANIFEST).read_bytes() == (sample_prepared / MANIFEST).read_bytes()


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda it: it["quantization_config"]["layout"].update(gate_up_block=16), "quantization_config.layout.gate_up"),
        (lambda it: it["quantization_config"]["source"].update(more=1), "quantization_config.source.more"),
        (lambda it: it["quantization_config"].update(producer={"name": "modelopt"}), "quantization_config.producer"),
        (lambda it: it["quantization_config"].pop("format_version"), "quantization_config.format_version"),
        (lambda it: it["quantization_config"].update(format_version=True), "quantization_config.format_version"),
        (lambda it: it.update(quantization_config=5), "quantization_config"),
        (lambda it: it.pop("quantization_config"), "quantization_config"),
        (lambda it: it.update(text_config={"quantization_config": {}}), "text_config"),
        (lambda it: it.update(compression_config={}), "compression_config"),
    ],
)
def test_the_stamp_stays(copy: Path, edit: Callable[[Any], object], named: str) -> None:
    config = json.loads((copy / "config.json").read_text())
    edit(config)
    (copy / "config.json").write_text(json.dumps(config))
    before = (copy / MANIFEST).read_bytes()
    report = verify(copy, quick=True)
    assert report.problems[0].what.startswith(f"its stamp was edited: {named}")
    assert report.next_step == STAMP
    with pytest.raises(VerificationError, match=f"config.json: its stamp was edited: {named}"):
        restamp(copy)
    assert (copy / MANIFEST).read_bytes() == before


EVIL = "evil/repo--modeling_evil.Evil"


@pytest.mark.parametrize("recorded", [False, True], ids=["plain", "recorded"])
@pytest.mark.parametrize(
    ("edit", "named"),
    [
        ({"auto_map": {"AutoModel": EVIL}}, "auto_map"),
        ({"auto_map": None}, "auto_map"),
        ({"text_config": {"auto_map": {"AutoConfig": EVIL}}}, "text_config"),
        ({"parts": [{"auto_map": {"AutoConfig": EVIL}}]}, "parts"),
        ({"custom_pipelines": {"a": {"impl": "evil.Pipeline"}}}, "custom_pipelines"),
    ],
)
@pytest.mark.slow
def test_code_is_no_edit_to_keep(
    copy: Path, sample_source: Path, tmp_path: Path, edit: dict[str, Any], named: str, recorded: bool
) -> None:
    change(copy, eos_token_id=7, **edit)
    if recorded:  # by somebody else: the manifest is as restamp would have written it
        manifest, data = json.loads((copy / MANIFEST).read_text()), (copy / "config.json").read_bytes()
        manifest["config_edits"] = [{"path": [key], "value": value} for key, value in edit.items()]
        manifest["config_edits"].append({"path": ["eos_token_id"], "value": 7})
        manifest["files"]["config.json"] |= {"nbytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (copy / MANIFEST).write_text(json.dumps(manifest))
    before = (copy / MANIFEST).read_bytes()
    for source in (None, sample_source):
        report = verify(copy, source=source, quick=True)
        assert report.problems[0].what == f"was edited to load code: {named}"
        assert report.next_step is not None and report.next_step.startswith("It names code that the source does not")
        assert ("restamp" in report.next_step) == (not recorded)  # for the EOS token
    assert CliRunner().invoke(cli, ["verify", str(copy), "--source", str(sample_source)]).exit_code == 6
    with pytest.raises(VerificationError, match=f"config.json: was edited to load code: {named}"):
        restamp(copy)
    with pytest.raises(VerificationError, match="was edited to load code"):
        relayout(copy, tmp_path / "other", gate_up_block=16)
    assert (copy / MANIFEST).read_bytes() == before


def test_code_of_the_source_may_be_removed_but_not_changed(sample_source: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(sample_source, tmp_path / "source"))
    own = {"AutoConfig": "configuration_own.Own", "AutoModel": "modeling_own.Own"}
    change(source, auto_map=own)
    out = convert(source, tmp_path / "out").path
    assert verify(out, source=source).ok
    change(out, auto_map=own | {"AutoModel": EVIL})
    assert verify(out, quick=True).problems[0].what == "was edited to load code: auto_map.AutoModel"
    change(out, auto_map={"AutoConfig": own["AutoConfig"]})
    assert restamp(out).edits == ("auto_map.AutoModel",)
    change(out, auto_map=...)
    assert restamp(out).edits == ("auto_map",)
    assert verify(out, source=source).ok


@pytest.mark.parametrize("where", [("quantization_config",), ("quantization_config", "layout")])
def test_keys_of_a_later_version_in_the_stamp(copy: Path, where: tuple[str, ...]) -> None:
    config = part = json.loads((copy / "config.json").read_text())
    for key in where:
        part = part[key]
    part["later"] = {"anything": 1}
    (copy / "config.json").write_text(json.dumps(config))
    restamp(copy)
    assert verify(copy, quick=True).ok


@pytest.mark.slow
@pytest.mark.parametrize(
    "where",
    slow_after(
        2, [((),), (("layers", 1, "activation"),), (("source",),), (("tool",),), (("layers", 0),), (("options",),)]
    ),
)
def test_keys_of_a_later_version_in_the_manifest(copy: Path, tmp_path: Path, where: tuple[Any, ...]) -> None:
    manifest = part = json.loads((copy / MANIFEST).read_text())
    for key in where:
        part = part[key]
    part["later"] = [1, {"anything": NAN}]
    (copy / MANIFEST).write_text(json.dumps(manifest))
    assert verify(copy).ok
    restore(copy, tmp_path / "back")
    relayout(copy, tmp_path / "other", gate_up_block=16)
    change(copy, eos_token_id=7)
    restamp(copy)
    kept: Any = json.loads((copy / MANIFEST).read_text())
    for key in where:
        kept = kept[key]
    assert "later" in kept


@pytest.mark.parametrize("damage", ["missing", "unlisted", "card"])
def test_other_damage_is_not_restamped(copy: Path, damage: str) -> None:
    change(copy, eos_token_id=7)
    if damage == "missing":
        (copy / "expert-scales.safetensors").unlink()
    else:
        (copy / ("modeling.py" if damage == "unlisted" else "README.md")).write_text("x")
    with pytest.raises(VerificationError, match=f"{copy}: is damaged: "):
        restamp(copy)


def test_a_manifest_that_is_a_link(copy: Path, tmp_path: Path) -> None:
    change(copy, eos_token_id=7)
    (copy / MANIFEST).rename(copy / "kept.json")
    (copy / MANIFEST).symlink_to("kept.json")
    (copy / "kept.json").rename(copy / ".kept.json")
    (copy / MANIFEST).unlink()
    (copy / MANIFEST).symlink_to(".kept.json")
    with pytest.raises(TargetError, match="is a symbolic link"):
        restamp(copy)


@pytest.mark.parametrize("leftover", ["file", "link", "folder", "fifo", "busy"])
def test_what_stands_in_the_place_of_the_new_manifest(copy: Path, tmp_path: Path, leftover: str) -> None:
    new, outside = copy / f".{MANIFEST}.new", tmp_path / "outside"
    outside.write_text("theirs")
    change(copy, eos_token_id=7)
    before = (copy / MANIFEST).read_bytes()
    if leftover in ("file", "busy"):
        new.write_text("x" * 1_000_000)
    elif leftover == "link":
        new.symlink_to(outside)
    elif leftover == "folder":
        new.mkdir()
    else:
        os.mkfifo(new)
    if leftover == "file":
        restamp(copy)
        assert verify(copy, quick=True).ok
        assert not new.exists()
        return
    with new.open("r") if leftover == "busy" else outside.open() as stream:
        if leftover == "busy":
            fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(BusyError if leftover == "busy" else TargetError):
            restamp(copy)
    assert (copy / MANIFEST).read_bytes() == before
    assert outside.read_text() == "theirs"


@pytest.mark.parametrize("call", ["fsync", "ftruncate", "fchmod"])
def test_a_disk_that_fails_leaves_the_old_manifest(copy: Path, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change(copy, eos_token_id=7)
    before = (copy / MANIFEST).read_bytes()

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(TargetError):
        restamp(copy)
    assert (copy / MANIFEST).read_bytes() == before
    assert not (copy / f".{MANIFEST}.new").exists()
    monkeypatch.undo()
    assert restamp(copy).written


@pytest.mark.parametrize(
    "edits",
    [
        5,
        {"rope_scaling": 1},
        [{"path": [], "value": 1}],
        [{"path": ["a"]}],
        [{"path": ["a"], "value": 1, "removed": True}],
        [{"path": [1], "value": 1}],
        [{"path": ["a"], "removed": "yes"}],
        [{"path": ["a"] * 2000, "value": 1}],
        [{"path": ["quantization_config", "layout"], "value": 1}],
        [{"path": ["text_config"], "value": {"x": {"quantization_config": {}}}}],
    ],
)
def test_forged_records(copy: Path, edits: object) -> None:
    manifest = json.loads((copy / MANIFEST).read_text()) | {"config_edits": edits}
    with pytest.raises(CheckpointError, match="malformed"):
        Manifest.from_bytes(json.dumps(manifest).encode())


def test_edits_round_trip() -> None:
    before = {"a": {"b": 1, "c": [1, 2]}, "d": 1, "n": NAN, "t": True, "gone": {"x": 1}}
    after = {"a": {"b": None, "c": [2]}, "d": 1.0, "n": NAN, "t": 1, "new": {"y": {}}}
    edits = find_edits(before, after)
    assert [edit.name for edit in edits] == ["a.b", "a.c", "d", "gone", "new", "t"]
    assert same_value(apply_edits(before, edits_from_json(json.loads(json.dumps(edits_to_json(edits))))), after)
    assert before["a"] == {"b": 1, "c": [1, 2]}
    assert ConfigEdit(("a", "b")).name == "a.b"


@pytest.mark.parametrize("command", ["restore", "relayout --gate-up-block 16", "convert"])
@pytest.mark.slow
def test_what_works_on_it_says_the_same(copy: Path, sample_source: Path, tmp_path: Path, command: str) -> None:
    """No command calls an edited config damage that only another conversion would mend."""
    change(copy, eos_token_id=7)
    name, *options = command.split()
    paths = [sample_source, copy] if name == "convert" else [copy, tmp_path / "out"]
    result = CliRunner().invoke(cli, [name, *map(str, paths), *options])
    assert result.exit_code == 6
    assert "config.json: was edited: eos_token_id" in result.stderr
    assert "nvfp4-prep restamp" in result.stderr
    assert "convert again" not in result.stderr
    restamp(copy)
    assert CliRunner().invoke(cli, [name, *map(str, paths), *options]).exit_code == 0


def test_command(copy: Path) -> None:
    change(copy, eos_token_id=7)
    verified = CliRunner().invoke(cli, ["verify", str(copy), "--quick"])
    assert verified.exit_code == 6
    assert "WRONG config.json: was edited: eos_token_id" in verified.output
    assert "nvfp4-prep restamp" in verified.output
    assert "convert again" not in verified.output
    result = CliRunner().invoke(cli, ["restamp", str(copy)])
    assert result.exit_code == 0
    assert "config.json differs from what was converted in eos_token_id; recorded in nvfp4_prep.json" in result.output
    made = json.loads(CliRunner().invoke(cli, ["restamp", str(copy), "--json"]).output)
    assert made.items() >= {"path": str(copy), "config_edits": ["eos_token_id"], "written": False}.items()
    verified = CliRunner().invoke(cli, ["verify", str(copy), "--quick"])
    assert verified.exit_code == 0
    assert "edited since the conversion, as the manifest records: eos_token_id" in verified.output


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("n_routed_experts", 400, "was edited against the tensors"),
        ("hidden_act", "gelu", "another activation"),
        ("swiglu_limit", 7.0, "another activation.*clamped at 7"),
    ],
)
@pytest.mark.slow
def test_an_edit_that_contradicts_the_tensors_is_not_recorded(
    sample_source: Path, tmp_path: Path, key: str, value: object, words: str
) -> None:
    """Convert refuses a source with such a config, so nothing may make a prepared checkpoint of one."""
    out = tmp_path / "out"
    convert(sample_source, out, smoke=None)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(VerificationError, match=words):
        restamp(out)
    (out / "config.json").write_text(json.dumps({**config, "hidden_act": "silu", "max_position_embeddings": 7}))
    assert restamp(out).written


def make_by(command: str, source: Path, prepared: Path, out: Path) -> Any:
    """The result of a command that makes ``out``, run whole."""
    if command == "convert":
        return convert(source, out, smoke=None)
    if command == "relayout":
        return relayout(prepared, out, gate_up_block=16)
    if not out.exists():
        convert_part(source, out, "1/1")
    return join_parts(source, out, smoke=None)


@pytest.mark.parametrize("command", ["convert", "join", "relayout"])
@pytest.mark.slow
def test_a_restamped_output_is_complete_to_the_command_that_made_it(
    sample_source: Path, sample_prepared: Path, tmp_path: Path, command: str
) -> None:
    out = tmp_path / "out"
    make_by(command, sample_source, sample_prepared, out)
    change(out, bos_token_id=7)
    before = (out / "config.json").read_bytes()
    with pytest.raises(VerificationError, match=r"but damaged: config\.json: was edited: bos_token_id") as caught:
        make_by(command, sample_source, sample_prepared, out)
    assert "nvfp4-prep restamp" in (caught.value.next_step or "")
    restamp(out)
    assert make_by(command, sample_source, sample_prepared, out).already_complete
    assert (out / "config.json").read_bytes() == before
    change(out, bos_token_id=...)
    restamp(out)
    assert make_by(command, sample_source, sample_prepared, out).already_complete


def test_restore_is_complete_whatever_was_restamped(copy: Path, tmp_path: Path) -> None:
    """Edits do not go into the source's own config."""
    restore(copy, tmp_path / "back")
    change(copy, bos_token_id=7)
    restamp(copy)
    assert restore(copy, tmp_path / "back").already_complete


def test_a_repeated_relayout_says_which_edits_differ(copy: Path, tmp_path: Path) -> None:
    """Whether the checkpoint or the output was edited since then, nothing tells: neither is passed over in silence."""
    words = ["relayout", str(copy), str(tmp_path / "out"), "--gate-up-block", "16", "-q"]
    assert CliRunner().invoke(cli, words).exit_code == 0
    change(copy, bos_token_id=7)
    restamp(copy)
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0 and "was complete already" in done.stdout
    assert "differs from" in done.stderr and "in recorded edits: bos_token_id." in done.stderr
    change(tmp_path / "out", bos_token_id=7)
    restamp(tmp_path / "out")
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0 and "recorded edits" not in done.stderr


def test_a_damaged_output_of_relayout_is_told_as_one(sample_prepared: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    relayout(sample_prepared, out, gate_up_block=16)
    name = "model-00001-of-00003.safetensors"
    (out / name).write_bytes(b"{}")
    with pytest.raises(VerificationError, match=f"but damaged: {name}: has the wrong size") as caught:
        relayout(sample_prepared, out, gate_up_block=16)
    assert f"Copy or download {name} again" in (caught.value.next_step or "")
    shutil.copy(sample_prepared / name, out)
    assert relayout(sample_prepared, out, gate_up_block=16).already_complete
