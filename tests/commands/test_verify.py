"""Verify must notice: every kind of damage to a prepared checkpoint, at the right depth, by name."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nvfp4_prep import SampleModel, convert, inspect, restore, verify, write_sample
from nvfp4_prep.checkpoint.index import read_index
from nvfp4_prep.checkpoint.local_source import LocalSource
from nvfp4_prep.checkpoint.safetensors_header import read_header
from nvfp4_prep.errors import CheckpointError, SourceError, UnsupportedCheckpointError, UsageError, VerificationError
from support.cases import slow_after

LAYER = "experts-layer-00001.safetensors"
PREFIX = "model.layers.1.mlp.experts.routed_experts"


@pytest.fixture
def copy(sample_prepared: Path, tmp_path: Path) -> Path:
    """A prepared checkpoint to damage."""
    return Path(shutil.copytree(sample_prepared, tmp_path / "prepared"))


def place(folder: Path, tensor: str) -> tuple[int, int, tuple[int, ...]]:
    """Offset, size and shape of a tensor of the first layer."""
    record = next(r for r in read_header(folder / LAYER).tensors if r.name == f"{PREFIX}.{tensor}")
    return record.offset_bytes, record.nbytes, record.shape


def edit(path: Path, change: Callable[[bytearray], None]) -> None:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def reseal(folder: Path) -> None:
    """Makes the manifest agree with the files again, as a forger would: only the transform's inverse can object."""
    manifest = json.loads((folder / "nvfp4_prep.json").read_text())
    for name, file in manifest["files"].items():
        data = (folder / name).read_bytes()
        file["sha256"], file["nbytes"] = hashlib.sha256(data).hexdigest(), len(data)
    (folder / "nvfp4_prep.json").write_text(json.dumps(manifest))


def forge(folder: Path, where: tuple[Any, ...], key: str, value: object) -> None:
    """Changes one value of the manifest."""
    path = folder / "nvfp4_prep.json"
    manifest = part = json.loads(path.read_text())
    for step in where:
        part = part[step]
    part[key] = value
    path.write_text(json.dumps(manifest))


def problems(folder: Path, **options: Any) -> str:
    report = verify(folder, **options)
    assert not report.ok
    with pytest.raises(VerificationError):
        report.raise_for_problems()
    return "\n".join(map(str, report.problems))


def test_good_checkpoint(sample_source: Path, sample_prepared: Path) -> None:
    report = verify(sample_prepared, source=sample_source)
    assert report.ok
    assert report.depth == "full with source"
    assert report.checked_nbytes > sum(path.stat().st_size for path in sample_prepared.glob("*.safetensors"))
    report.raise_for_problems()
    assert verify(sample_prepared, quick=True).depth == "quick"


@pytest.mark.parametrize("tensor", ["w13_weight", "w13_weight_scale", "w2_weight", "w2_weight_scale"])
@pytest.mark.parametrize("resealed", [False, True])
def test_flipped_bit(copy: Path, tensor: str, resealed: bool) -> None:
    offset, _, shape = place(copy, tensor)

    def flip(data: bytearray) -> None:
        data[offset + 2 * shape[1] * shape[2] + 5] ^= 0x10

    edit(copy / LAYER, flip)
    if resealed:
        reseal(copy)
    found = problems(copy)
    assert f"{PREFIX}.{tensor}, expert 2" in found
    assert ("sha256" in found.split(LAYER + ": ")[-1].split("\n")[0]) or resealed
    assert "the inverse transform does not give the source's tensors" in found


def test_nonzero_padding(copy: Path) -> None:
    offset, _, shape = place(copy, "w2_weight")

    def fill(data: bytearray) -> None:
        data[offset + shape[1] * shape[2] - 1] = 1  # last row of the first expert: H 336 is padded to 512

    edit(copy / LAYER, fill)
    reseal(copy)
    assert "is not zero" in problems(copy)


def test_swapped_experts(copy: Path) -> None:
    def swap(data: bytearray) -> None:
        for tensor in ("w13_weight", "w13_weight_scale", "w2_weight", "w2_weight_scale"):
            offset, _, shape = place(copy, tensor)
            size = shape[1] * shape[2]
            first, second = data[offset : offset + size], data[offset + size : offset + 2 * size]
            data[offset : offset + 2 * size] = second + first

    edit(copy / LAYER, swap)
    reseal(copy)
    found = problems(copy)
    assert "expert 0" in found
    assert "expert 1" in found


def test_swapped_gate_and_up(copy: Path) -> None:
    offset, _, shape = place(copy, "w13_weight")

    def swap(data: bytearray) -> None:
        block = 64 * shape[2]
        up, gate = data[offset : offset + block], data[offset + block : offset + 2 * block]
        data[offset : offset + 2 * block] = gate + up

    edit(copy / LAYER, swap)
    reseal(copy)
    found = problems(copy)
    assert "gate_proj.weight" in found
    assert "up_proj.weight" in found


def test_one_damage_is_one_problem(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"hidden_size": 7}))
    assert problems(copy) == problems(copy, quick=True)
    assert problems(copy) == "config.json: was edited: hidden_size"
    (copy / "config.json").unlink()
    assert problems(copy) == problems(copy, quick=True) == "config.json: is missing"


def test_a_digest_of_the_config_that_is_not_its_own(copy: Path) -> None:
    manifest = json.loads((copy / "nvfp4_prep.json").read_text())
    manifest["files"]["config.json"]["sha256"] = "0" * 64
    (copy / "nvfp4_prep.json").write_text(json.dumps(manifest))
    assert "nvfp4_prep.json: has another size or digest of config.json" in problems(copy, quick=True)


def test_what_may_not_be_read_or_is_not_there_is_no_damage(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SourceError, match="nowhere: does not exist") as caught:
        verify(copy / "nowhere")
    assert caught.value.exit_code == 3

    def refuse(self: LocalSource, name: str) -> None:
        raise SourceError("cannot be read (Permission denied)", where=name) from PermissionError(13, "denied")

    monkeypatch.setattr(LocalSource, "header", refuse)
    with pytest.raises(SourceError, match="Permission denied"):
        verify(copy)


@pytest.mark.parametrize("name", ["x" * 300, "x" * 5000, "a\0b"])
def test_paths_that_no_file_system_has(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="argument checkpoint is wrong"):
        verify(tmp_path / name)


def test_short_reprs(sample_prepared: Path) -> None:
    report = verify(sample_prepared, quick=True)
    assert repr(report).startswith(f"<VerifyReport of '{sample_prepared}': ok, quick, ")
    assert repr(report.manifest).startswith("<Manifest of 'source': 2 layers, ")
    assert len(repr(report)) < 500
    assert len(repr(report.manifest)) < 300
    assert all(len(repr(layer)) < 600 for layer in report.manifest.layers)


def test_quick_with_source(sample_source: Path, sample_prepared: Path) -> None:
    report = verify(sample_prepared, source=sample_source, quick=True)
    assert report.depth == "quick with source"
    assert any(check.startswith("source: names of all tensors") for check in report.checks)


def test_missing_file(copy: Path) -> None:
    (copy / LAYER).unlink()
    assert f"{LAYER}: is missing" in problems(copy, quick=True)
    assert f"{LAYER}: is missing" in problems(copy)


def test_truncated_file(copy: Path) -> None:
    edit(copy / LAYER, lambda data: data.__delitem__(slice(-4096, None)))
    assert "has the wrong size" in problems(copy, quick=True)
    assert len(problems(copy).splitlines()) == 1


def test_file_of_another_conversion(sample_prepared: Path, copy: Path, tmp_path: Path) -> None:
    """Same dimensions, other weights: sizes and headers agree, bytes do not."""
    model = SampleModel(experts=5, intermediate=96, hidden=336, shard_nbytes=200_000, differing=0.5, seed=4)
    write_sample(tmp_path / "other", model)
    other = convert(tmp_path / "other", tmp_path / "other-out").path
    shutil.copy(other / LAYER, copy / LAYER)
    assert verify(copy, quick=True).ok
    assert LAYER in problems(copy)
    reseal(copy)
    assert "the inverse transform" in problems(copy)


def test_foreign_files(copy: Path) -> None:
    shutil.copy(copy / LAYER, copy / "experts-layer-00009.safetensors")
    assert "experts-layer-00009.safetensors: does not belong" in problems(copy, quick=True)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda config: config.update(hidden_size=7), "hidden_size"),
        (lambda config: config["quantization_config"]["layout"].update(gate_up_block=16), "layout.gate_up_block"),
        (lambda config: config["quantization_config"]["source"].update(quant_algo="FP8"), "source.quant_algo"),
        (lambda config: config.pop("model_type"), "model_type"),
    ],
)
def test_edited_config(copy: Path, change: Callable[[dict[str, Any]], None], named: str) -> None:
    config = json.loads((copy / "config.json").read_text())
    change(config)
    (copy / "config.json").write_text(json.dumps(config, indent=2))
    reseal(copy)
    assert named in problems(copy, quick=True)


def test_edited_index(copy: Path) -> None:
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    index["weight_map"].pop(f"{PREFIX}.w2_weight")
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    reseal(copy)
    assert f"{PREFIX}.w2_weight" in problems(copy, quick=True)


@pytest.mark.parametrize("vector", ["w13_weight_scale_2", "w2_weight_scale_2", "w13_input_scale", "w2_input_scale"])
def test_changed_scale_vector(copy: Path, vector: str) -> None:
    path = copy / "expert-scales.safetensors"
    record = next(r for r in read_header(path).tensors if r.name == f"{PREFIX}.{vector}")

    def change(data: bytearray) -> None:
        data[record.offset_bytes] ^= 1

    edit(path, change)
    reseal(copy)
    assert f"{PREFIX}.{vector}: does not follow from the source's scalars" in problems(copy)


def test_changed_kept_scalars(copy: Path) -> None:
    path = copy / "source-scales.safetensors"
    record = read_header(path).tensors[0]

    def change(data: bytearray) -> None:
        data[record.offset_bytes] ^= 1

    edit(path, change)
    reseal(copy)
    assert "the kept source scalars changed" in problems(copy)


def test_changed_kept_block_scales(copy: Path) -> None:
    path = next(copy.glob("source-block-scales-layer-*.safetensors"))
    record = read_header(path).tensors[0]

    def change(data: bytearray) -> None:
        data[record.offset_bytes] ^= 0x08

    edit(path, change)
    reseal(copy)
    found = problems(copy)
    assert "do not follow from the source's" in found or "the inverse transform" in found


def test_changed_passed_through_tensor_is_found_with_the_source(sample_source: Path, copy: Path) -> None:
    path = copy / "model-00001-of-00003.safetensors"
    if not path.exists():
        path = sorted(copy.glob("model-0*.safetensors"))[0]
    record = read_header(path).tensors[0]

    def change(data: bytearray) -> None:
        data[record.offset_bytes] ^= 1

    edit(path, change)
    reseal(copy)
    assert verify(copy).ok  # the manifest was forged: only the source can tell
    assert f"{record.name}: differs from the source from byte 0" in problems(copy, source=sample_source)


def test_another_source(copy: Path, tmp_path: Path) -> None:
    model = SampleModel(experts=5, intermediate=96, hidden=336, shard_nbytes=200_000, differing=0.5, seed=4)
    write_sample(tmp_path / "other", model)
    report = verify(copy, source=tmp_path / "other")
    assert len(report.problems) == 1  # one cause is one line, whatever follows from it
    tensors = len(read_index(LocalSource(tmp_path / "other")).tensors)
    assert report.problems[0].where == str(tmp_path / "other")
    assert report.problems[0].what.startswith(f"is not the source of {copy}: {tensors} of {tensors} tensors differ")
    assert report.next_step is not None
    assert report.next_step.startswith("Give the source that the manifest names, 'source'. If this is it,")


def test_a_source_with_other_names(copy: Path, tmp_path: Path) -> None:
    write_sample(tmp_path / "other", SampleModel(experts=3))
    found = problems(copy, source=tmp_path / "other", quick=True)
    assert found.startswith(f"{tmp_path / 'other'}: is not the source of {copy}: ")
    assert len(found.splitlines()) == 1


def test_manifest_that_lies(copy: Path) -> None:
    path = copy / "nvfp4_prep.json"
    manifest = json.loads(path.read_text())
    manifest["layers"][0]["experts"] = 4
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError):
        verify(copy)
    path.write_text("{}")
    with pytest.raises(CheckpointError, match="not a manifest"):
        verify(copy)
    manifest["format_version"] = 99
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="format_version 1"):
        verify(copy)


def test_what_is_no_prepared_checkpoint(sample_source: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a prepared checkpoint"):
        verify(sample_source)
    with pytest.raises((CheckpointError, SourceError)):
        verify(tmp_path / "nowhere")
    (tmp_path / ".nvfp4_prep").mkdir()
    with pytest.raises(CheckpointError, match="unfinished"):
        verify(tmp_path)


@pytest.mark.parametrize(
    ("where", "key", "value", "told"),
    [
        ((), "tp_sizes", [1, 2, 4, 8, 16], "tp_sizes does not follow"),
        (("source",), "quantization", {}, "quantization configs"),
        (("layers", 0), "padded_hidden", 8192, "layers.0.padded_hidden does not follow"),
        (("layers", 0, "activation"), "kind", "swigluoai", "activation of"),
        (("layers", 0, "activation"), "clamp", 7.0, "activation of"),
        (("layers", 0, "gate_up_scales"), "differing", 77, "how many differ"),
        (("layers", 0, "gate_up_scales"), "worst_ratio", 1.5, "worst ratio"),
        (("options",), "gate_up_scales", "vllm", "reconciled experts"),
    ],
)
def test_forged_manifest(copy: Path, where: tuple[Any, ...], key: str, value: object, told: str) -> None:
    """Values that follow from others are worked out again, so that no lie passes that files and configs contradict."""
    forge(copy, where, key, value)
    assert told in problems(copy, quick=True)


def test_groups_whose_tensors_would_have_one_name(copy: Path) -> None:
    """Two layers that claim the same source tensors: each alone is consistent."""
    manifest = json.loads((copy / "nvfp4_prep.json").read_text())
    for one, other in zip(*(layer["source_tensors"] for layer in manifest["layers"][:2]), strict=True):
        if one["leaf"] in ("codes", "block_scale"):
            other["head"] = one["head"]
    (copy / "nvfp4_prep.json").write_text(json.dumps(manifest))
    assert "occurs twice" in problems(copy, quick=True)


def test_layer_under_another_number(copy: Path) -> None:
    forge(copy, ("layers", 0), "layer", 9)
    assert "number of model.layers.1.mlp.experts" in problems(copy, quick=True)


@pytest.mark.parametrize(
    ("where", "key", "value"),
    [
        (("layers", 0, "expert_crc32"), "w2_weight", None),
        (("layers", 0), "expert_crc32", {}),
        (("layers", 0, "source_tensors", 0), "projections", []),
        (("layers", 0, "source_tensors", 0), "projections", ["up"]),
        (("layers", 0, "source_tensors", 0), "dtype", "F16"),
        (("layers", 0, "source_tensors", 0), "shape", [96, 169]),
        (("layers", 0, "source_tensors", 0), "head", "\ud800"),
        (("layers", 0, "source_tensors", 2), "shape", [10**9]),
        (("layers", 0, "gate_up_scales"), "reconciled", [[0, "down"]]),
        (("layers", 0, "gate_up_scales"), "reconciled", [[99, "up"]]),
        (("layers", 0, "gate_up_scales", "figures"), "rounded", "many"),
        (("layers", 0, "gate_up_scales", "figures"), "worst_relative", [1]),
        (("layers", 0, "gate_up_scales", "figures"), "relative_error", {"vllm": 0.1}),
        (("source", "quantization"), "config.json:quantization_config", "w2"),
    ],
)
def test_manifest_that_cannot_be_worked_with(copy: Path, where: tuple[Any, ...], key: str, value: object) -> None:
    """Whatever a manifest says, the answer is one line, before anything is read by it."""
    forge(copy, where, key, value)
    for command in (verify, inspect, partial(restore, target=copy.parent / "back")):
        with pytest.raises(CheckpointError, match="malformed"):
            command(copy)


def test_format_of_a_package_that_is_not_here(copy: Path) -> None:
    forge(copy, ("layers", 0), "format", "acme")
    for command in (verify, partial(verify, quick=True), partial(restore, target=copy.parent / "back")):
        with pytest.raises(UnsupportedCheckpointError, match=r"'acme', which is not known here.*Install the package"):
            command(copy)
    assert inspect(copy).layers[0].format == "acme"


def test_forged_list_of_passed_through_layers(sample_source: Path, copy: Path) -> None:
    path = copy / "nvfp4_prep.json"
    manifest = json.loads(path.read_text())
    manifest["passed_through_experts"] = {"model.layers.9.mlp.experts": "experts are bf16"}
    path.write_text(json.dumps(manifest))
    assert "pass through" in problems(copy, source=sample_source)


@pytest.mark.parametrize("pattern", ["model-00001-of-*", "experts-layer-00001*", "source-block-scales-layer-00001*"])
def test_missing_file_is_the_only_one_that_is_accused(sample_source: Path, copy: Path, pattern: str) -> None:
    victim = next(copy.glob(pattern))
    victim.unlink()
    report = verify(copy, source=sample_source)
    names = {path.name for path in copy.iterdir()}
    assert (victim.name, "is missing") in [(problem.where, problem.what) for problem in report.problems]
    assert not [problem for problem in report.problems if problem.where in names]


def test_what_was_not_looked_at_is_not_said_to_be(sample_source: Path, copy: Path) -> None:
    whole = verify(copy, source=sample_source).checks
    (copy / LAYER).unlink()
    found = verify(copy, source=sample_source).checks
    assert [line for line in whole if line.startswith("experts: 10 experts")]
    assert [line for line in found if line.startswith("experts: only 5 of 10 experts")]
    compared = [int(next(line for line in lines if "source: " in line).split()[1]) for lines in (whole, found)]
    assert compared == [len(read_index(LocalSource(sample_source)).tensors), compared[0] - 5 * 3 * 2]
    (copy / "source-scales.safetensors").unlink()
    assert [line for line in verify(copy).checks if "vectors of 0 layers" in line]


def test_tensor_that_stands_twice(sample_source: Path, copy: Path) -> None:
    path = sorted(copy.glob("model-0*.safetensors"))[0]
    save_file({**load_file(path), f"{PREFIX}.w2_weight": torch.zeros(4)}, path)
    reseal(copy)
    for source in (None, sample_source):
        assert f"tensor '{PREFIX}.w2_weight' occurs twice" in problems(copy, source=source)


def test_result_of_a_conversion_says_what_was_turned_back_into_what(sample_prepared: Path, tmp_path: Path) -> None:
    """Rescaled block scales turn back into the rescaled ones: the source's are kept beside them."""
    write_sample(tmp_path / "agreeing", SampleModel())
    agreeing = convert(tmp_path / "agreeing", tmp_path / "out").manifest
    assert agreeing.verified[0]["result"].endswith("inverted and compared with the source before it was written")
    rescaled = json.loads((sample_prepared / "nvfp4_prep.json").read_text())
    assert rescaled["verified"][0]["result"].endswith("rescaled block scales with the rescaled ones")


def _remove(path: Path) -> None:
    path.unlink()


def _shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


_LISTED = (
    "tokenizer.json",
    "sub/x.txt",
    "README.md",
    "model.safetensors.index.json",
    LAYER,
    "expert-scales.safetensors",
    "source-scales.safetensors",
    "source-block-scales-layer-00001.safetensors",
)


@pytest.fixture(scope="session")
def with_side_files(sample_source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source with files beside its weights, one in a folder, and its conversion."""
    folder = tmp_path_factory.mktemp("sides")
    source = Path(shutil.copytree(sample_source, folder / "source"))
    (source / "tokenizer.json").write_text("{}")
    (source / "sub").mkdir()
    (source / "sub" / "x.txt").write_text("text")
    return source, convert(source, folder / "prepared").path


@pytest.mark.parametrize("damage", slow_after(1, [_shorten, _remove, _lengthen, _empty, _replace_by_folder]))
@pytest.mark.parametrize("name", _LISTED)
def test_a_damaged_file_is_a_verdict_at_every_depth(
    with_side_files: tuple[Path, Path], tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    source, prepared = with_side_files
    folder = Path(shutil.copytree(prepared, tmp_path / "prepared"))
    damage(folder / name)
    for options in ({}, {"quick": True}, {"source": source}, {"source": source, "quick": True}):
        assert name in [problem.where for problem in verify(folder, **options).problems], options  # type: ignore[arg-type]


def test_a_file_that_the_source_gained_is_missing_in_the_checkpoint(
    with_side_files: tuple[Path, Path], tmp_path: Path
) -> None:
    source = Path(shutil.copytree(with_side_files[0], tmp_path / "source"))
    (source / "added.txt").write_text("hi")
    problem = verify(with_side_files[1], source=source, quick=True).problems[0]
    assert str(problem) == "added.txt: is in the source, but not in the prepared checkpoint"


def test_a_listed_hidden_name_is_not_called_missing(copy: Path) -> None:
    hidden = copy / ".git" / "hooks"
    hidden.mkdir(parents=True)
    (hidden / "post-checkout").write_text("x")
    manifest = json.loads((copy / "nvfp4_prep.json").read_text())
    manifest["files"][".git/hooks/post-checkout"] = {**manifest["files"]["README.md"], "kind": "side"}
    (copy / "nvfp4_prep.json").write_text(json.dumps(manifest))
    said = problems(copy, quick=True)
    assert ".git/hooks/post-checkout: is listed and has a hidden name" in said
    assert "is missing" not in said


def test_a_manifest_that_is_no_file_is_called_so(copy: Path) -> None:
    (copy / "nvfp4_prep.json").unlink()
    (copy / "nvfp4_prep.json").symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match=r"has a nvfp4_prep\.json that is not a regular file"):
        verify(copy)
