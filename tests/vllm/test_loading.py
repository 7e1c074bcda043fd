"""Load formats, dummy weights, reloads, other kernels' block heights, the batched layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nvfp4_prep.options import ConvertOptions, LayoutName
from support.serving.families import FAMILIES
from support.serving.installed import NEEDS_PADDING, reload_from
from support.serving.results import Checkpoints
from support.serving.stand_ins import batched_prepare, installed_kernel_with
from support.serving.states import differences, experts_state, snapshot, state_of, state_of_open, storage_of
from support.serving.tiny_models import TinyModel
from support.serving.vllm_on_cpu import load_model, make_vllm_config, rank_of, routed_experts

QWEN, DEEPSEEK, NEMOTRON = FAMILIES["qwen3_moe"], FAMILIES["deepseek_v3"], FAMILIES["nemotron_h"]
pytestmark = pytest.mark.usefixtures("plugin")


@pytest.mark.parametrize(
    "load",
    [
        {"load_format": "safetensors"},
        {"model_loader_extra_config": {"enable_multithread_load": True, "num_threads": 3}},
        {"safetensors_load_strategy": "eager"},
        {"safetensors_load_strategy": "prefetch"},
    ],
    ids=["safetensors", "multithread", "eager", "prefetch"],
)
@pytest.mark.parametrize("model", [QWEN, DEEPSEEK], ids=lambda model: model.family)
def test_load_formats(checkpoints: Checkpoints, model: TinyModel, load: dict[str, Any]) -> None:
    source, prepared = checkpoints.get(model)
    expected = state_of(source, moe_backend="flashinfer_cutedsl")
    assert differences(expected, state_of(prepared, load=load)) == []


def test_dummy_weights_need_no_files(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """--load-format dummy: positive scales, the same shapes and sizes as with files."""
    _, prepared = checkpoints.get(QWEN)
    (tmp_path / "config.json").write_bytes((prepared / "config.json").read_bytes())
    dummy, real = state_of(tmp_path, load={"load_format": "dummy"}), state_of(prepared)
    assert dummy.keys() == real.keys()
    for name, value in real.items():
        if isinstance(value, torch.Tensor):
            assert (dummy[name].shape, dummy[name].dtype) == (value.shape, value.dtype), name
        else:
            assert dummy[name] == value, name
        if name.endswith(("scale_2", "input_scale")):
            assert bool((dummy[name] > 0).all())


@pytest.mark.parametrize("model", [QWEN, DEEPSEEK, NEMOTRON], ids=lambda model: model.family)
def test_layerwise_reload_twice(checkpoints: Checkpoints, model: TinyModel) -> None:
    """The same values in the same storage, scales multiplied once, the kernel object reading that storage."""
    _, prepared = checkpoints.get(model)
    _, other = checkpoints.get(replace(model, family=f"{model.family}x"))  # other bytes, same sizes
    config = make_vllm_config(prepared, moe_backend="auto")
    with rank_of(config):
        loaded = load_model(config)
        first, where = snapshot(loaded), storage_of(loaded)
        for directory in (other, prepared, prepared):
            reload_from(config, loaded, directory)
            assert storage_of(loaded) == where
            if directory == other:
                assert any("w13_weight" in name for name in differences(first, snapshot(loaded)))
                assert differences(experts_state(loaded), state_of_open(other)) == []
        assert differences(first, snapshot(loaded)) == []


@pytest.mark.parametrize(
    "model",
    [QWEN, NEMOTRON, pytest.param(DEEPSEEK.with_sizes(8, 320, 96), marks=NEEDS_PADDING)],
    ids=lambda model: model.family,
)
def test_eplb_moves_experts_in_place(checkpoints: Checkpoints, model: TinyModel) -> None:
    """After EPLB rearranged whole experts, the kernel's views and alphas are those of the moved experts."""
    states = []
    for directory, backend in zip(checkpoints.get(model), ("flashinfer_cutedsl", "auto"), strict=True):
        config = make_vllm_config(directory, moe_backend=backend)
        with rank_of(config):
            loaded = load_model(config)
            before = experts_state(loaded)
            for layer in routed_experts(loaded).values():
                for weights in layer.get_expert_weights():
                    assert weights.shape[0] == 8
                    weights.copy_(weights.flip(0).clone())
            states.append(experts_state(loaded))
            changed = {name.split("/")[1] for name in differences(before, states[-1])}
            assert {"w13_weight", "w2_weight", "kernel.w1_scale", "kernel.w2_scale", "kernel.g1_alphas"} <= changed
    assert differences(*states) == []


@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize(
    "model",
    [pytest.param(QWEN, id="aligned"), pytest.param(QWEN.with_sizes(4, 320, 96), id="padded", marks=NEEDS_PADDING)],
)
def test_relayout_while_loading(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, block: int, model: TinyModel
) -> None:
    """A kernel that wants other blocks: with NVFP4_PREP_RELAYOUT=1 the result is what that vLLM prepares itself."""
    monkeypatch.setenv("NVFP4_PREP_RELAYOUT", "1")
    source, prepared = checkpoints.get(model)
    with installed_kernel_with(block):
        expected = state_of(source, moe_backend="flashinfer_cutedsl")
        assert differences(expected, state_of(prepared)) == []
        _, as_wanted = checkpoints.get(model, ConvertOptions(gate_up_block=block))
        assert differences(expected, state_of(as_wanted)) == []
    assert any(name.endswith("w13_weight") for name in differences(expected, state_of(prepared)))


@pytest.mark.parametrize("model", [QWEN, DEEPSEEK, QWEN.with_sizes(8, 384, 192)], ids=["qwen", "deepseek", "384x192"])
def test_batched_layout(checkpoints: Checkpoints, model: TinyModel) -> None:
    source, prepared = checkpoints.get(model, ConvertOptions(layout=LayoutName.CUTEDSL_BATCHED))
    with batched_prepare():
        expected = state_of(source, moe_backend="flashinfer_cutedsl")
        actual = state_of(prepared)
    assert differences(expected, actual) == []
    classes = [value for name, value in actual.items() if name.endswith("/classes")]
    assert classes == [("FlashInferCuteDSLBatchedExperts", "FLASHINFER_CUTEDSL_BATCHED")] * 2


@pytest.mark.parametrize("model", [QWEN, DEEPSEEK], ids=lambda model: model.family)
def test_a_reload_after_deep_sleep(checkpoints: Checkpoints, model: TinyModel) -> None:
    """Sleep mode, level 2, discards every byte of the pool that held weights, the kernel's own tensors too."""
    _, prepared = checkpoints.get(model)
    config = make_vllm_config(prepared, moe_backend="auto")
    with rank_of(config):
        loaded = load_model(config)
        first, where = experts_state(loaded), storage_of(loaded)
        for layer in routed_experts(loaded).values():
            quant = layer.quant_method.moe_quant_config
            for tensor in (*layer.parameters(), quant.a1_gscale, quant.a2_gscale):
                tensor.data.view(torch.uint8).fill_(0x7F)
        assert differences(first, experts_state(loaded)) != []
        reload_from(config, loaded, prepared)
        assert storage_of(loaded) == where
        assert differences(first, experts_state(loaded)) == []
