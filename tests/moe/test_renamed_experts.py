"""Experts that differ from ordinary ones only in their names give the same prepared bytes and come back."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from nvfp4_prep import ConvertOptions, LayoutName, convert, inspect, relayout, restore, verify
from nvfp4_prep.formats import formats, namings
from nvfp4_prep.moe.discovery import find_layers
from nvfp4_prep.prepared.layer_record_checks import check_groups
from support.cases import slow_after
from support.checkpoint_files import as_bytes, load_tensors
from support.tensor_records import records
from support.tiny_checkpoints import LEAVES, Tensors, TinyLayer, config, merged, others, write

LETTERS = ("w1", "w3", "w2")
PATHS = ("model.language_model.layers.0.mlp.experts", "model.language_model.layers.3.mlp.experts")


@dataclass(frozen=True)
class Spelling:
    """Names of one checkpoint: ``template`` of a tensor, and what gate and up together are called where fused."""

    kind: str
    names: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    template: str = "{path}.{expert}.{name}.{leaf}"
    fused: str = ""
    pairs: bool = False  # fused tensors have a scale for gate and one for up
    differing: bool = False

    def layer(self, path: str) -> TinyLayer:
        return TinyLayer(path, kind=self.kind, names=self.names, seed=len(path), differing=self.differing)

    def tensors(self, path: str) -> Tensors:
        """The layer's tensors under these names."""
        layer, made = self.layer(path), {}
        ordinary = layer.tensors()
        for expert in range(layer.experts):
            parts = {
                name: [ordinary[f"{path}.{expert}.{name}.{leaf}"] for leaf in LEAVES[self.kind]] for name in layer.names
            }
            if self.fused:
                gate, up, down = (parts[name] for name in layer.names)
                both = [
                    torch.cat([a.view(torch.uint8), b.view(torch.uint8)]) for a, b in zip(gate[:2], up[:2], strict=True)
                ]
                if self.pairs:
                    scalars = [torch.cat([a.reshape(1), b.reshape(1)]) for a, b in zip(gate[2:], up[2:], strict=True)]
                else:  # one scale serves both: gate and up have the same; of the input scales the one that counts
                    assert torch.equal(gate[2], up[2])
                    scalars = [gate[2], max(gate[3], up[3]) if self.kind == "modelopt" else min(gate[3], up[3])]
                parts = {self.fused: [both[0], both[1].view(torch.float8_e4m3fn), *scalars], layer.names[2]: down}
            for name, leaves in parts.items():
                for leaf, tensor in zip(LEAVES[self.kind], leaves, strict=True):
                    made[self.template.format(path=path, expert=expert, name=name, leaf=leaf)] = tensor
        return made

    def ordinary(self) -> Spelling:
        return replace(self, template=Spelling.template, fused="", pairs=False)


PROJECTION_FIRST = "{path}.{name}.{expert}.{leaf}"
SPELLINGS = {
    f"{name} {kind}": Spelling(kind, **arguments)
    for kind in ("modelopt", "compressed-tensors")
    for name, arguments in {
        "projection first": {"template": PROJECTION_FIRST},
        "projection first, letters": {"template": PROJECTION_FIRST, "names": LETTERS},
        "projection first, no gate": {"template": PROJECTION_FIRST, "names": ("up_proj", "down_proj")},
        "fused": {"fused": "gate_up_proj"},
        "fused, two scales": {"fused": "gate_up_proj", "pairs": True},
        "fused, two differing scales": {"fused": "gate_up_proj", "pairs": True, "differing": True},
        "fused, letters": {"fused": "w13", "names": LETTERS},
        "fused, projection first": {"fused": "gate_up_proj", "template": PROJECTION_FIRST},
    }.items()
}


def source(folder: Path, spelling: Spelling) -> Path:
    act = "silu" if len(spelling.names) == 3 else "relu2"
    tensors = merged([*(spelling.tensors(path) for path in PATHS), others()])
    return write(folder, tensors, config(hidden_act=act), shards=2)


def prepared(folder: Path) -> dict[str, object]:
    return {name: data for name, data in as_bytes(load_tensors(folder)).items() if ".routed_experts." in name}


@pytest.mark.slow
@pytest.mark.parametrize("spelling", slow_after(5, SPELLINGS.values()), ids=SPELLINGS)
def test_renamed_experts_give_the_same_bytes_and_come_back(tmp_path: Path, spelling: Spelling) -> None:
    renamed = source(tmp_path / "renamed", spelling)
    ordinary = source(tmp_path / "ordinary", spelling.ordinary())
    assert load_tensors(renamed).keys() != load_tensors(ordinary).keys()
    out = convert(renamed, tmp_path / "out")
    want = convert(ordinary, tmp_path / "want")
    assert prepared(out.path) == prepared(want.path) != {}
    assert [layer.index for layer in out.manifest.layers] == [0, 3]
    assert verify(out.path, source=renamed).ok
    assert not verify(out.path, source=ordinary).ok
    back = restore(out.path, tmp_path / "back").path
    assert as_bytes(load_tensors(back)) == as_bytes(load_tensors(renamed))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["projection first modelopt", "fused compressed-tensors"])
def test_relayout_of_renamed_experts(tmp_path: Path, name: str) -> None:
    spelling = SPELLINGS[name]
    renamed = source(tmp_path / "renamed", spelling)
    batched = ConvertOptions(layout=LayoutName.CUTEDSL_BATCHED)
    out = convert(renamed, tmp_path / "out").path
    other = relayout(out, tmp_path / "other", layout=LayoutName.CUTEDSL_BATCHED).path
    assert prepared(other) == prepared(convert(renamed, tmp_path / "direct", batched).path)
    assert verify(other, source=renamed).ok
    back = restore(other, tmp_path / "back").path
    assert as_bytes(load_tensors(back)) == as_bytes(load_tensors(renamed))


def test_inspect_counts_renamed_experts(tmp_path: Path) -> None:
    found = inspect(source(tmp_path / "source", SPELLINGS["projection first modelopt"]))
    assert [(layer.experts_path, layer.status) for layer in found.layers] == [
        (path, "can be prepared") for path in PATHS
    ]


@pytest.mark.parametrize(("shape", "fits"), [((2,), True), ((1, 2), True), ((), True), ((3,), False), ((0,), False)])
def test_a_manifests_fused_scales_are_one_or_two(shape: tuple[int, ...], fits: bool) -> None:
    tensors = SPELLINGS["fused, two scales modelopt"].tensors(PATHS[0])
    (layer,) = find_layers(records(tensors), namings(), formats()).layers
    groups = tuple(
        replace(group, shape=shape) if group.leaf.is_scalar and len(group.projections) == 2 else group
        for group in layer.groups
    )
    with nullcontext() if fits else pytest.raises(ValueError, match="one float32 for each expert"):
        check_groups(replace(layer, groups=groups))


def test_a_changed_scale_of_up_in_a_fused_tensor_is_found(tmp_path: Path) -> None:
    spelling = SPELLINGS["fused, two scales modelopt"]
    renamed = source(tmp_path / "renamed", spelling)
    out = convert(renamed, tmp_path / "out").path
    assert verify(out, source=renamed).ok
    tensors = merged([*(spelling.tensors(path) for path in PATHS), others()])
    tensors[f"{PATHS[1]}.2.gate_up_proj.weight_scale_2"][1] *= 2
    changed = write(tmp_path / "changed", tensors, config(), shards=2)
    assert not verify(out, source=changed).ok
