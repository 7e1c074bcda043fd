"""The forward pass up to the kernel's launch, of the source and of the prepared checkpoint."""

from __future__ import annotations

import pytest

from nvfp4_prep.options import ConvertOptions, LayoutName
from nvfp4_prep.vllm.reference_moe import REFERENCE_VARIABLE
from support.serving.families import FAMILIES
from support.serving.forward import TOKENS, run_layers
from support.serving.installed import NEEDS_PADDING
from support.serving.results import Checkpoints
from support.serving.states import differences
from support.serving.tiny_models import TinyModel

pytestmark = pytest.mark.usefixtures("plugin")


@pytest.mark.parametrize(
    "model",
    [
        FAMILIES["deepseek_v3"],
        FAMILIES["qwen3_moe"],
        FAMILIES["nemotron_h"],
        pytest.param(FAMILIES["qwen3_moe"].with_sizes(8, 320, 96), marks=NEEDS_PADDING),
        pytest.param(FAMILIES["nemotron_h"].with_sizes(8, 320, 192), marks=NEEDS_PADDING),
    ],
    ids=["deepseek_v3", "qwen3_moe", "nemotron_h", "qwen3_moe padded", "nemotron_h padded"],
)
def test_kernel_arguments_and_outputs_are_the_sources(checkpoints: Checkpoints, model: TinyModel) -> None:
    source, prepared = checkpoints.get(model)
    expected, actual = run_layers(source, moe_backend="flashinfer_cutedsl"), run_layers(prepared)
    assert differences(expected, actual) == []
    assert sum(name.endswith("/w1_weight_sf") for name in actual) == 2
    for name, value in actual.items():
        if name.endswith("/output"):
            assert value.shape[0] == TOKENS
            assert bool(value.isfinite().all())
            assert bool(value.any())


@pytest.mark.parametrize("file", [LayoutName.CUTEDSL, LayoutName.TRTLLM])
@pytest.mark.parametrize("family", ["qwen3_moe", "nemotron_h"])
def test_the_reference_experts_give_the_outputs_of_the_replaced_launch(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, family: str, file: LayoutName
) -> None:
    source, prepared = checkpoints.get(FAMILIES[family], ConvertOptions(layout=file))
    expected = run_layers(source, moe_backend="flashinfer_cutedsl")
    monkeypatch.setenv(REFERENCE_VARIABLE, "1")
    actual = run_layers(prepared, moe_backend="flashinfer_cutedsl")
    assert len(actual) == 2
    assert differences({name: expected[name] for name in actual}, actual) == []
