"""Everything that is refused, with the message: nothing wrong may be served in silence."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4FusedMoE

from nvfp4_prep.errors import ServingError
from nvfp4_prep.options import ConvertOptions, LayoutName
from support.serving.compare import Job
from support.serving.families import FAMILIES
from support.serving.installed import NEEDS_PADDING
from support.serving.results import REFUSALS, Checkpoints
from support.serving.stand_ins import batched_all_to_all, installed_kernel_with
from support.serving.vllm_on_cpu import load_model, make_vllm_config, rank_of

QWEN, DEEPSEEK = FAMILIES["qwen3_moe"], FAMILIES["deepseek_v3"]
pytestmark = pytest.mark.usefixtures("plugin")


def serve(directory: Path, **options: Any) -> None:
    config = make_vllm_config(directory, **{"moe_backend": "auto", **options})
    with rank_of(config):
        load_model(config)


def refused(what: str, *texts: str, kind: Any = ServingError, by: Callable[[], Any]) -> None:
    """Asserts a refusal whose message has all ``texts``, and records it."""
    with pytest.raises(kind) as caught:
        by()
    message = str(caught.value)
    REFUSALS.append((what, message))
    for text in texts:
        assert text in message


@pytest.fixture
def prepared(checkpoints: Checkpoints) -> Path:
    return checkpoints.get(QWEN)[1]


@pytest.fixture
def copied(prepared: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(prepared, tmp_path / "copy"))


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_stamp(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    edit_json(directory / "config.json", lambda config: change(config["quantization_config"]))


@pytest.mark.parametrize("backend", ["flashinfer_cutlass", "flashinfer_b12x", "marlin", "cutlass", "triton"])
def test_another_backend(prepared: Path, backend: str) -> None:
    refused(
        f"--moe-backend {backend}",
        "prepared for the CuteDSL kernels",
        f"--moe-backend {backend}",
        "model.layers.0.mlp.experts",
        by=lambda: serve(prepared, moe_backend=backend),
    )


def test_the_backend_by_name_is_accepted(prepared: Path) -> None:
    serve(prepared, moe_backend="flashinfer_cutedsl")


def test_a_device_without_the_kernel_is_refused_by_vllms_own_reason(prepared: Path) -> None:
    from vllm.model_executor.layers.fused_moe.experts.flashinfer_cutedsl_moe import FlashInferCuteDSLExperts

    with mock.patch.object(FlashInferCuteDSLExperts, "_supports_current_device", staticmethod(lambda: False)):
        refused(
            "a GPU without the kernel (sm_90, sm_120)",
            "'FLASHINFER_CUTEDSL' does not support the deployment configuration",
            "current device",
            kind=ValueError,
            by=lambda: serve(prepared),
        )


def test_a_tensor_parallel_size_that_the_file_does_not_serve(checkpoints: Checkpoints, ranks: Any) -> None:
    _, prepared = checkpoints.get(QWEN.with_sizes(8, 256, 192))  # whose source vLLM 0.31 cannot load
    job = Job(str(prepared), str(prepared), options={"parallel": {"tensor_parallel_size": 2}})
    refused(
        "tensor-parallel size 2 of I 192",
        "prepared for tensor-parallel sizes 1, 3",
        "--moe-tp 2",
        kind=RuntimeError,
        by=lambda: ranks.run(job),
    )
    what, message = REFUSALS.pop()
    REFUSALS.append((what, message.strip().splitlines()[-1]))


@pytest.mark.parametrize("model", [QWEN, DEEPSEEK], ids=lambda model: model.family)
def test_a_missing_tensor(checkpoints: Checkpoints, tmp_path: Path, model: Any) -> None:
    directory = Path(shutil.copytree(checkpoints.get(model)[1], tmp_path / "copy"))
    lost = sorted(directory.glob("experts-layer-*"))[-1]
    lost.unlink()

    def forget(index: dict[str, Any]) -> None:
        index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != lost.name}

    edit_json(directory / "model.safetensors.index.json", forget)
    refused(
        f"a missing file ({model.family})",
        "4 of 8 tensors of prepared experts did not arrive: w13_weight, w13_weight_scale, w2_weight, w2_weight_scale",
        "nvfp4-prep verify",
        by=lambda: serve(directory),
    )


@pytest.mark.parametrize("model", [QWEN, DEEPSEEK], ids=lambda model: model.family)
def test_original_expert_tensors_at_a_prepared_layer(checkpoints: Checkpoints, tmp_path: Path, model: Any) -> None:
    source, prepared = checkpoints.get(model)
    directory = Path(shutil.copytree(prepared, tmp_path / "copy"))
    shard = source / "model-00001-of-00002.safetensors"
    name = "zz-source.safetensors"
    save_file({key: value for key, value in load_file(shard).items() if ".experts." in key}, directory / name)
    tensors = load_file(directory / name)
    edit_json(
        directory / "model.safetensors.index.json", lambda v: v["weight_map"].update(dict.fromkeys(tensors, name))
    )
    refused(
        f"the source's expert tensors among the prepared ones ({model.family})",
        "for a layer that the stamp says is prepared",
        by=lambda: serve(directory),
    )


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [("num_experts", 4, "another number of experts"), ("moe_intermediate_size", 192, "other sizes")],
)
def test_sizes_that_disagree_with_the_model(copied: Path, key: str, value: int, text: str) -> None:
    edit_json(copied / "config.json", lambda config: config.update({key: value}))
    refused(f"config.json with {key} {value}", "does not fit the model", text, by=lambda: serve(copied))


def test_an_unknown_format_version(copied: Path) -> None:
    edit_stamp(copied, lambda stamp: stamp.update(format_version=2))
    refused("format_version 2", "does not know", "expected 1, found 2", by=lambda: serve(copied))


def test_an_unknown_layout(copied: Path) -> None:
    edit_stamp(copied, lambda stamp: stamp["layout"].update(name="flashinfer_cutedsl_v9"))
    refused("layout flashinfer_cutedsl_v9", "unknown layout", by=lambda: serve(copied))


def test_a_damaged_stamp(copied: Path) -> None:
    edit_stamp(copied, lambda stamp: stamp["layout"].pop("moe_tp"))
    refused("a stamp without moe_tp", "incomplete or damaged", "moe_tp", by=lambda: serve(copied))


def test_a_foreign_fingerprint(copied: Path) -> None:
    edit_stamp(copied, lambda stamp: stamp["layout"].update(fingerprint="0" * 64))
    refused("another fingerprint", "fingerprint does not match", by=lambda: serve(copied))


def test_a_source_that_cannot_hold_prepared_experts(copied: Path) -> None:
    edit_stamp(copied, lambda stamp: stamp.update(source={"quant_method": "fp8"}))
    refused("source method fp8", "cannot hold prepared experts", "found fp8", by=lambda: serve(copied))


def test_a_kernel_with_another_block_height(prepared: Path) -> None:
    with installed_kernel_with(16):
        refused(
            "a kernel that wants blocks of 16 rows",
            "another gate/up block height",
            "expected 16 rows, found 64 rows",
            "NVFP4_PREP_RELAYOUT=1",
            by=lambda: serve(prepared),
        )


def test_a_kernel_with_an_unknown_layout(prepared: Path) -> None:
    from vllm.model_executor.layers.quantization.utils import flashinfer_fp4_moe

    from nvfp4_prep.vllm.layout_check import installed_layout

    installed_layout.cache_clear()
    original = flashinfer_fp4_moe.swizzle_blockscale

    def changed(scale: torch.Tensor) -> torch.Tensor:
        return original(scale).view(torch.uint8).flip(-1).view(scale.dtype)

    with mock.patch.object(flashinfer_fp4_moe, "swizzle_blockscale", changed):
        refused("a kernel with another swizzle", "in a layout that this version", by=lambda: serve(prepared))


@NEEDS_PADDING
def test_hidden_padding_that_changed_in_vllm(prepared: Path) -> None:
    """The fingerprint's layer needs no padding; the second fixed layer is there for this."""
    from vllm.model_executor.layers.quantization.utils import flashinfer_fp4_moe

    from nvfp4_prep.vllm.layout_check import installed_layout

    installed_layout.cache_clear()
    original = flashinfer_fp4_moe.align_fp4_moe_hidden_dim_for_fi
    narrow = lambda *tensors: original(*tensors, min_alignment=128)  # noqa: E731
    with mock.patch.object(flashinfer_fp4_moe, "align_fp4_moe_hidden_dim_for_fi", narrow):
        refused("a vLLM that pads H to 128", "in a layout that this version", by=lambda: serve(prepared))


@pytest.mark.parametrize("load_format", ["ipc_cache", "sharded_state", "runai_streamer_sharded", "tensorizer"])
def test_load_formats_of_running_engines(prepared: Path, load_format: str) -> None:
    from vllm.model_executor.model_loader.utils import initialize_model

    config = make_vllm_config(prepared, moe_backend="auto")
    config.load_config.load_format = load_format
    with rank_of(config):
        refused(
            f"--load-format {load_format}",
            f"--load-format {load_format} holds weights of a running engine",
            by=lambda: initialize_model(vllm_config=config),
        )


def online_quantization(**moe: str) -> Any:
    """What --quantization-config '{"moe": {…}}' becomes."""
    from vllm.config.quantization import QuantizationConfigArgs, QuantSpec

    return QuantizationConfigArgs(moe=QuantSpec(**moe))


@pytest.mark.parametrize("model", [QWEN, replace(QWEN, quant="modelopt_mixed")], ids=["modelopt", "mixed"])
def test_online_quantization_on_top(checkpoints: Checkpoints, model: Any) -> None:
    _, prepared = checkpoints.get(model)
    online = online_quantization(weight="fp8_per_block_static")
    refused(
        f"online quantization of the experts ({model.quant})",
        "online quantization",
        kind=(ServingError, ValueError),  # vLLM 0.31 refuses it by itself
        by=lambda: serve(prepared, model={"quantization_config": online}),
    )


def test_an_activation_override(prepared: Path) -> None:
    if "per_token_activation" not in inspect.getsource(ModelOptNvFp4FusedMoE):
        pytest.skip("this vLLM has no activation override")
    refused(
        "activation override nvfp4_per_token",
        "on top of prepared experts",
        by=lambda: serve(prepared, model={"quantization_config": online_quantization(activation="nvfp4_per_token")}),
    )


def test_the_standard_layout_under_batched_all_to_all(prepared: Path) -> None:
    with batched_all_to_all():
        refused(
            "the standard layout with a batched all-to-all",
            "prepared for the CuteDSL kernel, but this deployment",
            "FLASHINFER_CUTEDSL_BATCHED",
            "--layout cutedsl-batched",
            by=lambda: serve(prepared),
        )


def test_the_batched_layout_without_batched_all_to_all(checkpoints: Checkpoints) -> None:
    _, prepared = checkpoints.get(QWEN, ConvertOptions(layout=LayoutName.CUTEDSL_BATCHED))
    refused(
        "the batched layout without a batched all-to-all",
        "prepared for the batched CuteDSL kernel",
        "--layout cutedsl",
        by=lambda: serve(prepared),
    )


def test_fused_shared_experts() -> None:
    from nvfp4_prep.vllm.moe_method import PreparedNvFp4MoEMethod

    method = PreparedNvFp4MoEMethod.__new__(PreparedNvFp4MoEMethod)
    method.layer_name = "model.layers.1.mlp.experts"
    layer = SimpleNamespace(expert_map_manager=SimpleNamespace(num_fused_shared_experts=1), moe_config=None)
    refused("fused shared experts", "shared experts fused", by=lambda: method._placement(layer, 8, 256))


def test_substituted_experts() -> None:
    from nvfp4_prep.vllm.moe_method import PreparedNvFp4MoEMethod

    method = PreparedNvFp4MoEMethod.__new__(PreparedNvFp4MoEMethod)
    method.layer_name = "model.layers.1.mlp.experts"
    moe = SimpleNamespace(num_experts=6, num_logical_experts=8)
    layer = SimpleNamespace(expert_map_manager=SimpleNamespace(num_fused_shared_experts=0), moe_config=moe)
    refused("substituted experts", "substituted experts", by=lambda: method._placement(layer, 6, 256))


def test_a_parameter_is_not_touched_by_a_tensor_of_another_dtype(checkpoints: Checkpoints) -> None:
    from nvfp4_prep.serving.placement import Placement
    from nvfp4_prep_kernels import MoeDims, MoeLayout

    placement = Placement("layer", MoeLayout.cutedsl(gated=True), MoeDims(2, 64, 256), 0, 1, (0, 1))
    param = torch.zeros(placement.local_shape("w13_weight"), dtype=torch.uint8)
    wrong = torch.ones(placement.stored_shape("w13_weight"), dtype=torch.int8)
    refused("a tensor of another dtype", "another dtype", "int8", by=lambda: placement.fill("w13_weight", param, wrong))
    assert not param.any()
