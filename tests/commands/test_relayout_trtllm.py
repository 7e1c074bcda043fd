"""Relayout to and from the TRTLLM-gen layout: the same bytes as a conversion of the source, whatever the scales."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import nvfp4_prep.pipeline.relayout_jobs as jobs
from nvfp4_prep import ConvertOptions, GateUpPolicy, LayoutName, convert, relayout, restore, verify
from nvfp4_prep.cli import cli
from nvfp4_prep.errors import TargetError, VerificationError
from nvfp4_prep_kernels import PreparedTensor
from support.cases import slow_after
from support.relayout_cases import flip, same_but_for_provenance, source
from support.tiny_checkpoints import TinyLayer, config, write

TRTLLM = ConvertOptions(layout=LayoutName.TRTLLM)
OTHERS: list[dict[str, Any]] = [
    {"layout": LayoutName.CUTEDSL},
    {"layout": LayoutName.CUTEDSL, "gate_up_block": 16, "moe_tp": 2},
    {"layout": LayoutName.CUTEDSL_BATCHED},
]


@pytest.mark.slow
@pytest.mark.parametrize("other", slow_after(1, OTHERS), ids=lambda other: "-".join(map(str, other.values())))
@pytest.mark.parametrize("policy", slow_after(1, [GateUpPolicy.RECONCILE, GateUpPolicy.VLLM]))
@pytest.mark.parametrize("kind", slow_after(1, ["modelopt", "compressed-tensors"]))
def test_both_ways_equal_conversions_of_the_source(
    tmp_path: Path, other: dict[str, Any], policy: GateUpPolicy, kind: str
) -> None:
    """Differing scales: rescaled block scales become the source's again, and the source's are rescaled anew."""
    made = source(tmp_path / "source", intermediate=128, kind=kind)
    convert(made, tmp_path / "other", ConvertOptions(gate_up_scales=policy, **other), smoke=None)
    convert(made, tmp_path / "trtllm", ConvertOptions(layout=LayoutName.TRTLLM, gate_up_scales=policy), smoke=None)
    relayout(tmp_path / "other", tmp_path / "a", layout=LayoutName.TRTLLM, moe_tp=1)
    same_but_for_provenance(tmp_path / "a", tmp_path / "trtllm")
    relayout(tmp_path / "trtllm", tmp_path / "b", **other)
    same_but_for_provenance(tmp_path / "b", tmp_path / "other")
    assert verify(tmp_path / "a", source=made).ok and verify(tmp_path / "b", source=made).ok
    restore(tmp_path / "a", tmp_path / "back")
    assert (tmp_path / "back" / "config.json").read_bytes() == (made / "config.json").read_bytes()


@pytest.mark.parametrize(
    "layer",
    [
        TinyLayer(intermediate=96, hidden=144),
        TinyLayer(intermediate=96, hidden=144, names=("up_proj", "down_proj")),
    ],
    ids=["gated", "not gated"],
)
@pytest.mark.slow
def test_padded_layers_both_ways(tmp_path: Path, layer: TinyLayer) -> None:
    changes = {} if len(layer.names) == 3 else {"mlp_hidden_act": "relu2"}
    made = write(tmp_path / "source", layer.tensors(), config(**changes))
    convert(made, tmp_path / "cutedsl")
    convert(made, tmp_path / "trtllm", TRTLLM)
    relayout(tmp_path / "cutedsl", tmp_path / "a", layout=LayoutName.TRTLLM)
    relayout(tmp_path / "a", tmp_path / "b", layout=LayoutName.CUTEDSL)
    same_but_for_provenance(tmp_path / "a", tmp_path / "trtllm")
    same_but_for_provenance(tmp_path / "b", tmp_path / "cutedsl")


def test_stacked_and_transposed_source(tmp_path: Path) -> None:
    made = write(tmp_path / "source", TinyLayer().llama4())
    convert(made, tmp_path / "trtllm", TRTLLM)
    relayout(tmp_path / "trtllm", tmp_path / "b", layout=LayoutName.CUTEDSL)
    convert(made, tmp_path / "cutedsl")
    same_but_for_provenance(tmp_path / "b", tmp_path / "cutedsl")


def test_bytes_move_tile_by_tile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The codes, between the standard layouts; from the batched layout, those of down. Scales are prepared anew."""
    made = source(tmp_path / "source", intermediate=128, hidden=256, differing=False)
    moved: list[PreparedTensor] = []

    def spy(tensor: PreparedTensor, *arguments: Any) -> Any:
        moved.append(tensor)
        return relayout_tiles(tensor, *arguments)

    relayout_tiles = jobs.relayout_tiles
    monkeypatch.setattr(jobs, "relayout_tiles", spy)
    for name, expected in (("cutedsl", {"w13_weight", "w2_weight"}), ("cutedsl-batched", {"w2_weight"})):
        moved.clear()
        convert(made, tmp_path / name, ConvertOptions(layout=LayoutName(name)), smoke=None)
        relayout(tmp_path / name, tmp_path / f"from {name}", layout=LayoutName.TRTLLM)
        assert set(moved) == expected


@pytest.mark.slow
def test_what_becomes_of_differing_scales_is_told_as_a_conversion_tells_it(tmp_path: Path) -> None:
    """Block scales are rescaled, and some rounded, on the way to one scale for both; on the way back none is."""

    def run(*words: object) -> str:
        done = CliRunner().invoke(cli, [*map(str, words), "-q"])
        assert done.exit_code == 0, done.output
        return done.stdout

    made = source(tmp_path / "source", intermediate=128)
    told = run("convert", made, tmp_path / "direct", "--no-smoke").splitlines()
    (line,) = [line for line in told if line.startswith("gate/up global scales differed in ")]
    assert "(reconcile); worst layer's relative error of their weights: reconcile " in line
    run("convert", made, tmp_path / "trtllm", "--layout", "trtllm", "--no-smoke")
    made_anew = run("relayout", tmp_path / "trtllm", tmp_path / "new", "--layout", "cutedsl")
    assert line in made_anew.splitlines() and "\nrelayout with --layout trtllm, or serve" in made_anew
    again = run("relayout", tmp_path / "direct", tmp_path / "other", "--layout", "trtllm")
    assert "both are stored, nothing was rescaled; relative error of the weights: 0" in again
    value = json.loads(run("relayout", tmp_path / "trtllm", tmp_path / "new", "--layout", "cutedsl", "--json"))
    experts = int(line.split()[5])
    assert value["gate_up"]["policy"] == "reconcile" and value["gate_up"]["rounded_block_scales"] > 0
    assert value["gate_up"]["differing"] == value["gate_up"]["rescaled"] == experts
    assert value["gate_up"] == json.loads(run("convert", made, tmp_path / "direct", "--json"))["gate_up"]
    rounded = value["gate_up"]["rounded_block_scales"]
    assert f"; block scales of {experts} experts rescaled, {rounded:,} of them rounded" in run(
        "verify", tmp_path / "new"
    )
    assert "rescaled" not in run("verify", tmp_path / "trtllm")


@pytest.mark.slow
@pytest.mark.parametrize("layouts", [("trtllm", "cutedsl"), ("cutedsl", "trtllm")], ids="-".join)
def test_a_repeated_relayout_knows_its_own_output(tmp_path: Path, layouts: tuple[str, str]) -> None:
    """Also where scales were rescaled on the way, and not the output of another checkpoint's relayout."""
    old, new = layouts
    for name in ("a", "b"):
        made = source(tmp_path / name / "source", differing=name == "a")
        convert(made, tmp_path / name / "old", ConvertOptions(layout=LayoutName(old)))
        relayout(tmp_path / name / "old", tmp_path / name / "new", layout=LayoutName(new))
    again = relayout(tmp_path / "a" / "old", tmp_path / "a" / "new", layout=LayoutName(new))
    assert again.already_complete and not again.written_nbytes
    with pytest.raises(TargetError, match="not empty"):
        relayout(tmp_path / "a" / "old", tmp_path / "b" / "new", layout=LayoutName(new))


@pytest.mark.parametrize("name", ["source-block-scales-layer-00001.safetensors", "experts-layer-00001.safetensors"])
def test_a_flipped_byte_is_found_on_the_way_to_trtllm(tmp_path: Path, name: str) -> None:
    """The kept block scales go into the new file: their digests are the source's."""
    convert(source(tmp_path / "source"), tmp_path / "old")
    flip(tmp_path / "old" / name, (tmp_path / "old" / name).stat().st_size - 1)
    with pytest.raises(VerificationError):
        relayout(tmp_path / "old", tmp_path / "new", layout=LayoutName.TRTLLM)
    assert not (tmp_path / "new" / "config.json").exists()


def test_continues_after_a_kill_between_experts_and_their_scale_vectors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The side of each rescaled expert comes from the journal then."""
    made = source(tmp_path / "source")
    convert(made, tmp_path / "old", TRTLLM)
    command = "nvfp4_prep.commands.relayout.values_job"

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(command, killed)
        relayout(tmp_path / "old", tmp_path / "new", layout=LayoutName.CUTEDSL)
    assert not (tmp_path / "new" / "expert-scales.safetensors").exists()
    assert relayout(tmp_path / "old", tmp_path / "new", layout=LayoutName.CUTEDSL).resumed
    convert(made, tmp_path / "direct")
    same_but_for_provenance(tmp_path / "new", tmp_path / "direct")
