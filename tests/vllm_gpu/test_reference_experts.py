"""``NVFP4_PREP_REFERENCE_MOE=1`` on a GPU: whole models in vLLM's own code, against the source's experts in torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch

pytestmark = pytest.mark.gpu

PROMPTS = [[5, 6, 7, 8], list(range(10, 31)), [99, 3, 200], [250] * 40]
MORE_TOKENS = 12
BOUND = 0.1
"""Greatest difference of a log-probability, as in tests/engine. Wrong experts: more than ten times that."""
LAYER_BOUND = 0.02
"""Greatest difference of a layer's output, of its own length. Both round activations to FP4: a sum that falls on the
other side of a border moves one value in thousands."""


def test_a_whole_model_gives_the_tokens_of_its_source(case: Any) -> None:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    from support.serving.source_experts_on_gpu import SourceLayers
    from support.serving.vllm_on_gpu import DEVICE, LOG, loaded

    right, wrong = SourceLayers(case.model, case.source), SourceLayers(case.model, case.source, wrong=True)
    with loaded(case.prepared, moe_backend="flashinfer_cutedsl") as whole:
        assert {param.device.type for param in whole.model.parameters()} == {DEVICE.type}
        greatest = least_wrong = layers = 0.0
        tokens = set()
        for prompt in PROMPTS:
            sequence = whole.continued(prompt, MORE_TOKENS)
            with watched(right) as (outputs, launches):
                found = whole.log_probabilities(sequence)
            assert len(launches) == len(outputs) == len(case.model.layers)  # all experts, by the Triton kernels
            assert outputs[0].device.type == DEVICE.type
            layers = max(layers, *(distance(mine, theirs) for mine, theirs in zip(outputs, right.calls, strict=True)))
            with mock.patch.object(RoutedExperts, "forward_modular", right.forward()):
                expected = whole.log_probabilities(sequence)
            with mock.patch.object(RoutedExperts, "forward_modular", wrong.forward()):
                mistaken = whole.log_probabilities(sequence)
            at = torch.tensor(sequence[1:], device=found.device)[:, None]
            chosen = [each[:-1].gather(1, at) for each in (found, expected, mistaken)]
            greatest = max(greatest, float((chosen[0] - chosen[1]).abs().max()))
            least_wrong = max(least_wrong, float((chosen[0] - chosen[2]).abs().max()))
            new = slice(len(prompt) - 1, -1)
            assert expected[new].argmax(-1).tolist() == sequence[len(prompt) :]
            tokens |= set(sequence[len(prompt) :])
    print(
        f"\n{case.model.name}, {case.layout.value}: tokens equal, log-probabilities within {greatest:.4f},"
        f" layers within {layers:.2e}; wrong experts: {least_wrong:.2f}"
    )
    assert bool(found.isfinite().all())
    assert len(tokens) > 5  # no constant
    assert layers <= LAYER_BOUND
    assert greatest <= BOUND
    assert least_wrong > 10 * BOUND
    assert any("NVFP4_PREP_REFERENCE_MOE=1" in line and "not for production" in line for line in LOG)
    if case.layout.value == "trtllm":
        assert any("prepared for another kernel" in line for line in LOG)


@contextlib.contextmanager
def watched(right: Any) -> Iterator[tuple[list[torch.Tensor], list[Any]]]:
    """What each layer's experts gave, and the launches of the Triton kernels. ``right`` computes the same beside it."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    from nvfp4_prep_kernels.triton_moe import TritonMoe

    compute, launch = RoutedExperts.forward_modular, TritonMoe.__call__
    outputs: list[torch.Tensor] = []
    launches: list[Any] = []

    def spied(layer: Any, x: Any, topk_weights: Any, topk_ids: Any, **options: Any) -> Any:
        found = compute(layer, x, topk_weights, topk_ids, **options)
        outputs.append(found.clone())
        right.calls.append(right.compute(layer.layer_name, x, topk_weights, topk_ids))
        return found

    def launched(self: TritonMoe, *args: Any) -> Any:
        launches.append(args)
        return launch(self, *args)

    right.calls.clear()
    with (
        mock.patch.object(RoutedExperts, "forward_modular", spied),
        mock.patch.object(TritonMoe, "__call__", launched),
    ):
        yield outputs, launches


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """The length of the difference over that of the expected output."""
    return float((one.float() - other.float()).norm() / other.float().norm())


def test_a_cuda_graph_is_refused(case: Any) -> None:
    from nvfp4_prep.errors import ServingError
    from support.serving.vllm_on_gpu import loaded

    with loaded(case.prepared, moe_backend="flashinfer_cutedsl") as whole:
        whole.log_probabilities(PROMPTS[0])  # compiles the kernels
        capturing = mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: True)
        with capturing, pytest.raises(ServingError, match=r"cannot be captured.*--enforce-eager"):
            whole.log_probabilities(PROMPTS[0])
