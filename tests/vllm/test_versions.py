"""Versions of vLLM: tested ones, older ones, and newer ones that have to prove themselves."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from vllm.model_executor.layers.fused_moe.config import FusedMoEParallelConfig
from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config, ModelOptNvFp4FusedMoE
from vllm.model_executor.layers.quantization.utils import flashinfer_fp4_moe
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from nvfp4_prep.errors import ServingError
from nvfp4_prep.options import ConvertOptions, LayoutName
from nvfp4_prep.vllm import proof, register
from nvfp4_prep.vllm.interface import interface_problems
from nvfp4_prep.vllm.versions import ALLOW_UNTESTED_VARIABLE, TESTED, Support, support, version_problem
from support.serving.families import COMPRESSED, FAMILIES
from support.serving.results import REFUSALS, Checkpoints
from support.serving.stand_ins import trtllm_on_cpu, without_plugin
from support.serving.states import differences, state_of
from support.serving.tiny_models import TinyModel

QWEN, NEMOTRON = FAMILIES["qwen3_moe"], FAMILIES["nemotron_h"]
NEWER = "0.99.0"


@pytest.fixture
def newer(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The installed vLLM under the version of one that does not exist yet, and registries that are put back."""
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: NEWER if name == "vllm" else real(name))
    monkeypatch.setattr(proof, "_proved", set())
    with without_plugin():
        yield


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The plugin's warnings about versions."""
    found: list[str] = []
    monkeypatch.setattr(proof.logger, "warning_once", lambda text, *values: found.append(text % values))
    return found


def refused_message(what: str, directory: Path) -> str:
    with pytest.raises(ServingError) as caught:
        state_of(directory)
    REFUSALS.append((what, str(caught.value)))
    return str(caught.value)


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("0.20.2", Support.OLDER),
        ("0.27.0", Support.OLDER),
        *((f"{minor}.{patch}", Support.TESTED) for minor in TESTED for patch in ("0", "1", "0+cpu", "1.dev3+g0")),
        ("0.99.0", Support.UNTESTED),
        ("1.0.0", Support.UNTESTED),
        ("dev", Support.UNTESTED),
        ("0.1.dev1+gabcdef", Support.UNTESTED),  # a build from a clone without tags
    ],
)
def test_support(version: str, expected: Support) -> None:
    assert support(version) is expected
    assert (version_problem(version) is None) == (expected is not Support.OLDER)


def test_an_older_version_is_refused_with_the_tested_ones() -> None:
    problem = version_problem("0.20.2") or ""
    assert "older 0.20.2" in problem
    assert all(f"{minor}.x" in problem for minor in TESTED)


def test_a_strict_fleet_refuses_untested_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ALLOW_UNTESTED_VARIABLE, "0")
    assert "0.99.0" in (version_problem("0.99.0") or "")
    assert ALLOW_UNTESTED_VARIABLE in (version_problem("dev") or "")
    assert version_problem(f"{TESTED[-1]}.0") is None


def test_the_installed_interface_is_the_expected_one() -> None:
    assert list(interface_problems()) == []


@pytest.mark.usefixtures("newer")
@pytest.mark.parametrize("model", [QWEN, NEMOTRON, COMPRESSED], ids=["gated", "not gated", "compressed-tensors"])
def test_a_newer_version_that_proves_itself_is_served_with_one_warning(
    checkpoints: Checkpoints, warnings: list[str], model: TinyModel
) -> None:
    source, prepared = checkpoints.get(model)
    expected = state_of(source, moe_backend="flashinfer_cutedsl")
    register()
    assert differences(expected, state_of(prepared)) == []
    assert len(warnings) == 1
    assert f"not tested with vLLM {NEWER}" in warnings[0]
    assert "a tiny layer loaded both ways" in warnings[0]
    assert differences(expected, state_of(prepared)) == []
    assert len(warnings) == 1


@pytest.mark.usefixtures("newer")
@pytest.mark.parametrize("file", [LayoutName.CUTEDSL, LayoutName.TRTLLM, LayoutName.CUTEDSL_BATCHED])
@pytest.mark.parametrize("backend", ["flashinfer_cutedsl", "flashinfer_trtllm"])
def test_a_newer_version_proves_each_kernel_with_each_file(
    checkpoints: Checkpoints, warnings: list[str], file: LayoutName, backend: str
) -> None:
    source, prepared = checkpoints.get(QWEN, ConvertOptions(layout=file))
    with trtllm_on_cpu():
        expected = state_of(source, moe_backend=backend)
        register()
        assert differences(expected, state_of(prepared, moe_backend=backend)) == []
    assert len(warnings) == 1
    assert "a tiny layer loaded both ways" in warnings[0]


@pytest.mark.usefixtures("newer")
def test_the_proof_leaves_stock_checkpoints_alone(checkpoints: Checkpoints, warnings: list[str]) -> None:
    source, _ = checkpoints.get(QWEN)
    register()
    state_of(source, moe_backend="flashinfer_cutedsl")
    assert warnings == []


def renamed_argument(self: Any, moe_layer: Any) -> None:
    """vLLM's method, were its argument renamed."""


def one_more_argument(self: Any, layer: Any, stage: int) -> None:
    """vLLM's method, were it called with one more argument."""


def other_call(self: Any) -> None:
    """A function that cannot be called as the plugin calls it."""


BROKEN = {
    "an argument renamed": (ModelOptNvFp4FusedMoE, "process_weights_after_loading", renamed_argument),
    "an argument more": (ModelOptNvFp4FusedMoE, "process_weights_after_loading", one_more_argument),
    "called otherwise": (ModelOptNvFp4FusedMoE, "_build_moe_kernel", other_call),
    "another loader interface": (BaseModelLoader, "load_weights", other_call),
    "a function that is gone": (ModelOptNvFp4Config, "is_layer_excluded", None),
}


@pytest.mark.usefixtures("newer")
@pytest.mark.parametrize("how", BROKEN)
def test_a_newer_version_with_another_interface_is_refused(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    owner, name, replacement = BROKEN[how]
    source, prepared = checkpoints.get(QWEN)
    with monkeypatch.context() as patched:
        if replacement is None:
            patched.delattr(next(base for base in owner.__mro__ if name in vars(base)), name)
        else:
            patched.setattr(owner, name, replacement)
        register()
    message = refused_message(f"vLLM {NEWER} with {how}", prepared)
    assert f"vLLM {NEWER} is newer than the tested" in message
    assert name in message
    state_of(source, moe_backend="flashinfer_cutedsl")  # the source is served as without the plugin


@pytest.mark.usefixtures("newer")
def test_a_newer_version_that_prepares_other_scales_is_refused_by_the_tiny_layer(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    """The bytes of the four big tensors stay, so the fingerprint agrees."""
    _, prepared = checkpoints.get(QWEN)
    original = flashinfer_fp4_moe.amax_for_moe_activation_quant
    monkeypatch.setattr(flashinfer_fp4_moe, "amax_for_moe_activation_quant", lambda *a, **kw: 2 * original(*a, **kw))
    register()
    message = refused_message(f"vLLM {NEWER} with other input scales", prepared)
    assert "a tiny layer loaded by it and by nvfp4-prep does not come out equal" in message
    assert "w13_input_scale differs" in message
    found = message.partition("come out equal: ")[2].partition(". ")[0].split("; ")
    assert found == sorted(found)  # one difference is reported in the same words at every start
    assert warnings == []


@pytest.mark.usefixtures("newer")
def test_a_newer_version_in_which_no_tiny_layer_can_be_made_is_refused(
    checkpoints: Checkpoints, warnings: list[str]
) -> None:
    _, prepared = checkpoints.get(QWEN)
    register()
    with mock.patch.object(FusedMoEParallelConfig, "make_no_parallel", mock.Mock(side_effect=TypeError("pcp_size"))):
        message = refused_message(f"vLLM {NEWER} in which no tiny layer can be made", prepared)
    assert "TypeError: pcp_size" in message
    assert warnings == []


@pytest.mark.usefixtures("newer")
def test_a_newer_version_with_another_layout_is_refused(checkpoints: Checkpoints, warnings: list[str]) -> None:
    _, prepared = checkpoints.get(QWEN)
    original = flashinfer_fp4_moe.swizzle_blockscale

    def flipped(scale: torch.Tensor) -> torch.Tensor:
        return original(scale).view(torch.uint8).flip(-1).view(scale.dtype)

    register()
    with mock.patch.object(flashinfer_fp4_moe, "swizzle_blockscale", flipped):
        assert "in a layout that this version" in refused_message(f"vLLM {NEWER} with another swizzle", prepared)
    assert warnings == []


def test_an_older_version_refuses_prepared_checkpoints_only(checkpoints: Checkpoints) -> None:
    from nvfp4_prep.vllm.refusal import register_refusal

    source, prepared = checkpoints.get(QWEN)
    with without_plugin():
        register_refusal(version_problem("0.20.2") or "")
        state_of(source, moe_backend="flashinfer_cutedsl")
        assert "refuses to run in the older 0.20.2" in refused_message("vLLM 0.20.2", prepared)
