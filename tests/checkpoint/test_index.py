"""The index of a checkpoint: shards with and without an index file, and every way in which they can disagree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from nvfp4_prep.checkpoint.index import CheckpointIndex, read_index
from nvfp4_prep.checkpoint.local_source import LocalSource
from nvfp4_prep.errors import SourceError
from support.tiny_checkpoints import TinyLayer, config, merged, others, write


def index(folder: Path) -> CheckpointIndex:
    source = LocalSource(folder)
    try:
        return read_index(source)
    finally:
        source.close()


def set_weight_map(folder: Path, change: dict[str, Any] | None = None, **top: Any) -> None:
    path = folder / "model.safetensors.index.json"
    value = json.loads(path.read_text())
    value["weight_map"] |= change or {}
    path.write_text(json.dumps(value | top))


@pytest.mark.parametrize(("shards", "with_index"), [(1, False), (1, True), (5, True), (5, False)])
def test_every_tensor_is_found_whatever_the_sharding(tmp_path: Path, shards: int, with_index: bool) -> None:
    tensors = merged([TinyLayer().tensors(), others()])
    found = index(write(tmp_path, tensors, shards=shards, index=with_index))
    assert found.tensors.keys() == tensors.keys()
    assert len(found.headers) == shards
    for name, tensor in tensors.items():
        assert found.tensors[name].shape == tuple(tensor.shape)


def test_other_files_are_sorted_by_what_becomes_of_them(tmp_path: Path) -> None:
    write(tmp_path, TinyLayer().tensors(), index=True)
    for name in ("tokenizer.json", "README.md", "hf_quant_config.json", "pytorch_model.bin", "extra.safetensors"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "modeling.py").write_text("")
    (tmp_path / ".gitattributes").write_text("")
    found = index(tmp_path)
    assert [file.name for file in found.side_files] == ["code/modeling.py", "tokenizer.json"]
    assert found.left_out == {"extra.safetensors": "not in the index", "pytorch_model.bin": "not safetensors"}
    assert found.hf_quant_config == {}
    assert set(found.texts) == {"config.json", "hf_quant_config.json", "README.md", "model.safetensors.index.json"}


def test_consolidated_shards_without_an_index_are_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config()))
    save_file(TinyLayer("layers.0.experts", names=("w1", "w3", "w2")).tensors(), tmp_path / "consolidated.safetensors")
    assert len(index(tmp_path).tensors) == 3 * 3 * 4


def test_no_config(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(SourceError, match=r"has no config\.json"):
        index(tmp_path)


def test_no_shards(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SourceError, match="no safetensors files"):
        index(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": ' + "[" * 100_000, "\ufeff{}"])
def test_broken_config(tmp_path: Path, text: str) -> None:
    write(tmp_path, TinyLayer().tensors())
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(SourceError, match=r"config\.json"):
        index(tmp_path)


def test_index_names_missing_files(tmp_path: Path) -> None:
    write(tmp_path, TinyLayer().tensors(), shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(SourceError, match=r"names 1 of 3 files that do not exist: model-00002-of-00003\.safetensors"):
        index(tmp_path)


@pytest.mark.parametrize(
    "shard",
    [
        "../model.safetensors",
        "/etc/passwd",
        "a/../../b.safetensors",
        "sub/m.safetensors",
        "..",
        ".",
        "",
        7,
        None,
        "a\\b",
    ],
)
def test_unsafe_names_in_the_weight_map(tmp_path: Path, shard: object) -> None:
    write(tmp_path, TinyLayer().tensors(), index=True)
    set_weight_map(tmp_path, {"model.norm.weight": shard})
    with pytest.raises(SourceError, match=r"unsafe file name for tensor 'model\.norm\.weight'"):
        index(tmp_path)


@pytest.mark.parametrize("weight_map", [None, {}, [], "x"])
def test_no_weight_map(tmp_path: Path, weight_map: object) -> None:
    write(tmp_path, TinyLayer().tensors(), index=True)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(SourceError, match="has no weight_map"):
        index(tmp_path)


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    tensors = TinyLayer().tensors()
    write(tmp_path, tensors, shards=2)
    name = next(iter(tensors))
    save_file({name: tensors[name], "other": torch.ones(1)}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(SourceError, match=rf"tensor '{name}' is in two shards"):
        index(tmp_path)


def test_index_and_shards_of_different_downloads(tmp_path: Path) -> None:
    write(tmp_path, TinyLayer().tensors(), shards=2)
    name = next(iter(TinyLayer().tensors()))
    set_weight_map(tmp_path, {name: "model-00002-of-00002.safetensors"})
    with pytest.raises(SourceError, match=rf"tensor '{name}' is not where the index says") as caught:
        index(tmp_path)
    assert "download" not in str(caught.value)


def test_index_that_lists_what_nobody_holds_is_a_warning(tmp_path: Path) -> None:
    """Published so, and served by vLLM, which reads what the shards hold."""
    write(tmp_path, TinyLayer().tensors(), index=True)
    set_weight_map(tmp_path, {f"model.layers.{n}.eh_proj.weight": "model.safetensors" for n in range(5)})
    found = index(tmp_path)
    assert found.tensors.keys() == TinyLayer().tensors().keys()
    (warning,) = found.warnings
    assert "lists 5 tensors that no file holds ('model.layers.0.eh_proj.weight', " in warning
    assert "download" not in warning


def test_index_of_another_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, TinyLayer().tensors())
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "model.safetensors"}}))
    with pytest.raises(SourceError, match="lists none of the tensors that its files hold"):
        index(tmp_path)


def test_index_left_over_from_an_earlier_export(tmp_path: Path) -> None:
    write(tmp_path, TinyLayer().tensors(), shards=3)
    for shard in tmp_path.glob("model-*.safetensors"):
        shard.unlink()
    save_file(TinyLayer().tensors(), tmp_path / "model.safetensors")
    with pytest.raises(SourceError, match=r"names 3 of 3 files that do not exist.*left over from an earlier") as caught:
        index(tmp_path)
    assert "does not name files that do: model.safetensors" in str(caught.value)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert index(tmp_path).tensors.keys() == TinyLayer().tensors().keys()


def test_without_an_index_every_shard_at_the_top_is_read(tmp_path: Path) -> None:
    """As vLLM reads it, whatever the names; a second copy in Mistral's own names is left out, and said to be."""
    write(tmp_path, TinyLayer().tensors())
    save_file({"mtp.fc.weight": torch.ones(4)}, tmp_path / "mtp.safetensors")
    save_file({"layers.0.x": torch.ones(4)}, tmp_path / "consolidated.safetensors")
    found = index(tmp_path)
    assert found.tensors.keys() == {*TinyLayer().tensors(), "mtp.fc.weight"}
    assert found.left_out == {"consolidated.safetensors": "a second copy of the weights, in Mistral's form"}


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("consolidated_extra.safetensors", "layers.0.x"),
        ("consolidated-mtp.safetensors", "mtp.fc.weight"),
        ("consolidated.safetensors", "mtp.fc.weight"),
        ("Consolidated.safetensors", "layers.0.x"),
    ],
)
def test_what_is_no_second_copy_is_read_without_an_index(tmp_path: Path, name: str, tensor: str) -> None:
    write(tmp_path, TinyLayer().tensors())
    save_file({tensor: torch.ones(4)}, tmp_path / name)
    found = index(tmp_path)
    assert found.tensors.keys() == {*TinyLayer().tensors(), tensor}
    assert not found.left_out


@pytest.mark.parametrize("renamed", [False, True])
def test_a_second_copy_in_several_files_is_left_out_whole(tmp_path: Path, renamed: bool) -> None:
    """One of its files may hold nothing that tells; and copies under the same names are copies too."""
    tensors = TinyLayer().tensors()
    write(tmp_path, tensors)
    names = ["norm.weight", "layers.0.x"] if renamed else list(tensors)[:2]
    for number, name in enumerate(names, 1):
        save_file({name: torch.ones(4)}, tmp_path / f"consolidated-0000{number}-of-00002.safetensors")
    found = index(tmp_path)
    assert found.tensors.keys() == tensors.keys()
    assert len(found.left_out) == 2


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("pytorch_model.bin.index.json", "an index that servers do not read"),
        ("consolidated.safetensors", "not in the index"),
        ("extra/x.safetensors", "in a subfolder, where servers do not look for weights"),
        ("x.gguf", "not safetensors"),
    ],
)
def test_the_reason_why_a_file_is_left_out(tmp_path: Path, name: str, reason: str) -> None:
    write(tmp_path, TinyLayer().tensors(), shards=2)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"x")
    assert index(tmp_path).left_out[name].startswith(reason)


def test_two_exports_without_an_index(tmp_path: Path) -> None:
    write(tmp_path, TinyLayer().tensors(), shards=2, index=False)
    save_file(TinyLayer().tensors(), tmp_path / "model.safetensors")
    with pytest.raises(
        SourceError, match=r"duplicate: tensor .* two shards\. Files of two exports are in one directory"
    ):
        index(tmp_path)


@pytest.mark.parametrize("weights", ["draft/model.safetensors", "draft/weights/w.bin"])
def test_a_checkpoint_in_a_subfolder_is_left_out_whole(tmp_path: Path, weights: str) -> None:
    write(tmp_path, TinyLayer().tensors())
    for name in (weights, "draft/config.json", "draft/tokenizer.json", "templates/chat.jinja", "assets/a.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    found = index(tmp_path)
    assert [file.name for file in found.side_files] == ["assets/a.png", "templates/chat.jinja"]
    inside = [weights, "draft/config.json", "draft/tokenizer.json"]
    assert found.left_out == dict.fromkeys(inside, "not of this model")


_POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 4999802720\n"


@pytest.mark.parametrize(
    "name",
    ["model-00002-of-00002.safetensors", "model.safetensors.index.json", "config.json", "README.md", "tokenizer.json"],
)
def test_git_lfs_pointers_are_called_so(tmp_path: Path, name: str) -> None:
    write(tmp_path, TinyLayer().tensors(), shards=2)
    (tmp_path / name).write_text(_POINTER)
    with pytest.raises(SourceError, match=r"is a git-lfs pointer.*git lfs pull") as caught:
        index(tmp_path)
    assert str(tmp_path / name) in str(caught.value)


def test_many_git_lfs_pointers_are_one_error(tmp_path: Path) -> None:
    write(tmp_path, TinyLayer().tensors(), shards=4)
    for shard in tmp_path.glob("*.safetensors"):
        shard.write_text(_POINTER)
    with pytest.raises(SourceError, match=r"pointer, not the file itself \(and so are 3 more files\)"):
        index(tmp_path)


@pytest.mark.parametrize("with_config", [False, True])
@pytest.mark.parametrize(
    ("names", "form"),
    [
        (["model-Q4_K_M.gguf"], r"GGUF files \(model-Q4_K_M\.gguf\)"),
        (["pytorch_model-1.bin", "pytorch_model-2.bin"], r"PyTorch \.bin files \(pytorch_model-1\.bin and 1 more\)"),
    ],
)
def test_other_formats_are_named(tmp_path: Path, names: list[str], form: str, with_config: bool) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"GGUF\3\0\0\0")
    if with_config:
        (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SourceError, match=form):
        index(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "hf_quant_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a":' * 101 + b"0" + b"}" * 101, "nested too deep; expected at most 100 levels, found 101 levels"),
        (b'{"a":[' + b"[]," * 4_000_000 + b"0]}", "too many JSON values; expected at most 8,000,000, found 8,000,003"),
        (b"\xff\xfe{\0}\0", "is not valid JSON"),
        (b'{"a": "\xff"}', "is not valid JSON"),
        (b"[]", "must be a JSON object"),
    ],
    ids=["deep", "many", "utf-16", "latin-1", "list"],
)
def test_bounds_of_every_json_file(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    write(tmp_path, TinyLayer().tensors(), index=True)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=message) as caught:
        index(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / name}: ")


@pytest.mark.parametrize("name", ["config.json", "hf_quant_config.json", "model.safetensors.index.json", "README.md"])
def test_sizes_are_bounded_before_anything_is_read(tmp_path: Path, name: str) -> None:
    write(tmp_path, TinyLayer().tensors(), index=True)
    with (tmp_path / name).open("wb") as stream:
        stream.truncate(20_000_000_000)
    with pytest.raises(SourceError, match=r"is too large; expected at most \d+ bytes, found 20000000000 bytes"):
        index(tmp_path)


def test_a_config_at_the_bound_is_read(tmp_path: Path) -> None:
    write(tmp_path, TinyLayer().tensors())
    value: Any = 0
    for _ in range(99):
        value = {"a": value}
    (tmp_path / "config.json").write_text(json.dumps({"a": value}))
    assert index(tmp_path).config == {"a": value}


def test_truncated_shard(tmp_path: Path) -> None:
    write(tmp_path, TinyLayer().tensors(), shards=2)
    shard = tmp_path / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(SourceError, match=r"model-00001-of-00002\.safetensors: file size does not match its header"):
        index(tmp_path)


@pytest.mark.slow
@given(st.binary(max_size=300) | st.text(max_size=300).map(str.encode))
@settings(max_examples=60, deadline=None)
def test_fuzz_index_file(tmp_path_factory: pytest.TempPathFactory, text: bytes) -> None:
    folder = write(tmp_path_factory.mktemp("c"), others())
    (folder / "model.safetensors.index.json").write_bytes(text)
    with pytest.raises(SourceError):
        index(folder)


@given(
    st.dictionaries(
        st.sampled_from([*others(), "unknown"]),
        st.sampled_from(["model.safetensors", "x.safetensors", "../m", "config.json", "model.safetensors\0"])
        | st.integers(),
    )
)
@settings(max_examples=60, deadline=None)
def test_fuzz_weight_map(tmp_path_factory: pytest.TempPathFactory, weight_map: dict[str, Any]) -> None:
    """An index is accepted only if it tells the truth about the tensors of the one shard that is there."""
    folder = write(tmp_path_factory.mktemp("c"), others())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    true = all(shard == "model.safetensors" for shard in weight_map.values())
    if true and weight_map.keys() & others().keys():
        found = index(folder)
        assert found.tensors.keys() == others().keys()
        assert bool(found.warnings) == ("unknown" in weight_map)
    else:
        with pytest.raises(SourceError):
            index(folder)


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (["model-00001-of-00002", "model-00002-of-00002"], None),
        (["model-00000-of-00002", "model-00001-of-00002"], None),
        (["model-00001-of-00003", "model-00003-of-00003"], "1 of 3 shards are missing: number 2"),
        (["model-00001-of-00009", "model"], "8 of 9 shards are missing: number 2, 3, 4, 5, 6 and 3 more"),
        (["model", "consolidated-00001-of-00002"], "1 of 2 shards are missing: number 2"),
    ],
)
def test_missing_shard_without_an_index(tmp_path: Path, names: list[str], missing: str | None) -> None:
    """Whole layers may be gone with it, so that what is left looks complete."""
    (tmp_path / "config.json").write_text("{}")
    for number, name in enumerate(names):
        save_file({f"t{number}": torch.zeros(4)}, tmp_path / f"{name}.safetensors")
    if missing is None:
        index(tmp_path)
    else:
        with pytest.raises(SourceError, match=missing):
            index(tmp_path)


@pytest.mark.parametrize("name", ["\ud800", "\x1b]52;c;aGk=\x07", "n" * 1_000_000])
@pytest.mark.parametrize("shard", ["model.safetensors", "../x", "x.safetensors"])
def test_names_from_an_index_are_short_and_printable(tmp_path: Path, name: str, shard: str) -> None:
    write(tmp_path, TinyLayer().tensors(), index=True)
    set_weight_map(tmp_path, {name: shard})
    if shard == "model.safetensors":
        (text,) = index(tmp_path).warnings
    else:
        with pytest.raises(SourceError) as caught:
            index(tmp_path)
        text = str(caught.value)
    assert text.isprintable()
    assert len(text) < 1000


@pytest.mark.parametrize("name", ["\x1b[2J", "n" * 1_000_000])
def test_names_from_a_header_are_short_and_printable(tmp_path: Path, name: str) -> None:
    write(tmp_path, TinyLayer().tensors(), index=False)
    for file in ("a", "b"):
        save_file({name: torch.ones(1)}, tmp_path / f"{file}.safetensors")
    with pytest.raises(SourceError) as caught:
        index(tmp_path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000
