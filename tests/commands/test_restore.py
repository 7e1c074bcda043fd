"""Restore gives the source back, whatever was prepared and how."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nvfp4_prep import ConvertOptions, GateUpPolicy, SampleModel, convert, restore, write_sample
from nvfp4_prep.errors import CheckpointError, TargetError, VerificationError
from nvfp4_prep.output.target import Target
from support.checkpoint_files import file_digests, read_tensors


def assert_same(source: Path, back: Path) -> None:
    assert read_tensors(back) == read_tensors(source)
    names = {path.name for path in source.iterdir() if path.suffix != ".safetensors"} - {"model.safetensors.index.json"}
    for name in names:
        assert (back / name).read_bytes() == (source / name).read_bytes()
    weight_map = json.loads((back / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(weight_map) == set(read_tensors(source))


def test_round_trip(sample_source: Path, sample_prepared: Path, tmp_path: Path) -> None:
    result = restore(sample_prepared, tmp_path / "back")
    assert result.tensors == len(read_tensors(sample_source))
    assert_same(sample_source, result.path)


@pytest.mark.slow
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    experts=st.integers(1, 5),
    intermediate=st.integers(1, 12).map(lambda n: 16 * n),
    hidden=st.integers(1, 20).map(lambda n: 16 * n),
    block=st.sampled_from([16, 32, 64]),
    policy=st.sampled_from(list(GateUpPolicy)),
    shard_nbytes=st.integers(3_000, 300_000),
    seed=st.integers(0, 1000),
)
def test_any_sizes_and_options(
    tmp_path_factory: pytest.TempPathFactory,
    experts: int,
    intermediate: int,
    hidden: int,
    block: int,
    policy: GateUpPolicy,
    shard_nbytes: int,
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("any")
    differing = 0.0 if policy is GateUpPolicy.ERROR else 0.5
    model = SampleModel(
        layers=2,
        experts=experts,
        intermediate=intermediate,
        hidden=hidden,
        vocabulary=8,
        shard_nbytes=shard_nbytes,
        differing=differing,
        seed=seed,
    )
    write_sample(folder / "source", model)
    options = ConvertOptions(gate_up_block=block, gate_up_scales=policy)
    convert(folder / "source", folder / "out", options)
    restore(folder / "out", folder / "back")
    assert_same(folder / "source", folder / "back")
    shutil.rmtree(folder)


@pytest.mark.parametrize("moe_tp", [2, 4])
def test_padding_for_a_tensor_parallel_size(tmp_path: Path, moe_tp: int) -> None:
    write_sample(tmp_path / "source", SampleModel(layers=2, experts=3, intermediate=64 * 3, hidden=144))
    convert(tmp_path / "source", tmp_path / "out", ConvertOptions(moe_tp=moe_tp))
    restore(tmp_path / "out", tmp_path / "back")
    assert_same(tmp_path / "source", tmp_path / "back")


def test_restored_checkpoint_converts_to_the_same_bytes(sample_prepared: Path, tmp_path: Path) -> None:
    back = restore(sample_prepared, tmp_path / "source").path
    again = convert(back, tmp_path / "again").path
    before = read_tensors(sample_prepared)
    assert read_tensors(again) == before


def test_restore_is_reproducible_and_refuses_a_used_target(sample_prepared: Path, tmp_path: Path) -> None:
    first = restore(sample_prepared, tmp_path / "one", threads=1).path
    second = restore(sample_prepared, tmp_path / "two", threads=5).path
    assert file_digests(first) == file_digests(second)
    again = restore(sample_prepared, first)
    assert (again.already_complete, again.written_nbytes) == (True, 0)
    (first / "mine").touch()
    with pytest.raises(TargetError, match="not empty"):
        restore(sample_prepared, first)
    with pytest.raises(TargetError):
        restore(sample_prepared, sample_prepared / "back")


def test_damaged_checkpoint_is_not_restored(sample_prepared: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(sample_prepared, tmp_path / "prepared"))
    victim = copy / "experts-layer-00002.safetensors"
    data = bytearray(victim.read_bytes())
    data[-3] ^= 4
    victim.write_bytes(data)
    with pytest.raises(VerificationError, match=rf"^{victim}: expert \d of model\..*_weight_scale: bytes differ from"):
        restore(copy, tmp_path / "back")
    assert not (tmp_path / "back" / "config.json").exists()


@pytest.mark.parametrize("pattern", ["model-00001-of-*.safetensors", "tokenizer.json"])
@pytest.mark.slow
def test_damage_outside_the_experts_is_not_restored(sample_source: Path, tmp_path: Path, pattern: str) -> None:
    """Bytes that are only copied are checked against the manifest too."""
    source = Path(shutil.copytree(sample_source, tmp_path / "source"))
    (source / "tokenizer.json").write_text("{}  ")
    copy = convert(source, tmp_path / "prepared").path
    whole = Path(shutil.copytree(copy, tmp_path / "whole"))
    victim = next(copy.glob(pattern))
    data = bytearray(victim.read_bytes())
    data[-3] ^= 4
    victim.write_bytes(data)
    with pytest.raises(VerificationError, match=rf"^{victim}: bytes changed.*--restart"):
        restore(copy, tmp_path / "back")
    assert not (tmp_path / "back" / "config.json").exists()
    shutil.copy(whole / victim.name, victim)
    assert restore(copy, tmp_path / "back", restart=True).tensors == len(read_tensors(tmp_path / "back"))


HOSTILE_NAMES = [
    "../escaped",
    "{outside}/escaped",
    "d/../../escaped",
    ".nvfp4_prep/journal.jsonl",
    "model-00002-of-00003.safetensors",
    "tokenizer.json",
    "nul\0byte",
]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_a_forged_text_name_writes_nothing(sample_prepared: Path, tmp_path: Path, name: str) -> None:
    """A stranger's manifest must not decide which files restore writes."""
    copy = Path(shutil.copytree(sample_prepared, tmp_path / "prepared"))
    outside = tmp_path / "outside"
    outside.mkdir()
    manifest = json.loads((copy / "nvfp4_prep.json").read_text())
    manifest["source"]["texts"][name.format(outside=outside)] = {"text": "owned"}
    (copy / "nvfp4_prep.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="unexpected source text"):
        restore(copy, tmp_path / "back")
    assert not list(outside.iterdir()) and not (tmp_path / "escaped").exists() and not (tmp_path / "back").exists()


@pytest.mark.parametrize("name", ["../escaped", "/escaped", "d/../../escaped", ".nvfp4_prep/lock", ""])
def test_the_target_itself_refuses_names_that_leave_it(tmp_path: Path, name: str) -> None:
    with Target.open(tmp_path / "out", {"command": "test"}) as target, pytest.raises(TargetError, match="unsafe"):
        target.write_file(name, b"owned")
    assert not (tmp_path / "escaped").exists()


def test_a_side_file_named_like_a_restored_shard_is_refused(sample_prepared: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(sample_prepared, tmp_path / "prepared"))
    manifest = json.loads((copy / "nvfp4_prep.json").read_text())
    count = len(manifest["layers"]) + sum(file["kind"] == "passthrough" for file in manifest["files"].values())
    name = f"model-{count:05d}-of-{count:05d}.safetensors"
    (copy / name).write_bytes(b"owned")
    digest = hashlib.sha256(b"owned").hexdigest()
    manifest["files"][name] = {"nbytes": 5, "sha256": digest, "kind": "side"}
    (copy / "nvfp4_prep.json").write_text(json.dumps(manifest))
    with pytest.raises(VerificationError):
        restore(copy, tmp_path / "back")
    assert not (tmp_path / "back" / "config.json").exists()


def test_a_restore_of_another_checkpoint_is_not_called_complete(tmp_path: Path) -> None:
    """Two quantizations of one model differ in nothing but tensor bytes."""
    for seed in (0, 1):
        write_sample(tmp_path / f"s{seed}", SampleModel(layers=2, experts=2, seed=seed))
        convert(tmp_path / f"s{seed}", tmp_path / f"p{seed}")
    restore(tmp_path / "p0", tmp_path / "back")
    assert restore(tmp_path / "p0", tmp_path / "back").already_complete
    with pytest.raises(TargetError, match="not empty"):
        restore(tmp_path / "p1", tmp_path / "back")
    victim = next((tmp_path / "back").glob("model-00002*"))
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    with pytest.raises(TargetError, match="not empty"):
        restore(tmp_path / "p0", tmp_path / "back")
