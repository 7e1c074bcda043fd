"""The smoke run of one layer passes what is right and catches everything that is wrong."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from nvfp4_prep.smoke.compare import compare
from nvfp4_prep.smoke.layer import SmokeSettings, run_layer
from nvfp4_prep.smoke.report import LayerReport
from nvfp4_prep.smoke.tokens import random_tokens, routings
from nvfp4_prep.smoke.under_test import LayerUnderTest
from nvfp4_prep_kernels import MoeDims, MoeLayout
from nvfp4_prep_kernels.moe_types import MoeActivation, MoeBackend, MoeTokens, MoeTrace, PreparedExperts
from nvfp4_prep_kernels.torch_moe import TorchMoe
from nvfp4_prep_kernels.triton_moe import TritonMoe
from support.moe_cases import CASES, Layer, random_layer
from support.mutations import MUTATIONS, PADDING_MUTATIONS, TRTLLM_MUTATIONS

pytestmark = pytest.mark.slow

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SETTINGS = SmokeSettings(per_expert=8, routed=16, noise_experts=2)
BACKENDS = {"torch": TorchMoe(), "triton": TritonMoe()}


def under_test(layer: Layer) -> LayerUnderTest:
    prepared = layer.prepared
    return LayerUnderTest(
        name="model.layers.3.mlp.experts",
        index=3,
        experts=tuple(range(prepared.dims.experts)),
        experts_total=prepared.dims.experts,
        prepared=prepared,
        source=lambda position: layer.source[position],
        activation=layer.activation,
        top_k=2,
        input_scale=float(prepared.w13_input_scale[0]),
        fc2_input_scale=float(prepared.w2_input_scale[0]),
        w13_scale_2=tuple(prepared.w13_weight_scale_2.tolist()),
        w2_scale_2=tuple(prepared.w2_weight_scale_2.tolist()),
        w13_scale_2_up=None
        if prepared.w13_weight_scale_2_up is None
        else tuple(prepared.w13_weight_scale_2_up.tolist()),
    )


KIMI_LIKE = under_test(random_layer(MoeLayout.cutedsl(gated=True), MoeDims(4, 128, 256), MoeActivation(), DEVICE))
PADDED = under_test(random_layer(MoeLayout.cutedsl(gated=True), MoeDims(3, 80, 272), MoeActivation(), DEVICE))

_TRTLLM = MoeLayout.trtllm(gated=True)
TRTLLM = under_test(random_layer(_TRTLLM, MoeDims(4, 128, 256), MoeActivation(), DEVICE, two_w13_scales=True))
PADDED_TRTLLM = under_test(random_layer(_TRTLLM, MoeDims(3, 80, 272), MoeActivation(), DEVICE))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_what_is_right_passes(case: str, backend: str) -> None:
    report = run_layer(under_test(random_layer(*CASES[case], DEVICE)), BACKENDS[backend], SETTINGS)
    assert report.passed, report.problems
    assert report.experts == len(report.figures) == CASES[case][1].experts
    assert min(figure.errors.cosine for figure in report.figures) > 0.9999
    assert all(figure.errors.reference_rms > 0 for figure in report.figures)
    assert 0 <= report.noise.worst <= 1  # exactly 0 where all sums of a small layer are exact in float32
    alone, starved, hot = report.cases
    assert (alone.idle, starved.idle >= 1, hot.busiest) == (0, True, SETTINGS.routed)


COMPUTED = {"outputs", "first GEMM", "quantization", "second GEMM", "routing"}


def test_a_layer_of_one_expert() -> None:
    layer = random_layer(MoeLayout.cutedsl(gated=True), MoeDims(1, 64, 256), MoeActivation(), DEVICE)
    report = run_layer(replace(under_test(layer), top_k=1), TorchMoe(), SETTINGS)
    assert report.passed and [case.name for case in report.cases] == ["every expert alone"]


def caught(report: LayerReport, kinds: set[str]) -> bool:
    return any(problem.split(":")[0] in kinds for problem in report.problems)


def with_backends(mutations: Iterable[str]) -> list[Any]:
    """Each mutation with each backend; every fourth with Triton where its interpreter takes seconds for one."""
    every = 1 if torch.cuda.is_available() else 4
    chosen = [(mutation, "torch") for mutation in mutations] + [(each, "triton") for each in list(mutations)[::every]]
    return [pytest.param(*pair, id=f"{pair[0]}-{pair[1]}") for pair in chosen]


@pytest.mark.parametrize(("mutation", "backend"), with_backends(MUTATIONS))
def test_mutations_are_caught_by_the_outputs(mutation: str, backend: str) -> None:
    """Not by comparing scalars: what the kernel computes must differ."""
    wrong = replace(KIMI_LIKE, prepared=MUTATIONS[mutation](KIMI_LIKE.prepared))
    report = run_layer(wrong, BACKENDS[backend], SETTINGS)
    assert not report.passed
    assert caught(report, COMPUTED), report.problems


@pytest.mark.parametrize(("mutation", "backend"), with_backends(TRTLLM_MUTATIONS))
def test_mutations_of_trtllm_bytes_are_caught_by_the_outputs(mutation: str, backend: str) -> None:
    wrong = replace(TRTLLM, prepared=TRTLLM_MUTATIONS[mutation](TRTLLM.prepared))
    report = run_layer(wrong, BACKENDS[backend], SETTINGS)
    assert not report.passed
    assert caught(report, COMPUTED), report.problems


@pytest.mark.parametrize("backend", BACKENDS)
def test_trtllm_bytes_with_two_scales_pass(backend: str) -> None:
    assert run_layer(TRTLLM, BACKENDS[backend], SETTINGS).passed


@pytest.mark.parametrize("padded", [PADDED, PADDED_TRTLLM], ids=["cutedsl", "trtllm"])
@pytest.mark.parametrize("mutation", PADDING_MUTATIONS)
def test_dirty_padding_is_caught(mutation: str, padded: LayerUnderTest) -> None:
    report = run_layer(replace(padded, prepared=PADDING_MUTATIONS[mutation](padded.prepared)), TorchMoe(), SETTINGS)
    assert caught(report, {"padding"}), report.problems
    assert report.dirty_padding == 1


def test_wrong_scalars_are_named() -> None:
    scales = KIMI_LIKE.prepared.w13_weight_scale_2.clone()
    scales[2] *= 1.0001
    report = run_layer(
        replace(KIMI_LIKE, prepared=replace(KIMI_LIKE.prepared, w13_weight_scale_2=scales)), TorchMoe(), SETTINGS
    )
    assert any("w13_weight_scale_2 of 1 experts, expert 2" in problem for problem in report.problems)


@dataclass(frozen=True)
class Sabotaged:
    """A kernel with a fault of its own."""

    fault: str
    name: str = "sabotaged"
    out_dtype: torch.dtype = torch.float32

    def __call__(
        self, experts: PreparedExperts, tokens: MoeTokens, activation: MoeActivation, out: torch.Tensor
    ) -> MoeTrace | None:
        if self.fault == "never writes":
            return None
        result = torch.empty_like(out)
        TorchMoe()(experts, tokens, activation, result)
        if self.fault == "forgets the last token":
            result[-1] = math.nan
        elif self.fault == "ignores router weights":
            TorchMoe()(experts, replace(tokens, weights=torch.ones_like(tokens.weights)), activation, result)
        elif self.fault == "drops the second expert" and tokens.top_k > 1:
            one = replace(tokens, weights=tokens.weights * torch.tensor([[1.0, 0.0]], device=out.device))
            TorchMoe()(experts, one, activation, result)
        elif self.fault == "writes zeros":
            result.zero_()
        elif self.fault == "is one percent off":
            result *= 1.01
        out.copy_(result)
        return None


@pytest.mark.parametrize(
    "fault",
    [
        "never writes",
        "forgets the last token",
        "ignores router weights",
        "drops the second expert",
        "writes zeros",
        "is one percent off",
    ],
)
def test_faulty_kernels_are_caught(fault: str) -> None:
    backend: MoeBackend = Sabotaged(fault)
    report = run_layer(KIMI_LIKE, backend, SETTINGS)
    assert caught(report, COMPUTED), report.problems
    if fault in ("never writes", "forgets the last token"):
        assert any("not written" in problem for problem in report.problems)


@dataclass(frozen=True)
class Rounding:
    """A right kernel that writes bfloat16, as the real one does."""

    name: str = "bfloat16"
    out_dtype: torch.dtype = torch.bfloat16

    def __call__(
        self, experts: PreparedExperts, tokens: MoeTokens, activation: MoeActivation, out: torch.Tensor
    ) -> MoeTrace | None:
        result = torch.empty_like(out, dtype=torch.float32)
        TorchMoe()(experts, tokens, activation, result)
        out.copy_(result)
        return None


def test_bfloat16_outputs_pass_and_still_catch_a_zeroed_block() -> None:
    assert run_layer(KIMI_LIKE, Rounding(), SETTINGS).passed
    for mutation in ("one zeroed block of 16 in w13", "one zeroed block of 16 in w2"):
        wrong = replace(KIMI_LIKE, prepared=MUTATIONS[mutation](KIMI_LIKE.prepared))
        assert caught(run_layer(wrong, Rounding(), SETTINGS), {"outputs"})


def test_a_reference_near_zero_proves_nothing() -> None:
    zero = torch.zeros(2, 16)
    figures = compare(zero, zero, zero)
    assert figures.worst == 0 and not figures.passed and not figures.meaningful


def test_what_is_right_within_a_wide_tolerance_is_not_judged() -> None:
    figures = compare(torch.ones(2, 16), torch.ones(2, 16), torch.full((2, 16), 0.2))
    assert figures.right and not figures.meaningful and "out of range" in figures.inconclusive
    assert not compare(torch.full((2, 16), 1.3), torch.ones(2, 16), torch.full((2, 16), 0.2)).right


@pytest.mark.parametrize("stage", ["outputs", "first GEMM", "second GEMM"])
@pytest.mark.parametrize("reference", ["zero", "undefined", "wide"])
def test_what_is_wrong_fails_however_little_the_reference_proves(stage: str, reference: str) -> None:
    figures = run_layer(KIMI_LIKE, TorchMoe(), SETTINGS).figures[0]
    why: dict[str, Any] = {
        "zero": {"reference_rms": 0.0}, "undefined": {"undefined": 3}, "wide": {"relative_limit": 3.0}
    }[reference]  # fmt: skip
    assert figures.stages is not None
    weak = replace(figures, errors=replace(figures.errors, **why))
    assert weak.inconclusive and not weak.problems
    wrong = {"worst": 1.5} | why
    if stage == "outputs":
        weak = replace(weak, errors=replace(weak.errors, **wrong))
    elif stage == "first GEMM":
        weak = replace(weak, stages=replace(figures.stages, first=replace(figures.stages.first, **wrong)))
    else:
        weak = replace(weak, stages=replace(figures.stages, second=replace(figures.stages.second, **wrong)))
    assert [problem.split(":")[0] for problem in weak.problems] == [stage]


def test_large_values_do_not_overflow_the_figures() -> None:
    """Their squares do, in float32."""
    values = torch.full((2, 16), 3e30)
    figures = compare(values * 1.001, values, values * 0.01)
    assert figures.meaningful and figures.right and figures.cosine == 1.0
    assert (figures.relative, figures.relative_limit) == pytest.approx((1e-3, 1e-2), rel=1e-3)
    assert not compare(values * 1.1, values, values * 0.01).right


def test_a_tolerance_that_is_not_a_number_bounds_nothing() -> None:
    ones = torch.ones(2, 16)
    figures = compare(ones * 1.5, ones, ones * math.nan)
    assert figures.right and not figures.meaningful


def test_a_noisy_reference_is_no_verdict_on_the_bytes() -> None:
    report = run_layer(KIMI_LIKE, TorchMoe(), SETTINGS)
    noisy = replace(report, noise=replace(report.noise, worst=2.0))
    assert noisy.passed and report.compared and not noisy.compared
    assert any("another order" in note for note in noisy.notes) and not report.notes


def test_routings_cover_starve_and_favour() -> None:
    alone, starved, hot = routings(6, 3, 4, 10, torch.Generator().manual_seed(0))
    assert torch.bincount(alone.expert_ids.flatten(), minlength=6).tolist() == [4] * 6
    assert 0 not in starved.expert_ids and starved.expert_ids.shape == (10, 3)
    assert bool((hot.expert_ids == 5).any(dim=1).all())
    for case in (starved, hot):
        assert torch.allclose(case.weights.sum(dim=1), torch.ones(10))
        assert all(len(set(row)) == 3 for row in case.expert_ids.tolist())


def test_tokens_meet_the_top_of_the_range() -> None:
    tokens = random_tokens(64, 512, torch.Generator().manual_seed(0))
    assert bool((tokens.amax(dim=1) == 1.0).all()) and tokens.abs().max() == 1.0
    assert 0.15 < tokens.std() < 0.25


def test_stages_point_at_the_gemm_that_is_wrong() -> None:
    for mutation, figure in (("a single code in w13", "first GEMM"), ("a single code in w2", "second GEMM")):
        wrong = replace(KIMI_LIKE, prepared=MUTATIONS[mutation](KIMI_LIKE.prepared))
        report = run_layer(wrong, TorchMoe(), SETTINGS)
        assert any(problem.startswith(f"{figure}: 1 of 4 experts wrong, expert 1:") for problem in report.problems)
        assert not any(problem.startswith("second GEMM") for problem in report.problems) or figure == "second GEMM"


@dataclass(frozen=True)
class Truncating:
    """A kernel that rounds its intermediate towards zero: each output is nearly right."""

    name: str = "truncating"
    out_dtype: torch.dtype = torch.float32

    def __call__(
        self, experts: PreparedExperts, tokens: MoeTokens, activation: MoeActivation, out: torch.Tensor
    ) -> MoeTrace | None:
        trace = TorchMoe()(experts, tokens, activation, out)
        assert trace is not None
        return replace(trace, quantized=trace.quantized * 0.75)


def test_wrong_rounding_of_the_intermediate_is_seen() -> None:
    report = run_layer(KIMI_LIKE, Truncating(), SETTINGS)
    assert caught(report, {"quantization"}), report.problems
