"""The smoke run of a whole Kimi-K2.5 layer on a card, and the table of mutations.

    PYTHONPATH=kernels:converter:tests python benchmarks/bench_smoke.py --mutation-experts 16 --page layer.html

The layer is random, at full dimensions, prepared on the card by the Triton kernels. With the torch backend the
mutation table is made at small dimensions, and no whole layer is run. Exit code 1 if a right layer fails or a mutation
is not caught.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from nvfp4_prep.report.page import Subject, make_page
from nvfp4_prep.smoke.backends import ChosenBackend, choose_backend
from nvfp4_prep.smoke.layer import SmokeSettings, run_layer
from nvfp4_prep.smoke.report import LayerReport, SmokeReport
from nvfp4_prep.smoke.under_test import LayerUnderTest
from nvfp4_prep_kernels import MoeDims, MoeLayout, PreparedTensor, Projection
from nvfp4_prep_kernels.moe_reference import SourceExpert, SourceMatrix
from nvfp4_prep_kernels.moe_types import MoeActivation, PreparedExperts
from nvfp4_prep_kernels.triton_prepare import prepare
from support.mutations import MUTATIONS, PADDING_MUTATIONS

KIMI_TOP_K = 8


def random_layer(dims: MoeDims, device: torch.device, seed: int = 0) -> LayerUnderTest:
    """Random codes and block scales, and the prepared layer."""
    layout, generator = MoeLayout.cutedsl(gated=True), torch.Generator(device=device).manual_seed(seed)
    source: dict[tuple[Projection, bool], torch.Tensor] = {}
    tensors: dict[str, torch.Tensor] = {}
    for tensor in PreparedTensor:
        shape = (dims.experts, *layout.source_shape(tensor, dims))
        mine = []
        for projection in layout.projections(tensor):
            # scales from 2^-1 to 2^7, all mantissas; codes of any value
            low, high = (48, 112) if tensor.is_scale else (0, 256)
            part = torch.randint(low, high, shape, dtype=torch.uint8, device=device, generator=generator)
            source[projection, tensor.is_scale] = part
            mine.append(part)
        if device.type == "cuda":
            tensors[tensor.value] = prepare(layout, tensor, dims, *mine)
        else:
            tensors[tensor.value] = layout.apply(tensor, *mine).contiguous()
    # gate and up of the size at which the activation is neither linear nor flat
    scale_2 = (
        (torch.rand(2, dims.experts, generator=torch.Generator().manual_seed(seed)) + 0.5) * 0.017 / dims.hidden**0.5
    )
    input_scale, fc2_input_scale = 0.0021, 0.01
    same = torch.ones(dims.experts, device=device)

    def expert(position: int) -> SourceExpert:
        def matrix(name: Projection, value: float) -> SourceMatrix:
            return SourceMatrix(source[name, False][position], source[name, True][position], value)

        w13, w2 = float(scale_2[0, position]), float(scale_2[1, position])
        return SourceExpert(matrix(Projection.GATE, w13), matrix(Projection.UP, w13), matrix(Projection.DOWN, w2))

    return LayerUnderTest(
        name="language_model.model.layers.1.mlp.experts",
        index=1,
        experts=tuple(range(dims.experts)),
        experts_total=dims.experts,
        prepared=PreparedExperts(
            layout,
            dims,
            w13_weight_scale_2=scale_2[0].to(device),
            w2_weight_scale_2=scale_2[1].to(device),
            w13_input_scale=same * input_scale,
            w2_input_scale=same * fc2_input_scale,
            **tensors,
        ),
        source=expert,
        activation=MoeActivation(),
        top_k=min(KIMI_TOP_K, dims.experts),
        input_scale=float((same * input_scale)[0]),
        fc2_input_scale=float((same * fc2_input_scale)[0]),
        w13_scale_2=tuple(scale_2[0].tolist()),
        w2_scale_2=tuple(scale_2[1].tolist()),
    )


def say(report: LayerReport) -> str:
    """One line of figures."""
    worst = report.worst_expert.errors
    stages = [figure.stages for figure in report.figures if figure.stages is not None]
    errors = [figure.errors for figure in report.figures]
    return ", ".join(
        (
            f"cosine >= {min(error.cosine for error in errors):.7f}",
            f"relative error <= {max(error.relative for error in errors):.3g}",
            f"noise floor {report.noise.relative:.3g} (worst {report.noise.worst:.3g} of tolerance)",
            f"limit {max(error.relative_limit for error in errors):.3g}",
            f"worst element {worst.worst:.3g} of its tolerance",
            f"stages alone {max((stage.first.worst for stage in stages), default=-1):.3g} and"
            f" {max((stage.second.worst for stage in stages), default=-1):.3g}, misrounded"
            f" {sum(stage.misrounded for stage in stages)}",
            f"routings {[round(case.errors.worst, 4) for case in report.cases]}",
            f"doubtful places {sum(figure.doubtful for figure in report.figures)}",
            f"reference rms {worst.reference_rms:.3g}",
            f"amplitude {report.amplitude:.3g}, intermediate {report.intermediate_range:.3g}",
        )
    )


def whole_layer(chosen: ChosenBackend, experts: int, repeats: int) -> tuple[LayerReport, dict[str, Any]]:
    """One full layer, ``repeats`` times; the last report, and figures of all."""
    layer = random_layer(MoeDims(experts, 2048, 7168), chosen.device)
    seconds = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        report = run_layer(layer, chosen.backend)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
        peak = torch.cuda.max_memory_allocated()
        passed = "PASSED" if report.passed else "FAILED"
        print(f"layer of {experts} experts: {passed} in {seconds[-1]:.2f} s, {say(report)}", flush=True)
    print(f"memory: source and prepared layer {held / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB")
    for problem in report.problems:
        print("  ", problem)
    report = replace(report, seconds=seconds[-1], peak_nbytes=peak)
    return report, {"seconds": seconds, "held_nbytes": held, "peak_nbytes": peak, **figures_of(report)}


def figures_of(report: LayerReport) -> dict[str, Any]:
    """The worst of a layer."""
    errors = [figure.errors for figure in report.figures]
    stages = [figure.stages for figure in report.figures if figure.stages is not None]
    worst = max(errors, key=lambda error: error.relative)
    return {
        "passed": report.passed,
        "problems": list(report.problems),
        "experts": report.experts,
        "cases": [asdict(case) for case in report.cases],
        "lowest_cosine": min(error.cosine for error in errors),
        "largest_relative": worst.relative,
        "relative_limit": max(error.relative_limit for error in errors),
        "worst_element": max(error.worst for error in errors),
        "worst_routed": max(case.errors.worst for case in report.cases),
        "noise_relative": report.noise.relative,
        "noise_worst": report.noise.worst,
        "first_gemm_worst": max((stage.first.worst for stage in stages), default=None),
        "second_gemm_worst": max((stage.second.worst for stage in stages), default=None),
        "misrounded": sum(stage.misrounded for stage in stages),
        "doubtful": sum(figure.doubtful for figure in report.figures),
        "intermediate_values": sum(figure.tokens for figure in report.figures) * 2048,
    }


def mutation_table(chosen: ChosenBackend, dims: MoeDims, padded: MoeDims) -> list[dict[str, Any]]:
    """Each mutation and what caught it."""
    rows = []
    for group, mutations in ((dims, MUTATIONS), (padded, PADDING_MUTATIONS)):
        layer = random_layer(group, chosen.device)
        settings = SmokeSettings(noise_experts=1)
        clean = run_layer(layer, chosen.backend, settings)
        print(f"unchanged layer {group}: {'passed' if clean.passed else 'FAILED'}, {say(clean)}", flush=True)
        rows.append({"mutation": None, "dims": asdict(group), "caught": not clean.passed, "by": list(clean.problems)})
        for name, mutate in mutations.items():
            report = run_layer(replace(layer, prepared=mutate(layer.prepared)), chosen.backend, settings)
            rows.append({"mutation": name, "dims": asdict(group), **verdict(report)})
            row = rows[-1]
            print(
                f"{name:48} {'caught by ' + ', '.join(row['by']) if row['by'] else 'NOT CAUGHT':62} worst element"
                f" {row['worst']:9.3g} x tolerance, relative {row['relative']:9.3g}, cosine {row['cosine']:9.6f},"
                f" {row['wrong_experts']} of {group.experts} experts",
                flush=True,
            )
    return rows


def verdict(report: LayerReport) -> dict[str, Any]:
    """What a report says against a layer."""
    by = sorted({problem.split(":")[0] for problem in report.problems})
    return {
        "caught": bool(by),
        "by": by,
        "worst": report.worst_expert.worst,
        "relative": max(figure.errors.relative for figure in report.figures),
        "cosine": min(figure.errors.cosine for figure in report.figures),
        "wrong_experts": sum(bool(figure.problems) for figure in report.figures),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("auto", "triton", "torch"), default="auto")
    parser.add_argument("--experts", type=int, default=384)
    parser.add_argument("--repeats", type=int, default=3, help="of the whole layer")
    parser.add_argument("--mutation-experts", type=int, default=16)
    parser.add_argument("--page", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    chosen = choose_backend(arguments.backend)
    print(chosen.facts)
    on_card, count = chosen.device.type == "cuda", arguments.mutation_experts
    full = (MoeDims(count, 2048, 7168), MoeDims(count, 1856, 2688))
    rows = mutation_table(chosen, *(full if on_card else (MoeDims(8, 128, 256), MoeDims(8, 80, 272))))
    result: dict[str, Any] = {"backend": chosen.facts.name, "repetitions": arguments.repeats, "mutations": rows}
    if on_card:
        layer, result["layer"] = whole_layer(chosen, arguments.experts, arguments.repeats)
        if arguments.page:
            report = SmokeReport("a random layer at Kimi-K2.5 dimensions", "source", chosen.facts, 1, (layer,))
            arguments.page.write_text(make_page(Subject(report.checkpoint, smoke=report)))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    right = all(row["caught"] == (row["mutation"] is not None) for row in rows)
    sys.exit(not (right and result.get("layer", {"passed": True})["passed"]))


if __name__ == "__main__":
    main()
