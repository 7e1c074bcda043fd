"""Both kernels from either file: TRTLLM-gen's and CuteDSL's parameters, bit-equal to what vLLM makes of the source."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from nvfp4_prep.errors import ServingError
from nvfp4_prep.options import ConvertOptions, GateUpPolicy, LayoutName
from support.serving.families import FAMILIES
from support.serving.installed import NEEDS_PADDING, reload_from
from support.serving.results import Checkpoints
from support.serving.stand_ins import batched_prepare, trtllm_on_cpu
from support.serving.states import differences, experts_state, snapshot, state_of, storage_of
from support.serving.tiny_models import TinyModel
from support.serving.vllm_on_cpu import load_model, make_vllm_config, rank_of, routed_experts

QWEN, DEEPSEEK, NEMOTRON = FAMILIES["qwen3_moe"], FAMILIES["deepseek_v3"], FAMILIES["nemotron_h"]
PADDED = QWEN.with_sizes(4, 320, 96)
FILES = {name: ConvertOptions(layout=LayoutName(name)) for name in ("cutedsl", "trtllm")}
BACKENDS = {"cutedsl": "flashinfer_cutedsl", "trtllm": "flashinfer_trtllm"}
CLASSES = {
    "cutedsl": {"FlashInferCuteDSLExperts"},
    "trtllm": {"TrtLlmNvFp4ExpertsMonolithic", "TrtLlmNvFp4ExpertsModular"},
}
TRTLLM = FILES["trtllm"]
pytestmark = pytest.mark.usefixtures("plugin", "both_kernels")


@pytest.fixture
def both_kernels() -> Iterator[None]:
    with trtllm_on_cpu():
        yield


def kernels(directory: Path, **options: Any) -> dict[str, Any]:
    """The layers' state, with what the TRTLLM-gen kernel object derives from the scales."""
    config = make_vllm_config(directory, **{"moe_backend": "auto", **options})
    with rank_of(config):
        return with_factors(load_model(config))


def with_factors(model: torch.nn.Module) -> dict[str, Any]:
    state = experts_state(model)
    for name, layer in routed_experts(model).items():
        experts = layer.quant_method.moe_kernel.fused_experts
        for key in ("g1_scale_c", "gemm1_clamp_limit", "gemm1_beta", "gemm1_alpha"):
            value = getattr(experts, key, None)
            state[f"{name}/factor.{key}"] = value.detach().clone() if isinstance(value, torch.Tensor) else value
        state[f"{name}/parameters"] = sorted(key for key, _ in layer.named_parameters())
    return state


@pytest.mark.parametrize("kernel", BACKENDS)
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    "model",
    [QWEN, DEEPSEEK, NEMOTRON, pytest.param(PADDED, marks=NEEDS_PADDING)],
    ids=["qwen", "deepseek", "nemotron", "padded"],
)
def test_each_kernel_from_each_file(checkpoints: Checkpoints, model: TinyModel, file: str, kernel: str) -> None:
    source, prepared = checkpoints.get(model, FILES[file])
    expected = kernels(source, moe_backend=BACKENDS[kernel])
    actual = kernels(prepared, moe_backend=BACKENDS[kernel])
    assert differences(expected, actual) == []
    ran = {value[0] for name, value in actual.items() if name.endswith("/classes")}
    assert ran <= CLASSES[kernel]


@pytest.mark.parametrize("file", FILES)
def test_without_a_flag_the_file_says_which_kernel(checkpoints: Checkpoints, file: str) -> None:
    """Stock vLLM chooses TRTLLM here; a CuteDSL file is served with CuteDSL all the same."""
    source, prepared = checkpoints.get(QWEN, FILES[file])
    assert {v[1] for n, v in kernels(source).items() if n.endswith("/classes")} == {"FLASHINFER_TRTLLM"}
    expected = kernels(source, moe_backend=BACKENDS[file])
    assert differences(expected, kernels(prepared)) == []


@NEEDS_PADDING
def test_the_load_format_of_ours(checkpoints: Checkpoints) -> None:
    source, prepared = checkpoints.get(PADDED, TRTLLM)
    for kernel, backend in BACKENDS.items():
        expected = kernels(source, moe_backend=backend)
        actual = kernels(prepared, moe_backend=backend, load={"load_format": "nvfp4_prep"})
        assert differences(expected, actual) == [], kernel


@pytest.mark.parametrize("kernel", BACKENDS)
@pytest.mark.parametrize("file", FILES)
def test_reload(checkpoints: Checkpoints, file: str, kernel: str) -> None:
    """The same values in the same storage after other weights and the first ones again."""
    _, prepared = checkpoints.get(DEEPSEEK, FILES[file])
    _, other = checkpoints.get(replace(DEEPSEEK, family="deepseek_v3x"), FILES[file])
    expected_other = kernels(other, moe_backend=BACKENDS[kernel])
    config = make_vllm_config(prepared, moe_backend=BACKENDS[kernel])
    with rank_of(config):
        loaded = load_model(config)
        first, where, factors = snapshot(loaded), storage_of(loaded), with_factors(loaded)
        for directory in (other, prepared):
            reload_from(config, loaded, directory)
            assert storage_of(loaded) == where
            if directory == other:
                assert differences(with_factors(loaded), expected_other) == []
        assert differences(first, snapshot(loaded)) == []
        assert differences(factors, with_factors(loaded)) == []


def stories(caplog: pytest.LogCaptureFixture, call: Any) -> str:
    """What the plugin logs, whether or not it said so before in this process."""
    from nvfp4_prep.vllm import backend_choice, moe_method

    said: list[str] = []
    keep = lambda text, *values: said.append(text % values)  # noqa: E731
    talking = mock.Mock(info_once=keep, warning_once=keep)
    with mock.patch.object(backend_choice, "logger", talking), mock.patch.object(moe_method, "logger", talking):
        call()
    return "\n".join(dict.fromkeys(said))


def test_the_log_says_what_runs_and_what_would_have(checkpoints: Checkpoints, caplog: pytest.LogCaptureFixture) -> None:
    _, cutedsl = checkpoints.get(QWEN, FILES["cutedsl"])
    _, trtllm = checkpoints.get(QWEN, TRTLLM)
    told = stories(caplog, lambda: kernels(cutedsl))
    assert "run FLASHINFER_CUTEDSL, for which this checkpoint was made" in told
    assert "vLLM would have chosen FLASHINFER_TRTLLM here: --moe-backend flashinfer_trtllm serves" in told
    assert "rearranged" not in told
    told = stories(caplog, lambda: kernels(trtllm))
    assert "run FLASHINFER_TRTLLM, for which this checkpoint was made; vLLM chooses it for the source too." in told
    told = stories(caplog, lambda: kernels(cutedsl, moe_backend="flashinfer_trtllm"))
    assert "run FLASHINFER_TRTLLM, asked for by --moe-backend" in told
    assert "prepared for another kernel (flashinfer_cutedsl)" in told and "rearranged on the device" in told


def test_the_reference_code_computes_either_file(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of the CuteDSL layout: a TRTLLM-gen file is rearranged for it, and refused where nobody said so."""
    from nvfp4_prep.vllm.reference_moe import REFERENCE_VARIABLE

    _, cutedsl = checkpoints.get(QWEN, FILES["cutedsl"])
    _, trtllm = checkpoints.get(QWEN, TRTLLM)
    monkeypatch.setenv(REFERENCE_VARIABLE, "1")
    expected = kernels(cutedsl)
    assert differences(expected, kernels(trtllm, moe_backend="flashinfer_cutedsl")) == []
    with pytest.raises(ServingError, match="computes experts in the CuteDSL kernel's layout only"):
        kernels(trtllm)


DIFFERING = replace(QWEN, equal_gate_up=False)


def test_two_factors(checkpoints: Checkpoints) -> None:
    """Stock vLLM takes gate's factor for up; ours is up's own, and nothing else differs."""
    source, prepared = checkpoints.get(DIFFERING, TRTLLM)
    stock, ours = kernels(source, moe_backend="flashinfer_trtllm"), kernels(prepared)
    names = differences(stock, ours)
    assert names and {name.split("/")[1] for name in names} == {"factor.g1_scale_c"}
    from safetensors.torch import load_file

    stored = load_file(prepared / "expert-scales.safetensors")
    for name in names:
        layer = name.split("/")[0]
        up = next(v for k, v in stored.items() if k.startswith(layer) and k.endswith("w13_weight_scale_2_up"))
        quant_scale, input_scale = ours[f"{layer}/kernel.a2_gscale"], ours[f"{layer}/w13_input_scale"]
        assert torch.equal(ours[name], up * input_scale * quant_scale)


def test_two_factors_after_a_reload(checkpoints: Checkpoints) -> None:
    _, prepared = checkpoints.get(DIFFERING, TRTLLM)
    config = make_vllm_config(prepared, moe_backend="auto")
    with rank_of(config):
        loaded = load_model(config)
        before = with_factors(loaded)
        reload_from(config, loaded, prepared)
        assert differences(before, with_factors(loaded)) == []


def test_the_policy_vllm_is_bit_equal_to_stock(checkpoints: Checkpoints) -> None:
    options = ConvertOptions(layout=LayoutName.TRTLLM, gate_up_scales=GateUpPolicy.VLLM)
    source, prepared = checkpoints.get(DIFFERING, options)
    for backend in BACKENDS.values():
        assert differences(kernels(source, moe_backend=backend), kernels(prepared, moe_backend=backend)) == []


def test_two_factors_do_not_fit_the_cutedsl_kernel(checkpoints: Checkpoints) -> None:
    _, prepared = checkpoints.get(DIFFERING, TRTLLM)
    with pytest.raises(ServingError, match="different global scales, and the CuteDSL kernels take one"):
        kernels(prepared, moe_backend="flashinfer_cutedsl")


def test_two_factors_do_not_fit_a_clamp(checkpoints: Checkpoints) -> None:
    from nvfp4_prep.vllm.up_factor import UpFactor

    layer = torch.nn.Module()
    layer.w13_weight_scale_2 = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    layer.w13_weight_scale_2_up = torch.nn.Parameter(torch.full((2,), 2.0), requires_grad=False)
    factor = UpFactor(layer, "layer")
    assert not hasattr(layer, "w13_weight_scale_2_up")
    factor.check_kernel(mock.Mock(is_situ=False, gemm1_clamp_limit=None, gemm1_beta=None, gemm1_alpha=None))
    with pytest.raises(ServingError, match="with this activation"):
        factor.check_kernel(mock.Mock(is_situ=False, gemm1_clamp_limit=torch.ones(2)))


@pytest.mark.parametrize("model", [QWEN, DEEPSEEK], ids=["qwen", "deepseek"])
@pytest.mark.parametrize("file", FILES)
def test_the_batched_kernel_from_a_standard_file(checkpoints: Checkpoints, model: TinyModel, file: str) -> None:
    source, prepared = checkpoints.get(model, FILES[file])
    with batched_prepare():
        expected = state_of(source, moe_backend="flashinfer_cutedsl")
        assert differences(expected, state_of(prepared, moe_backend="flashinfer_cutedsl")) == []


@pytest.mark.parametrize("backend", BACKENDS.values())
def test_a_standard_kernel_from_a_batched_file(checkpoints: Checkpoints, backend: str) -> None:
    source, prepared = checkpoints.get(QWEN, ConvertOptions(layout=LayoutName.CUTEDSL_BATCHED))
    assert differences(kernels(source, moe_backend=backend), kernels(prepared, moe_backend=backend)) == []


def test_sizes_that_the_batched_kernel_does_not_take(checkpoints: Checkpoints) -> None:
    _, prepared = checkpoints.get(PADDED, TRTLLM)
    with batched_prepare(), pytest.raises(ServingError, match="the batched kernel pads nothing"):
        state_of(prepared, moe_backend="flashinfer_cutedsl")


def test_a_kernel_with_an_unknown_shuffle(checkpoints: Checkpoints) -> None:
    import flashinfer.fused_moe.core as core

    from nvfp4_prep.vllm.layout_check import installed_layout

    _, prepared = checkpoints.get(QWEN, TRTLLM)
    installed_layout.cache_clear()
    original = core.get_w2_permute_indices_with_cache
    changed = lambda *arguments, **options: original(*arguments, **options).flip(0)  # noqa: E731
    with (
        mock.patch.object(core, "get_w2_permute_indices_with_cache", changed),
        pytest.raises(ServingError, match="in a layout that this version"),
    ):
        kernels(prepared)
    installed_layout.cache_clear()
