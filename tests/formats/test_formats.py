"""Formats and namings, and the example plugin as an installed package would be found."""

from __future__ import annotations

import importlib.metadata
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nvfp4_prep import ConvertOptions, GateUpPolicy, convert, restore, verify
from nvfp4_prep.errors import UsageError
from nvfp4_prep.formats import FORMAT_GROUP, NAMING_GROUP, ExpertTensorName, Leaf, formats, namings
from nvfp4_prep.formats.naming import (
    _STACKS,
    MoeStackNaming,
    PerExpertNaming,
    ProjectionFirstNaming,
    StackedNaming,
)
from nvfp4_prep_kernels import Projection
from nvfp4_prep_kernels.gate_up import deinterleave_gate_up, interleave_gate_up
from support.checkpoint_files import IN_REPOSITORY, as_bytes, load_tensors, raw_bytes
from support.paths import ROOT
from support.tiny_checkpoints import Tensors, TinyLayer, config, write

EXAMPLE = ROOT / "examples" / "custom_family"
G, U, D = Projection.GATE, Projection.UP, Projection.DOWN
A = "model.layers.1.mlp.experts"
F = "model.layers.1.feed_forward.experts"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (f"{A}.7.gate_proj.weight_scale_2", ExpertTensorName(A, 7, (G,), "weight_scale_2")),
        (f"{A}.0.w3.weight_packed", ExpertTensorName(A, 0, (U,), "weight_packed")),
        ("layers.1.experts.383.w2.weight", ExpertTensorName("layers.1.experts", 383, (D,), "weight")),
        ("a.experts.1.experts.2.w2.weight", ExpertTensorName("a.experts.1.experts", 2, (D,), "weight")),
        (f"{A}.7.gate_up_proj.weight_scale_2", ExpertTensorName(A, 7, (G, U), "weight_scale_2")),
        (f"{A}.0.w13.weight_packed", ExpertTensorName(A, 0, (G, U), "weight_packed")),
        (f"{A}.gate_proj.7.weight_scale_2", ExpertTensorName(A, 7, (G,), "weight_scale_2")),
        (f"{A}.w2.127.weight_packed", ExpertTensorName(A, 127, (D,), "weight_packed")),
        (f"{A}.gate_up_proj.0.input_scale", ExpertTensorName(A, 0, (G, U), "input_scale")),
        (f"{A}.gate_proj.07.weight", None),
        (f"{A}.gate_proj.7", ExpertTensorName(A, None, (G,), "7")),
        (f"{F}.gate_up_proj", ExpertTensorName(F, None, (G, U), "weight")),
        (f"{F}.gate_up_proj_weight_scale_2", ExpertTensorName(F, None, (G, U), "weight_scale_2")),
        (f"{F}.down_proj_bias", ExpertTensorName(F, None, (D,), "bias")),
        (f"{F}.down_proj.weight_packed", ExpertTensorName(F, None, (D,), "weight_packed")),
        (
            "model.layers.3.moe.up_proj.input_scale",
            ExpertTensorName("model.layers.3.moe.experts", None, (U,), "input_scale"),
        ),
        (
            "model.layers.3.moe.experts.4.up_proj.weight",
            ExpertTensorName("model.layers.3.moe.experts", 4, (U,), "weight"),
        ),
        ("model.layers.1.mlp.shared_experts.gate_proj.weight", None),
        ("model.layers.1.mlp.shared_expert.gate_proj.weight", None),
        ("model.layers.1.share_expert.up_proj.weight", None),
        ("model.layers.1.moe.share_expert.up_proj.weight", None),
        ("model.layers.1.mlp.experts.01.gate_proj.weight", None),
        ("model.layers.1.mlp.experts.-1.gate_proj.weight", None),
        ("model.layers.1.mlp.gate_proj.weight", None),
        ("model.layers.1.mlp.gate.weight", None),
        ("model.layers.1.moe.gate.weight", None),
        ("model.layers.1.moe.router_bias", None),
        ("model.layers.1.mlp.experts.routed_experts.w13_weight", None),
        ("xexperts.1.w1.weight", None),
        ("", None),
    ],
)
def test_names(name: str, expected: ExpertTensorName | None) -> None:
    found = [parsed for naming in namings() if (parsed := naming.parse(name)) is not None]
    assert found == ([] if expected is None else [expected])


def test_reciprocals_are_inverted_in_float32_one_by_one() -> None:
    stored = torch.rand(2000, generator=torch.Generator().manual_seed(0)) * 1e4 + 1
    made = formats()["compressed-tensors"].global_scale_multiplier(stored)
    assert made.dtype == torch.float32
    exact = [torch.tensor(1.0 / float(value), dtype=torch.float64).to(torch.float32) for value in stored]
    assert torch.equal(made, torch.stack(exact))
    assert not torch.equal(1.0 / made, stored)  # which is why the stored values are kept for restore
    plain = formats()["modelopt"]
    assert torch.equal(plain.global_scale_multiplier(stored), stored)
    assert torch.equal(plain.input_scale_multiplier(stored), stored)


def test_every_format_names_all_leaves() -> None:
    for name, format_ in formats().items():
        assert format_.name == name
        assert set(format_.leaves.values()) == set(Leaf)
    assert [naming.name for naming in namings()] == [
        kind.name for kind in (PerExpertNaming, ProjectionFirstNaming, StackedNaming, MoeStackNaming)
    ]


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The example package on the path, with the entry points that its pyproject.toml declares."""
    import tomllib

    declared = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]["entry-points"]
    real = importlib.metadata.entry_points

    def entry_points(*, group: str) -> list[importlib.metadata.EntryPoint]:
        extra = [importlib.metadata.EntryPoint(name, value, group) for name, value in declared.get(group, {}).items()]
        return [*real(group=group), *extra]

    monkeypatch.syspath_prepend(str(EXAMPLE / "src"))
    monkeypatch.setattr("nvfp4_prep.formats.entry_points", entry_points)
    formats.cache_clear()
    namings.cache_clear()
    yield
    formats.cache_clear()
    namings.cache_clear()
    sys.modules.pop("nvfp4_prep_acme", None)


def acme(layer: TinyLayer) -> Tensors:
    """The layer with Acme's names; its scales are powers of two, so that logarithms are exact."""
    spelled = {"gate_proj": "gate", "up_proj": "value", "down_proj": "out"}
    made: Tensors = {}
    for expert in range(layer.experts):
        for name in layer.names:
            codes, scales, _, _ = layer.leaves(expert, name)
            base = f"decoder.3.bank.{expert}.{spelled[name]}"
            made |= {f"{base}.q": codes, f"{base}.s": scales}
            made |= {f"{base}.g": torch.tensor(-9.0 - expert), f"{base}.a": torch.tensor(-6.0 - expert)}
    return made


def test_the_example_plugin_converts_and_restores(tmp_path: Path, plugins: None) -> None:
    layer = TinyLayer()
    source = write(tmp_path / "source", acme(layer), config(model_type="acme"))
    result = convert(source, tmp_path / "out", ConvertOptions(gate_up_scales=GateUpPolicy.ERROR))
    (made,) = result.manifest.layers
    assert (made.experts_path, made.format, made.source.naming, made.index) == (
        "decoder.3.bank",
        "acme",
        "acme",
        3,
    )
    prefix = "decoder.3.bank.routed_experts"
    one = load_tensors(tmp_path / "out")
    assert one[f"{prefix}.w13_weight_scale_2"].tolist() == [2.0 ** (-9 - expert) for expert in range(3)]
    assert one[f"{prefix}.w2_input_scale"].tolist() == [2.0**-6] * 3
    # the same matrices under ModelOpt's names give the same prepared bytes
    convert(write(tmp_path / "known", layer.tensors()), tmp_path / "known-out")
    other = load_tensors(tmp_path / "known-out")
    for tensor in ("w13_weight", "w13_weight_scale", "w2_weight", "w2_weight_scale"):
        known = other[f"{layer.path}.routed_experts.{tensor}"]
        assert torch.equal(one[f"{prefix}.{tensor}"].view(torch.uint8), known.view(torch.uint8))
    assert verify(tmp_path / "out", source=source).ok
    restore(tmp_path / "out", tmp_path / "back")
    back, want = load_tensors(tmp_path / "back"), acme(layer)
    assert back.keys() == want.keys()
    assert all(raw_bytes(back[name]) == raw_bytes(want[name]) for name in want if want[name].dim())
    assert all(math.isclose(back[name], want[name], rel_tol=0) for name in want if not want[name].dim())


@pytest.mark.parametrize("group", [FORMAT_GROUP, NAMING_GROUP])
@pytest.mark.parametrize(
    "value", ["no_such_module:Thing", "nvfp4_prep.formats:NoSuchThing", "nvfp4_prep.formats:ExpertTensorName"]
)
def test_a_broken_plugin_is_an_error(monkeypatch: pytest.MonkeyPatch, group: str, value: str) -> None:
    point = importlib.metadata.EntryPoint("broken", value, group)
    monkeypatch.setattr("nvfp4_prep.formats.entry_points", lambda *, group: [point] if group == point.group else [])
    load = formats if group == FORMAT_GROUP else namings
    load.cache_clear()
    with pytest.raises(UsageError, match="plugin cannot be loaded") as caught:
        load()
    assert f"{group}:broken = {value}" in str(caught.value)
    load.cache_clear()


def test_a_stack_with_up_rows_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``projections`` are in the order of the rows, whatever order the layout takes them in."""
    source = IN_REPOSITORY / "modelopt-llama4-experts"
    usual = load_tensors(convert(source, tmp_path / "usual").path)[f"{F}.routed_experts.w13_weight"]
    monkeypatch.setitem(_STACKS, "gate_up_proj", (U, G))
    out = convert(source, tmp_path / "out").path
    found = load_tensors(out)[f"{F}.routed_experts.w13_weight"]
    gate, up = deinterleave_gate_up(usual, 64)
    assert torch.equal(found, interleave_gate_up(up, gate, 64))
    assert not torch.equal(found, usual)
    assert verify(out, source=source).ok
    back = restore(out, tmp_path / "back").path
    assert as_bytes(load_tensors(back)) == as_bytes(load_tensors(source))
