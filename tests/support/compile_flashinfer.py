"""Compiles the installed FlashInfer's own MoE kernels for sm_100a from prepared layers; run as a program, no card
needed.

The public entry points run with their checks, on CPU tensors that say they are on a card. Replaced: the probes of
the device, the token sort (a CUDA kernel) and the launch. What is compiled is FlashInfer's own GEMM1, GEMM2 and
batched kernel for the shapes, dtypes and strides of prepared tensors. Prints one line a kernel: case, kernel,
bytes of the cubin.
"""

# ruff: noqa: E402 (the environment must be set first)

from __future__ import annotations

import contextlib
import inspect
import os
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

DUMP = Path(tempfile.mkdtemp(prefix="nvfp4-prep-cubin-"))
os.environ |= {
    "CUTE_DSL_ARCH": "sm_100a",
    "CUTE_DSL_KEEP_CUBIN": "1",
    "CUTE_DSL_DUMP_DIR": str(DUMP),
    "FLASHINFER_DISABLE_VERSION_CHECK": "1",
}
ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "kernels"), str(ROOT / "tests")]

import torch

from nvfp4_prep_kernels import MoeDims, MoeLayout
from nvfp4_prep_kernels.flashinfer_moe import bind_call, find_entry_point, mma_view
from nvfp4_prep_kernels.moe_types import ActivationFunction, MoeActivation, MoeTokens
from support.moe_cases import Layer, random_layer

TOKENS, TOP_K = 128, 2
CARD = torch.device("cuda:0")


class OnCard(torch.Tensor):
    """A CPU tensor that says it is on a card."""

    @property
    def device(self) -> torch.device:
        return CARD

    def record_stream(self, stream: Any) -> None:
        """There is no allocator to tell."""

    @property
    def is_cuda(self) -> bool:
        return True


class Nothing:
    """Stands for a stream or an event: every method does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.cuda_stream = 0

    def __getattr__(self, _: str) -> Callable[..., None]:
        return lambda *_, **__: None


def on_card(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_subclass(OnCard)


def pretend_to_have_a_card() -> None:
    """Replaces what asks the device."""
    torch.cuda.current_stream = lambda *_: types.SimpleNamespace(cuda_stream=0)  # type: ignore[assignment,misc]
    torch.cuda.stream = lambda *_: contextlib.nullcontext()  # type: ignore[assignment,misc]
    torch.cuda.Event = torch.cuda.Stream = Nothing  # type: ignore[assignment,misc]
    torch.cuda.get_device_capability = lambda *_: (10, 0)  # type: ignore[assignment]
    torch.cuda.get_device_name = lambda *_: "a card that is not there"  # type: ignore[assignment]
    for name in ("empty", "zeros", "full"):
        real = getattr(torch, name)

        def make(*args: Any, real: Callable[..., torch.Tensor] = real, device: Any = None, **rest: Any) -> Any:
            made = real(*args, **rest)
            return on_card(made) if device is not None and torch.device(device).type == "cuda" else made

        setattr(torch, name, make)


def answer_for_the_card() -> None:
    """Replaces FlashInfer's own questions in every module that has imported them."""
    answers = {
        "get_compute_capability": lambda _: (10, 0),
        "get_num_sm": lambda _: 148,
        "get_max_active_clusters": lambda size: 148 // size,
    }
    for name, module in list(sys.modules.items()):
        if name.startswith("flashinfer"):
            for question in answers.keys() & vars(module).keys():
                setattr(module, question, answers[question])


class Launches:
    """Counts launches instead of making them."""

    def __init__(self) -> None:
        self.made: list[str] = []

    def replace(self, module: Any, name: str, label: str) -> None:
        """Lets a module's compile function compile, and the result do nothing."""
        compile_ = getattr(module, name)

        def compiled(*args: Any, **rest: Any) -> Callable[..., None]:
            compile_(*args, **rest)
            return lambda *_, **__: self.made.append(label)

        setattr(module, name, compiled)


def cpu_moe_sort(token_selected_experts: torch.Tensor, num_local_experts: int, tile_tokens_dim: int, **_: Any) -> Any:
    """Shapes of the sort's results; the order does not matter to a compiler."""
    tiles = num_local_experts
    rows = tiles * tile_tokens_dim
    pairs = token_selected_experts.numel()

    def numbers(count: int) -> torch.Tensor:
        return on_card(torch.zeros(count, dtype=torch.int32))

    shape = token_selected_experts.shape
    return numbers(tiles), numbers(tiles), numbers(pairs).view(shape), numbers(rows), numbers(1), numbers(1)


CASES = {
    "gated": (MoeLayout.cutedsl(gated=True), MoeDims(4, 512, 1024), MoeActivation()),
    "padded": (MoeLayout.cutedsl(gated=True), MoeDims(4, 208, 784), MoeActivation()),
    "non-gated": (MoeLayout.cutedsl(gated=False), MoeDims(4, 464, 1344), MoeActivation.relu2()),
    "oai": (MoeLayout.cutedsl(gated=True), MoeDims(4, 256, 512), MoeActivation.swigluoai()),
    "situ": (
        MoeLayout.cutedsl(gated=True),
        MoeDims(4, 256, 512),
        MoeActivation(ActivationFunction.SITU, situ_beta=4.0, situ_linear_beta=3.0),
    ),
}


def make_layer(case: str) -> Layer:
    return random_layer(*CASES[case], torch.device("cpu"))


def fused_moe(case: str) -> list[str]:
    """The whole public entry point on a prepared layer."""
    layer = make_layer(case)
    prepared = layer.prepared
    hidden = prepared.padded_hidden
    tokens = MoeTokens(
        codes=on_card(torch.zeros(TOKENS, hidden // 2, dtype=torch.uint8)),
        block_scales=on_card(torch.zeros(TOKENS, hidden // 16, dtype=torch.uint8)),
        expert_ids=on_card(torch.zeros(TOKENS, TOP_K, dtype=torch.int32)),
        weights=on_card(torch.zeros(TOKENS, TOP_K)),
    )
    out = on_card(torch.zeros(TOKENS, hidden, dtype=torch.bfloat16))
    version, function = find_entry_point()
    module = sys.modules[function.__module__]
    launches = Launches()
    launches.replace(gemm1, "_get_compiled_gather_kernel", "gemm1")
    launches.replace(gemm2, "_get_compiled_finalize_kernel", "gemm2")
    module.moe_sort = cpu_moe_sort
    module.moe_output_memset_inplace = lambda _: None
    for field in ("w13_weight", "w13_weight_scale", "w2_weight", "w2_weight_scale"):
        object.__setattr__(prepared, field, on_card(getattr(prepared, field)))
    call = bind_call(list(inspect.signature(function).parameters), version, prepared, tokens, layer.activation, out)
    function(**call)
    return launches.made


def batched(case: str = "batched") -> list[str]:
    """The batched kernel on a layer in its own layout."""
    layer = random_layer(MoeLayout.cutedsl_batched(), MoeDims(4, 256, 512), MoeActivation(), torch.device("cpu"))
    prepared = layer.prepared
    rows = 128
    made = []
    for weight, scales in (
        (prepared.w13_weight, prepared.w13_weight_scale),
        (prepared.w2_weight, prepared.w2_weight_scale),
    ):
        experts, n, half_k = weight.shape
        a = on_card(torch.zeros(experts, rows, half_k, dtype=torch.uint8).permute(1, 2, 0))
        a_scale = mma_view(torch.zeros(experts, rows, half_k // 8, dtype=torch.uint8)).view(torch.float8_e4m3fn)
        out = on_card(torch.zeros(experts, rows, n, dtype=torch.bfloat16).permute(1, 2, 0))
        launches = Launches()
        launches.replace(masked, "get_cute_dsl_compiled_masked_gemm_kernel", "batched")
        masked_wrapper.grouped_gemm_nt_masked(
            (a, on_card(a_scale)),
            (on_card(weight.permute(1, 2, 0)), on_card(mma_view(scales).view(torch.float8_e4m3fn))),
            out,
            on_card(torch.zeros(experts, dtype=torch.int32)),
            ab_dtype="float4_e2m1fn",
            sf_dtype="float8_e4m3fn",
            c_dtype="bfloat16",
            sf_vec_size=16,
            alpha=on_card(torch.ones(1, 1, experts)),
            alpha_dtype="float32",
        )
        made += launches.made
    return made


def new_cubins(seen: set[tuple[Path, int]]) -> list[int]:
    """Sizes of the cubins written since the last call; a kernel that was compiled before is not compiled again."""
    found = sorted({(path, path.stat().st_mtime_ns) for path in DUMP.rglob("*.cubin")} - seen)
    seen.update(found)
    return [path.stat().st_size for path, _ in found]


if __name__ == "__main__":
    pretend_to_have_a_card()
    import flashinfer.fused_moe.cute_dsl.blockscaled_contiguous_gather_grouped_gemm_act_fusion as gemm1
    import flashinfer.fused_moe.cute_dsl.blockscaled_contiguous_grouped_gemm_finalize_fusion as gemm2
    import flashinfer.gemm.kernels.grouped_gemm_masked_blackwell as masked
    import flashinfer.gemm.kernels.grouped_gemm_masked_wrapper as masked_wrapper

    answer_for_the_card()
    seen: set[tuple[Path, int]] = set()
    for case in CASES:
        print(case, *fused_moe(case), "cubin", *new_cubins(seen), flush=True)
    print("batched", *batched(), "cubin", *new_cubins(seen), flush=True)
