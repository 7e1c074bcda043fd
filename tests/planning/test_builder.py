"""Plans: what is prepared, what passes, what is refused before anything is written; and that they are pure."""

from __future__ import annotations

import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nvfp4_prep import ConvertOptions, GateUpPolicy, LayoutName, SampleModel, convert, inspect, plan, write_sample
from nvfp4_prep.checkpoint.filenames import FileKind
from nvfp4_prep.cli.render import inspection_text, plan_text
from nvfp4_prep.errors import CheckpointError, SourceError, UnsupportedCheckpointError, UsageError
from nvfp4_prep.planning.plan import Plan
from support.tiny_checkpoints import Tensors, TinyLayer, config, merged, others, without, write

LAYER = TinyLayer()
PATH = LAYER.path


def made(folder: Path, tensors: Tensors, options: ConvertOptions | None = None, **changes: Any) -> Plan:
    return plan(write(folder, tensors, config(**changes), shards=2), options)


def refusal(folder: Path, tensors: Tensors, options: ConvertOptions | None = None, **changes: Any) -> str:
    """What convert says; nothing may be written, and inspect must say the same without failing."""
    source = write(folder / "source", tensors, config(**changes))
    with pytest.raises(UnsupportedCheckpointError) as caught:
        convert(source, folder / "out", options)
    assert caught.value.next_step
    assert not (folder / "out").exists()
    if options is None:
        found = inspect(source)
        assert found.refusal == str(caught.value)
        assert inspection_text(found)
    return str(caught.value)


def test_every_source_tensor_has_one_place(tmp_path: Path) -> None:
    tensors = merged([LAYER.tensors(), TinyLayer("model.layers.1.mlp.experts").tensors(), others()])
    result = made(tmp_path, tensors)
    prepared = {record.name for item in result.layers for group in item.groups for record in group.records}
    copied = [copy.name for file in result.files for copy in file.copies]
    assert sorted([*prepared, *copied]) == sorted(tensors)
    assert sorted(copied) == sorted(others())
    kinds = [file.kind for file in result.files]
    assert kinds.count(FileKind.EXPERTS) == 2
    assert kinds[-2:] == [FileKind.EXPERT_SCALES, FileKind.SOURCE_SCALES]


def test_same_source_and_options_same_plan(tmp_path: Path) -> None:
    first = made(tmp_path / "s", LAYER.tensors())
    assert plan(tmp_path / "s").fingerprint == first.fingerprint
    assert plan(tmp_path / "s", ConvertOptions(gate_up_block=16)).fingerprint != first.fingerprint


def test_mixed_precision_prepares_what_is_nvfp4(tmp_path: Path) -> None:
    bf16 = {
        f"model.layers.9.mlp.experts.{expert}.{name}.weight": torch.ones(16, 32, dtype=torch.bfloat16)
        for expert in range(2)
        for name in LAYER.names
    }
    result = made(tmp_path, merged([LAYER.tensors(), bf16]))
    assert [item.experts_path for item in result.layers] == [PATH]
    assert [(item.experts_path, item.kind) for item in result.others] == [("model.layers.9.mlp.experts", "bf16")]
    assert "model.layers.9.mlp.experts: experts are bf16" in plan_text(result)


def test_step_passes_its_last_layers_through(tmp_path: Path) -> None:
    """SwigluStep is not in the kernel: those layers stay as they are, the others are prepared."""
    tensors = merged(
        {
            name.replace(".experts.", ".moe."): tensor
            for name, tensor in TinyLayer(f"model.layers.{n}.experts").step().items()
        }
        for n in range(3)
    )
    step = {"model_type": "step3p5", "swiglu_limits": [0, 0, 7.0]}
    result = made(tmp_path / "some", tensors, **step)
    assert [item.index for item in result.layers] == [0, 1]
    (passed,) = result.others
    assert (passed.experts_path, passed.refused) == ("model.layers.2.moe.experts", False)
    assert "swiglustep" in passed.reason
    assert sum(len(file.copies) for file in result.files) == 12
    reason = refusal(tmp_path / "all", tensors, model_type="step3p5", swiglu_limits=[7.0] * 3)
    assert "activation swiglustep (config: 'silu'); the kernel computes silu, swigluoai, situ" in reason


@pytest.mark.parametrize("act", ["gelu_pytorch_tanh", "gelu", "quick_gelu"])
def test_gelu_is_refused(tmp_path: Path, act: str) -> None:
    reason = refusal(tmp_path, LAYER.tensors(), hidden_act=act)
    assert reason.startswith(f"{PATH}: gated experts have activation gelu")
    assert "another MoE backend" in reason


def test_activations_that_do_not_fit_the_projections(tmp_path: Path) -> None:
    ungated = TinyLayer(names=("up_proj", "down_proj")).tensors()
    assert "non-gated experts have activation silu" in refusal(tmp_path / "a", ungated)
    assert "gated experts have activation relu2" in refusal(tmp_path / "b", LAYER.tensors(), hidden_act="relu2")
    assert "activation unknown (config: 'mish')" in refusal(tmp_path / "c", LAYER.tensors(), hidden_act="mish")
    assert made(tmp_path / "d", ungated, mlp_hidden_act="relu2").layers
    assert made(tmp_path / "e", LAYER.tensors(), hidden_act="swigluoai", swiglu_limit=7.0).layers
    assert made(tmp_path / "f", LAYER.tensors(), hidden_act="situ").layers


def test_weight_only_says_what_would_work(tmp_path: Path) -> None:
    reason = refusal(tmp_path, without(LAYER.tensors(), lambda name: name.endswith("input_scale")))
    assert f"no input scales), but the kernel quantizes activations too ({PATH})" in reason
    assert "quantize the model again with activations" in reason


def test_nothing_to_prepare(tmp_path: Path) -> None:
    assert "holds no tensors of routed experts" in refusal(tmp_path / "a", others())
    bf16 = {f"{PATH}.0.{name}.weight": torch.ones(4, 4, dtype=torch.bfloat16) for name in LAYER.names}
    assert f"holds no NVFP4 experts to prepare: experts are bf16 ({PATH})" in refusal(tmp_path / "b", bf16)


def test_prepared_already(tmp_path: Path) -> None:
    convert(write(tmp_path / "source", LAYER.tensors()), tmp_path / "out")
    with pytest.raises(UnsupportedCheckpointError, match="is prepared already"):
        convert(tmp_path / "out", tmp_path / "again")
    tensors = {f"{PATH}.routed_experts.w13_weight": torch.ones(3, 4, 4, dtype=torch.uint8)}
    assert "is prepared already (it holds" in refusal(tmp_path / "b", tensors)
    stamp = {"quant_method": "nvfp4_prep"}
    stamped = write(tmp_path / "c", LAYER.tensors(), config(text_config={"quantization_config": stamp}))
    with pytest.raises(UnsupportedCheckpointError, match=r"config\.json is stamped"):
        convert(stamped, tmp_path / "never")
    with pytest.raises(CheckpointError, match=r"is a prepared checkpoint without its nvfp4_prep\.json"):
        inspect(stamped)


def test_damage_is_refused_by_name(tmp_path: Path) -> None:
    missing = f"{PATH}.1.up_proj.weight_scale"
    assert missing in refusal(tmp_path / "a", without(LAYER.tensors(), lambda name: name == missing))
    narrow = replace(LAYER, intermediate=32).tensors()
    mixed = LAYER.tensors() | {name: tensor for name, tensor in narrow.items() if ".up_proj." in name}
    assert "Gate, up and down of one expert must fit each other" in refusal(tmp_path / "b", mixed)
    assert "experts 0 to 2, but config.json's n_routed_experts is 4" in refusal(
        tmp_path / "c", LAYER.tensors(), n_routed_experts=4
    )
    # the language model's own part of the config is what counts
    assert "experts 0 to 2, but config.json's num_experts is 4" in refusal(
        tmp_path / "d", LAYER.tensors(), n_routed_experts=None, num_experts=2, text_config={"num_experts": 4}
    )


def test_config_that_promises_as_many_or_fewer_experts(tmp_path: Path) -> None:
    assert made(tmp_path / "a", LAYER.tensors(), num_local_experts=3, num_experts=[9], n_routed_experts=None).layers
    assert made(tmp_path / "b", LAYER.tensors(), num_experts=2).layers
    nested = {"num_experts": 3}
    assert made(tmp_path / "c", LAYER.tensors(), n_routed_experts=None, num_experts=4, text_config=nested).layers


def test_gate_up_policies(tmp_path: Path) -> None:
    tensors = replace(LAYER, differing=True).tensors()
    folder = write(tmp_path / "s", tensors)
    assert plan(folder).layers[0].reconciled == (0, 1, 2)
    assert plan(folder, ConvertOptions(gate_up_scales=GateUpPolicy.VLLM)).layers[0].reconciled == ()
    reason = refusal(tmp_path / "e", tensors, ConvertOptions(gate_up_scales=GateUpPolicy.ERROR))
    assert "3 of 3 experts have different global scales" in reason
    assert "Use --layout trtllm without --gate-up-scales (keeps both scales as they are), or --gate-up" in reason
    assert plan(folder, ConvertOptions(layout=LayoutName.TRTLLM)).layers[0].reconciled == ()
    refused = ConvertOptions(layout=LayoutName.TRTLLM, gate_up_scales=GateUpPolicy.ERROR)
    assert "Leave --gate-up-scales out: this layout keeps both" in refusal(tmp_path / "f", tensors, refused)


def test_tensor_parallel_sizes_that_cannot_be_served_are_said(tmp_path: Path) -> None:
    text = plan_text(made(tmp_path / "a", replace(LAYER, intermediate=192).tensors()))
    assert "serves tensor-parallel sizes 1, 3, and any expert parallelism" in text
    assert "cannot serve TP 2, 4: convert with --moe-tp for one of them" in text
    assert "cannot serve TP 8: intermediate size 192 cannot be split over 8 tensor-parallel ranks" in text
    text = plan_text(made(tmp_path / "b", replace(LAYER, intermediate=192).tensors(), ConvertOptions(moe_tp=2)))
    assert "serves tensor-parallel sizes 1, 2, 3" not in text
    assert "serves tensor-parallel size 2, no expert parallelism: its experts are padded" in text
    assert "cannot serve TP 1, 4: convert with --moe-tp for one of them" in text
    text = plan_text(made(tmp_path / "c", replace(LAYER, intermediate=96).tensors()))
    assert "cannot serve TP 2: convert with --moe-tp 2 for that" in text


def test_batched_layout_takes_plain_silu_only(tmp_path: Path) -> None:
    batched = ConvertOptions(layout=LayoutName.CUTEDSL_BATCHED)
    assert made(tmp_path / "ok", LAYER.tensors(), batched).layers
    assert "plain SiLU only, these experts have silu clamped at 10" in refusal(
        tmp_path / "a", LAYER.tensors(), batched, swiglu_limit=10.0
    )
    assert "these experts have swigluoai" in refusal(tmp_path / "b", LAYER.tensors(), batched, hidden_act="swigluoai")
    ungated = TinyLayer(names=("up_proj", "down_proj")).tensors()
    assert "these experts have relu2" in refusal(tmp_path / "c", ungated, batched, hidden_act="relu2")
    assert "pads nothing" in refusal(tmp_path / "d", replace(LAYER, intermediate=96).tensors(), batched)
    with pytest.raises(UsageError, match="batched CuteDSL layout has no gate/up blocks"):
        ConvertOptions(layout=LayoutName.CUTEDSL_BATCHED, gate_up_block=16)


def test_odd_configs_do_not_break_planning(tmp_path: Path) -> None:
    for number, value in enumerate([None, [], "x", 7]):
        assert made(tmp_path / str(number), LAYER.tensors(), text_config=value, quantization_config=value).layers
    folder = write(tmp_path / "list", LAYER.tensors())
    (folder / "config.json").write_text("[1]")
    with pytest.raises(SourceError, match="must be a JSON object"):
        plan(folder)


def test_planning_leaves_no_file_open(sample_source: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    plan(sample_source)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_more_shards_than_a_process_may_open(tmp_path: Path) -> None:
    write_sample(tmp_path / "source", SampleModel(experts=100, intermediate=16, hidden=16, shard_nbytes=300))
    opened = len(list(Path("/proc/self/fd").iterdir()))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 40, limits[1]))
    try:
        made = plan(tmp_path / "source")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(made.index.headers) > 100


@pytest.mark.parametrize("name", [f"{PATH}.routed_experts.w2_weight", f"{PATH}.routed_experts.w13_input_scale"])
def test_tensor_with_the_name_of_a_prepared_one(tmp_path: Path, name: str) -> None:
    tensors = merged([LAYER.tensors(), {name: torch.zeros(4)}])
    with pytest.raises(SourceError, match="has the name of one that would be made"):
        plan(write(tmp_path / "source", tensors, config()))


@pytest.mark.parametrize("folder", ["expert-scales.safetensors", "experts-layer-00000.safetensors", "nvfp4_prep.json"])
def test_folder_with_the_name_of_an_output_file(tmp_path: Path, folder: str) -> None:
    source = write(tmp_path / "source", LAYER.tensors(), config())
    (source / folder).mkdir()
    (source / folder / "x.txt").write_text("x")
    with pytest.raises(SourceError, match="folder has the name of a file of the output"):
        plan(source)
