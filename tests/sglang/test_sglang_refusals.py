"""Refusals: what SGLang with the plugin must not serve, each with its message, and what stock SGLang says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sglang_compare import Job
from sglang_models import COMPRESSED_QWEN, MODELS, Checkpoints
from sglang_on_cpu import load_model, make_server_args, rank_of
from sglang_results import REFUSALS
from sglang_states import differences, snapshot

from nvfp4_prep.errors import ServingError
from nvfp4_prep.options import ConvertOptions, LayoutName

QWEN = MODELS["qwen3_moe"]
INDEX = "model.safetensors.index.json"
EXPERTS = "model.layers.0.mlp.experts"
pytestmark = pytest.mark.usefixtures("plugin")


def refusal(directory: Path, what: str, **options: Any) -> str:
    """The message with which loading fails; recorded for the list at the end."""
    load = options.pop("load", {})
    with pytest.raises(ServingError) as caught:
        args = make_server_args(directory, **options)
        with rank_of(args):
            load_model(args, **load)
    REFUSALS.append((what, str(caught.value)))
    return str(caught.value)


@pytest.fixture
def copy(checkpoints: Checkpoints, tmp_path: Path) -> Callable[..., Path]:
    """A prepared checkpoint of one's own."""

    def make(model: Any = QWEN, options: ConvertOptions | None = None, *, trtllm: bool = False) -> Path:
        _, prepared = checkpoints.get(model, options, trtllm=trtllm)
        return Path(shutil.copytree(prepared, tmp_path / "prepared"))

    return make


def edit_stamp(directory: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((directory / "config.json").read_text())
    edit(config["quantization_config"])
    (directory / "config.json").write_text(json.dumps(config))


def edit_experts(
    directory: Path, edit: Callable[[dict[str, torch.Tensor]], object], holding: str = "w13_weight"
) -> None:
    """Change the tensors of the file that holds this one of layer 0's experts, and the index with them."""
    index = json.loads((directory / INDEX).read_text())
    file = index["weight_map"][f"{EXPERTS}.routed_experts.{holding}"]
    tensors = load_file(directory / file)
    edit(tensors)
    save_file(tensors, directory / file)
    weight_map = {name: where for name, where in index["weight_map"].items() if where != file}
    index["weight_map"] = weight_map | dict.fromkeys(tensors, file)
    (directory / INDEX).write_text(json.dumps(index))


STAMPS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "unknown format version": (lambda stamp: stamp.update(format_version=99), "does not know"),
    "damaged stamp": (lambda stamp: stamp.pop("layout"), "incomplete or damaged"),
    "unknown layout": (lambda stamp: stamp["layout"].update(name="other"), "unknown layout"),
    "fingerprint of another layout": (lambda stamp: stamp["layout"].update(fingerprint="0" * 64), "fingerprint"),
    "source without NVFP4": (lambda stamp: stamp["source"].update(quant_method="fp8"), "cannot hold prepared"),
}


@pytest.mark.parametrize("what", STAMPS)
def test_stamps(copy: Callable[..., Path], what: str) -> None:
    edit, words = STAMPS[what]
    directory = copy()
    edit_stamp(directory, edit)
    assert words in refusal(directory, what)


def test_a_config_that_cannot_be_read(copy: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    """SGLang refuses it in its own words; before that the log says what the plugin could not do."""
    directory = copy()
    (directory / "config.json").write_text("{")
    with pytest.raises(OSError, match="not a valid JSON file"):
        make_server_args(directory)
    told = [record.getMessage() for record in caplog.records if record.name == "nvfp4_prep.sglang.backends"]
    assert len(told) == 1
    assert str(directory) in told[0] and "chooses no MoE runner backend" in told[0]


FILES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], None], str]] = {
    "missing tensor": (lambda t: t.pop(f"{EXPERTS}.routed_experts.w2_weight"), "1 of 8 tensors"),
    "misspelled tensor": (
        lambda t: t.update({f"{EXPERTS}.routed_experts.w2_wait": t.pop(f"{EXPERTS}.routed_experts.w2_weight")}),
        "w2_weight",
    ),
    "other number of experts": (
        lambda t: t.update(
            {name: tensor[:7].clone() for name, tensor in t.items() if name.startswith(f"{EXPERTS}.routed_experts.")}
        ),
        "another number of experts",
    ),
    "other sizes": (
        lambda t: t.update(
            {f"{EXPERTS}.routed_experts.w13_weight": t[f"{EXPERTS}.routed_experts.w13_weight"][:, :128].clone()}
        ),
        "other sizes",
    ),
    "original tensor of one expert": (
        lambda t: t.update({f"{EXPERTS}.3.gate_proj.weight": torch.zeros(128, 128, dtype=torch.uint8)}),
        "original tensor",
    ),
}


@pytest.mark.parametrize("what", FILES)
def test_files(copy: Callable[..., Path], what: str) -> None:
    edit, words = FILES[what]
    directory = copy()
    edit_experts(directory, edit)
    assert words in refusal(directory, what)


def test_the_scales_of_up_are_missing(copy: Callable[..., Path]) -> None:
    """A TRTLLM file has nine tensors a layer: without the ninth, up would be multiplied by gate's scale."""
    directory = copy(replace(QWEN, equal_gate_up=False), trtllm=True)
    lost = "w13_weight_scale_2_up"
    edit_experts(directory, lambda tensors: tensors.pop(f"{EXPERTS}.routed_experts.{lost}"), holding=lost)
    assert "1 of 9 tensors" in refusal(directory, "missing scales of up")


@pytest.mark.parametrize("backend", ["flashinfer_cutlass", "triton", "marlin", "experimental_sgl_trtllm"])
def test_other_backends(copy: Callable[..., Path], backend: str) -> None:
    assert "another MoE runner backend" in refusal(
        copy(), f"--moe-runner-backend {backend}", moe_runner_backend=backend
    )


def test_megamoe(copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernel reads plain weights, whatever runner backend is named beside it."""
    from sglang.srt.layers.moe.utils import MoeA2ABackend

    monkeypatch.setattr(MoeA2ABackend, "is_megamoe", lambda _backend: True)
    message = refusal(copy(trtllm=True), "--moe-a2a-backend megamoe")
    assert "Leave --moe-a2a-backend megamoe out" in message


@pytest.mark.parametrize("model", [QWEN, COMPRESSED_QWEN], ids=["modelopt", "compressed-tensors"])
def test_a_gpu_before_blackwell(copy: Callable[..., Path], model: Any) -> None:
    """SGLang itself refuses; for the source of ModelOpt it would have chosen Marlin, which reads other bytes."""
    from sglang.srt.runtime_context import override_platform

    args = make_server_args(copy(model, trtllm=True))
    with (
        override_platform(is_blackwell=False),
        rank_of(args),
        pytest.raises(ValueError, match="Current platform does not support NVFP4") as caught,
    ):
        load_model(args)
    REFUSALS.append(("no Blackwell GPU (SGLang's own)", str(caught.value)))


def test_deepep_with_the_standard_layout(copy: Callable[..., Path]) -> None:
    message = refusal(copy(), "DeepEP, standard layout", moe_a2a_backend="deepep", deepep_mode="low_latency")
    assert "reads the batched CuteDSL one" in message


def test_batched_layout_without_deepep(copy: Callable[..., Path]) -> None:
    directory = copy(options=ConvertOptions(layout=LayoutName.CUTEDSL_BATCHED))
    assert "reads the CuteDSL one" in refusal(directory, "batched layout without DeepEP")


def test_hidden_size_padded(copy: Callable[..., Path]) -> None:
    assert "hidden size 512" in refusal(copy(QWEN.with_sizes(4, 320, 128)), "H 320 padded to 512")


def test_intermediate_size_padded_for_cutedsl(copy: Callable[..., Path]) -> None:
    assert "flashinfer_trtllm" in refusal(copy(QWEN.with_sizes(4, 256, 96)), "I 96 padded to 128, CuteDSL")


def test_different_scales_with_cutedsl(copy: Callable[..., Path]) -> None:
    directory = copy(replace(QWEN, equal_gate_up=False), trtllm=True)
    message = refusal(directory, "gate/up scales differ, CuteDSL", moe_runner_backend="flashinfer_cutedsl")
    assert "different global scales" in message


def test_different_scales_with_a_clamp_limit() -> None:
    """SGLang answers by multiplying block scales of halves that lie elsewhere in a prepared file."""
    from nvfp4_prep.sglang.modelopt_method import PreparedModelOptMethod

    def check(activation: str, limit: float | None) -> None:
        config = SimpleNamespace(activation=activation, gemm1_clamp_limit=None, swiglu_limit=limit)
        method = SimpleNamespace(enable_flashinfer_trtllm_moe=True, layer_name="experts")
        PreparedModelOptMethod._check_takes_two_scales(method, SimpleNamespace(moe_runner_config=config))

    check("silu", None)
    check("situ", 7.0)
    with pytest.raises(ServingError, match="clamps both") as caught:
        check("silu", 7.0)
    REFUSALS.append(("gate/up scales differ, clamp limit", str(caught.value)))


def test_fused_shared_experts() -> None:
    from nvfp4_prep.sglang.layer_weights import placement_of

    with pytest.raises(ServingError, match="disable-shared-experts-fusion") as caught:
        placement_of(SimpleNamespace(num_fused_shared_experts=1), None, "experts", 256, 128)
    REFUSALS.append(("fused shared experts", str(caught.value)))


def test_tensor_parallel_size_that_the_file_does_not_serve(checkpoints: Checkpoints, ranks: Any) -> None:
    source, prepared = checkpoints.get(QWEN.with_sizes(4, 256, 192), trtllm=True)
    job = Job(str(source), str(prepared), "flashinfer_trtllm", options={"tp_size": 2})
    with pytest.raises(RuntimeError) as caught:
        ranks.run(job)
    message = next(line for line in str(caught.value).splitlines() if "errors.ServingError" in line)
    assert "prepared for tensor-parallel sizes 1, 3 of the experts, not for 2" in message
    REFUSALS.append(("TP2, I 192", message.partition(": ")[2]))


@pytest.mark.parametrize("version", ["0.5.22", "0.6.0", "1.0", "main"])
def test_versions(copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    from nvfp4_prep.sglang import hooks
    from nvfp4_prep.sglang.versions import version_problem

    assert version_problem() is None
    monkeypatch.setattr(hooks, "_refusal", version_problem(version))
    message = refusal(copy(), f"SGLang {version}")
    assert f"refuses to run in {version}" in message


def test_model_class_without_fused_experts(copy: Callable[..., Path]) -> None:
    """SGLang's quantized Mixtral has one linear layer a projection and skips prepared names in silence."""
    assert "no NVFP4 expert layers" in refusal(copy(MODELS["mixtral"]), "quantized Mixtral")


def test_compressed_tensors_with_cutedsl(copy: Callable[..., Path]) -> None:
    """SGLang itself refuses that backend for compressed-tensors."""
    directory = copy(COMPRESSED_QWEN)
    with pytest.raises(AssertionError, match="CuteDSL MOE currently supports only") as caught:
        make_server_args(directory, moe_runner_backend="flashinfer_cutedsl")
    REFUSALS.append(("compressed-tensors, CuteDSL (SGLang's own)", " ".join(str(caught.value).split())))


def test_compressed_tensors_with_a_padded_share(copy: Callable[..., Path]) -> None:
    """SGLang pads a rank's share of I to 128 there; for ModelOpt to 64, as the file does."""
    directory = copy(COMPRESSED_QWEN.with_sizes(4, 256, 192), trtllm=True)
    assert "192 to 256" in refusal(directory, "compressed-tensors, I 192")


def test_online_quantization_on_top(copy: Callable[..., Path]) -> None:
    """SGLang itself refuses another method than the source's."""
    with pytest.raises(ValueError, match="does not match the quantization method") as caught:
        make_server_args(copy(trtllm=True), quantization="nvfp4_online", moe_runner_backend="flashinfer_trtllm")
    REFUSALS.append(("--quantization nvfp4_online (SGLang's own)", str(caught.value)))


def test_a_config_object_without_the_stamp(copy: Callable[..., Path]) -> None:
    """Whatever else makes the config object: it is not used for a stamped checkpoint."""
    from sglang.srt.configs.model_config import ModelConfig

    from nvfp4_prep.sglang.methods import check_stamp_was_taken

    config = ModelConfig.from_server_args(make_server_args(copy()))
    with pytest.raises(ServingError, match="on top of prepared experts") as caught:
        check_stamp_was_taken(object(), config)
    REFUSALS.append(("another config object", str(caught.value)))


@pytest.mark.parametrize("trtllm", [False, True], ids=["cutedsl", "trtllm"])
def test_lora_on_experts(checkpoints: Checkpoints, trtllm: bool) -> None:
    """SGLang itself has no LoRA for these kernels, and its LoRA backends are other MoE runner backends."""
    from sglang.srt.lora.layers import FusedMoEWithLoRA
    from sglang_states import expert_layers

    _, prepared = checkpoints.get(QWEN, trtllm=trtllm)
    args = make_server_args(prepared)
    with rank_of(args):
        layer = next(iter(expert_layers(load_model(args)).values()))
        with pytest.raises(NotImplementedError, match="does not expose quant info") as caught:
            FusedMoEWithLoRA(layer, SimpleNamespace(name="csgmv", is_moe_lora=False))
    REFUSALS.append(("LoRA on experts (SGLang's own)", str(caught.value)))


@pytest.mark.parametrize("load_format", ["sharded_state", "presharded"])
def test_load_formats_of_running_engines(copy: Callable[..., Path], load_format: str) -> None:
    """SGLang chooses its ModelOpt loader first, which knows none of these."""
    with pytest.raises(ValueError, match="Unknown load_format"):
        args = make_server_args(copy())
        with rank_of(args):
            load_model(args, load_format=load_format)


@pytest.mark.parametrize("model", [QWEN, COMPRESSED_QWEN], ids=["modelopt", "compressed-tensors"])
def test_another_instances_memory(copy: Callable[..., Path], model: Any) -> None:
    """It holds what SGLang derived, too; nothing is checked on that way, and SGLang derives nothing afterwards."""
    words = refusal(copy(model, trtllm=True), "remote_instance", load={"load_format": "remote_instance"})
    assert "RemoteInstanceModelLoader does not load a prepared checkpoint's tensors by their names" in words


@pytest.mark.parametrize("load_format", ["sharded_state", "presharded", "layered", "remote"])
def test_load_formats_that_do_not_name_tensors(copy: Callable[..., Path], load_format: str) -> None:
    """For compressed-tensors SGLang has no loader that it chooses first."""
    words = refusal(
        copy(COMPRESSED_QWEN, trtllm=True), f"--load-format {load_format}", load={"load_format": load_format}
    )
    assert "does not load a prepared checkpoint's tensors by their names" in words


def test_a_backup_of_experts(copy: Callable[..., Path]) -> None:
    with pytest.raises(ServingError, match="keeps original experts") as caught:
        make_server_args(copy(), enable_elastic_expert_backup=True)
    REFUSALS.append(("--enable-elastic-expert-backup", str(caught.value)))


def test_presharded_does_not_take_the_source_either(checkpoints: Checkpoints) -> None:
    """What the comparison in the README says: stock ModelOpt NVFP4 with --load-format presharded."""
    source, _ = checkpoints.get(QWEN)
    args = make_server_args(source, moe_runner_backend="flashinfer_trtllm")
    with rank_of(args), pytest.raises(ValueError, match=r"Unknown load_format: LoadFormat\.PRESHARDED"):
        load_model(args, load_format="presharded")


def test_hooks_that_could_not_be_applied(copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang logs such a hook and goes on; a prepared checkpoint is then refused, before anything is loaded."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    lost = next(target for target in HookRegistry._patched if target.endswith("ModelOptFp4Config.get_quant_method"))
    monkeypatch.setattr(HookRegistry, "_patched", HookRegistry._patched - {lost})
    assert "could not be applied" in refusal(copy(), "a hook that could not be applied")


def test_installed_sglang_with_another_layout(copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.layers.moe.moe_runner import flashinfer_cutedsl

    from nvfp4_prep.sglang.installed_layout import check_installed_layout

    original = flashinfer_cutedsl.interleave_w13_halves
    check_installed_layout.cache_clear()
    monkeypatch.setattr(
        flashinfer_cutedsl, "interleave_w13_halves", lambda x, group_size, dim: original(x, group_size=32, dim=dim)
    )
    assert "does not know" in refusal(copy(), "kernel with other blocks")
    check_installed_layout.cache_clear()


def test_stock_checkpoints_are_untouched(checkpoints: Checkpoints) -> None:
    """With the plugin a source loads with SGLang's own classes, and the same without flag."""
    from sglang.srt.layers.quantization.modelopt_quant import ModelOptNvFp4FusedMoEMethod
    from sglang_states import expert_layers

    source, prepared = checkpoints.get(QWEN, trtllm=True)
    states = []
    for directory in (source, prepared):
        args = make_server_args(directory)
        with rank_of(args):
            model = load_model(args)
            stock = {type(layer.quant_method) is ModelOptNvFp4FusedMoEMethod for layer in expert_layers(model).values()}
            assert stock == {directory == source}
            states.append(snapshot(model))
    assert [name for name in differences(*states) if "input_scale" not in name and "self_attn" not in name] == []
