"""FlashInfer's own code says that our bytes, shapes and calls are right, as far as one can hear it without a card."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from nvfp4_prep_kernels import MoeDims, MoeLayout, flashinfer_moe
from nvfp4_prep_kernels.flashinfer_moe import FlashInferMoe, FlashInferUnavailableError, bind_call, mma_view
from nvfp4_prep_kernels.moe_types import ActivationFunction, MoeActivation, MoeTokens, PreparedExperts
from nvfp4_prep_kernels.scale_swizzle import swizzle_scales
from support.moe_cases import random_layer
from support.paths import DATA, SUPPORT

TESTS = SUPPORT
SIGNATURES: dict[str, dict[str, Any]] = json.loads((DATA / "flashinfer_signatures.json").read_text())
SITU = MoeActivation(ActivationFunction.SITU, situ_beta=4.0)


def needs_flashinfer() -> None:
    """Skips without FlashInfer, unless the environment says that it must be there (CI does)."""
    if importlib.util.find_spec("flashinfer") is None:
        if os.environ.get("NVFP4_PREP_REQUIRE_FLASHINFER"):
            pytest.fail("FlashInfer is required here and not installed")
        pytest.skip("FlashInfer is not installed")


def run(program: str) -> list[list[str]]:
    needs_flashinfer()
    done = subprocess.run(
        [sys.executable, str(TESTS / program)], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [line.split() for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_flashinfers_kernels_compile_for_sm_100a_from_prepared_layers() -> None:
    lines = {line[0]: line[1:] for line in run("compile_flashinfer.py")}
    for case in ("gated", "padded", "non-gated", "oai", "situ"):
        assert lines[case][:2] == ["gemm1", "gemm2"], case
    assert lines["batched"][:2] == ["batched", "batched"]
    # each distinct kernel left machine code; "padded" runs the kernel of "gated"
    for case, least in (("gated", 2), ("non-gated", 1), ("oai", 1), ("situ", 1), ("batched", 1)):
        sizes = [int(size) for size in lines[case][lines[case].index("cubin") + 1 :]]
        assert len(sizes) >= least and min(sizes) > 10_000, (case, sizes)


@pytest.mark.slow
def test_flashinfers_scale_layout_gives_our_bytes() -> None:
    lines = run("flashinfer_scale_layout.py")
    assert len(lines) == 9
    assert all(line[-1] == "equal" for line in lines), lines


@pytest.mark.slow
def test_flashinfers_row_orders_for_trtllm_give_our_bytes() -> None:
    lines = run("flashinfer_row_order.py")
    assert len(lines) == 5 * 4
    assert all(line[-1] == "equal" for line in lines), lines


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": MoeLayout.trtllm(gated=True)}, "layout trtllm is for another kernel"),
        ({"layout": MoeLayout.cutedsl_batched()}, "layout cutedsl-batched is for another kernel"),
        ({"w13_weight_scale_2_up": torch.ones(2)}, "one global scale"),
    ],
    ids=["trtllm", "batched", "two scales"],
)
def test_what_the_cutedsl_kernel_cannot_read_is_refused(change: dict[str, Any], message: str) -> None:
    experts, tokens, out = sample()
    with pytest.raises(FlashInferUnavailableError, match=message):
        FlashInferMoe()(replace(experts, **change), tokens, MoeActivation(), out)


def sample() -> tuple[PreparedExperts, MoeTokens, torch.Tensor]:
    prepared = random_layer(
        MoeLayout.cutedsl(gated=True), MoeDims(2, 128, 256), MoeActivation(), torch.device("cpu")
    ).prepared
    tokens = MoeTokens(
        torch.zeros(3, 128, dtype=torch.uint8),
        torch.zeros(3, 16, dtype=torch.uint8),
        torch.zeros(3, 2, dtype=torch.int64),
        torch.zeros(3, 2, dtype=torch.float64),
    )
    return prepared, tokens, torch.zeros(3, 256, dtype=torch.bfloat16)


def as_signature(recorded: dict[str, Any]) -> inspect.Signature:
    """A recorded signature as Python's own, which refuses what the real function would refuse."""
    names, optional = recorded["positional"], recorded["defaults"]
    parameters = [
        inspect.Parameter(
            name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=None if i >= len(names) - optional else inspect.Parameter.empty,
        )
        for i, name in enumerate(names)
    ]
    parameters += [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if name in recorded["kw_required"] else None,
        )
        for name in recorded["keyword_only"]
    ]
    return inspect.Signature(parameters)


ENTRY_POINTS = [(version, name) for version, functions in SIGNATURES.items() for name in functions]


def test_recorded_versions() -> None:
    assert {"0.6.4", "0.6.7", "0.6.15", "0.6.18", "0.7.0", "0.7.2.post1"} <= SIGNATURES.keys()


@pytest.mark.parametrize(("version", "name"), ENTRY_POINTS)
def test_plain_swiglu_binds_to_every_version(version: str, name: str) -> None:
    signature = as_signature(SIGNATURES[version][name])
    call = bind_call(list(signature.parameters), version, *sample()[:2], MoeActivation(), sample()[2])
    signature.bind(**call)


@pytest.mark.parametrize(
    ("activation", "first"),
    [
        (MoeActivation.swigluoai(), "0.6.15"),
        (MoeActivation(limit=10.0), "0.6.15"),
        (MoeActivation.relu2(), "0.6.15"),
        (SITU, "0.6.18"),
    ],
)
def test_activations_bind_or_are_refused(activation: MoeActivation, first: str) -> None:
    for version, name in ENTRY_POINTS:
        signature = as_signature(SIGNATURES[version][name])
        arguments = (list(signature.parameters), version, *sample()[:2], activation, sample()[2])
        if tuple(map(int, version.split(".")[:3])) >= tuple(map(int, first.split("."))):
            signature.bind(**bind_call(*arguments))
        else:
            with pytest.raises(FlashInferUnavailableError, match="pip install"):
                bind_call(*arguments)


@pytest.mark.slow
def test_the_installed_version_is_the_recorded_one() -> None:
    """The records were made by reading the wheels; where FlashInfer is installed they must say the same."""
    needs_flashinfer()
    version, function = flashinfer_moe.find_entry_point()
    if version not in SIGNATURES:
        pytest.skip(f"{version} is not recorded")
    recorded = as_signature(SIGNATURES[version][function.__name__])
    assert list(inspect.signature(function).parameters) == list(recorded.parameters)


def test_call_has_the_types_that_the_kernel_reads() -> None:
    prepared, tokens, out = sample()
    names = SIGNATURES["0.7.2.post1"]["cute_dsl_fused_moe"]["positional"]
    call = bind_call(names, "0.7.2.post1", prepared, tokens, MoeActivation(), out)
    assert call["token_final_scales"].dtype == torch.float32
    assert call["token_selected_experts"].dtype == torch.int32
    assert call["x_sf"].shape == (3, 16, 1) and call["x_sf"].dtype == torch.float8_e4m3fn
    assert call["w1_weight"].data_ptr() == prepared.w13_weight.data_ptr()
    assert call["w1_weight_sf"].data_ptr() == prepared.w13_weight_scale.data_ptr()
    assert call["fc2_input_scale"].item() == pytest.approx(1 / 0.002)
    assert torch.allclose(call["w1_alpha"], prepared.w13_weight_scale_2 * 0.003)
    assert call["moe_output"] is out


def test_mma_view_is_the_formula_and_moves_no_byte() -> None:
    scales = torch.randint(0, 256, (2, 256, 8), dtype=torch.uint8)
    stored = swizzle_scales(scales)
    view = mma_view(stored)
    assert view.shape == (32, 4, 2, 4, 2, 2) and view.data_ptr() == stored.data_ptr()
    for expert in range(2):
        for row in range(0, 256, 5):
            for col in range(8):
                found = view[row % 32, row % 128 // 32, row // 128, col % 4, col // 4, expert]
                assert found == scales[expert, row, col]


@pytest.mark.parametrize("version", ["0.6.3", "0.5.0", "0.6.3.post1"])
def test_an_old_flashinfer_names_the_command(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    with pytest.raises(FlashInferUnavailableError, match=r"has no CuteDSL fused MoE.*pip install"):
        FlashInferMoe.check()


def test_a_missing_flashinfer_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(FlashInferUnavailableError, match=r"not installed; run: pip install"):
        FlashInferMoe.check()
