"""``nvfp4_prep.load_layer`` against the arguments that vLLM itself gives FlashInfer for the source."""

from __future__ import annotations

import pytest
import torch

import nvfp4_prep
from nvfp4_prep.errors import UsageError
from nvfp4_prep.options import ConvertOptions, LayoutName
from support.serving.families import FAMILIES
from support.serving.forward import reference, run_layers
from support.serving.installed import NEEDS_PADDING
from support.serving.results import Checkpoints
from support.serving.states import same
from support.serving.tiny_models import TinyModel

QWEN, NEMOTRON = FAMILIES["qwen3_moe"], FAMILIES["nemotron_h"]
FROM_TOKENS = {"x", "x_sf", "token_selected_experts", "token_final_scales", "top_k", "moe_output"}


@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize(
    "model",
    [QWEN, pytest.param(QWEN.with_sizes(8, 320, 96), marks=NEEDS_PADDING), NEMOTRON, FAMILIES["mixtral"]],
    ids=["qwen3_moe", "qwen3_moe padded", "nemotron_h", "mixtral"],
)
def test_arguments_are_those_that_vllm_passes(checkpoints: Checkpoints, model: TinyModel) -> None:
    source, prepared = checkpoints.get(model)
    calls = run_layers(source, moe_backend="flashinfer_cutedsl")
    for number in model.layers:
        ready = nvfp4_prep.load_layer(prepared, number)
        prefix = next(name for name in calls if f".layers.{number}." in name).rsplit("/", 1)[0]
        stock = {name.rsplit("/", 1)[1]: value for name, value in calls.items() if name.startswith(f"{prefix}/")}
        assert set(stock) - {"output"} - FROM_TOKENS - {"activation_type"} == set(ready.arguments) - {"activation_type"}
        for name, value in ready.arguments.items():
            expected = stock[name]
            if name.endswith("_sf"):
                value = value.view(torch.float8_e4m3fn)
            if name == "fc2_input_scale":
                value = value.expand(expected.shape).contiguous()  # the kernel reads element 0 alone
            assert same(value, expected), name
        # The call computes what vLLM's layer computed.
        tokens = {name: stock[name] for name in FROM_TOKENS}
        assert torch.equal(reference({**ready.arguments, **tokens}).to(torch.bfloat16), stock["output"])


def test_experts_of_a_rank(checkpoints: Checkpoints) -> None:
    _, prepared = checkpoints.get(QWEN)
    whole, part = nvfp4_prep.load_layer(prepared, 0), nvfp4_prep.load_layer(prepared, 0, ep=(1, 2))
    assert (part.arguments["num_experts"], part.arguments["num_local_experts"]) == (8, 4)
    assert part.arguments["local_expert_offset"] == 4
    for name, tensor in part.tensors.items():
        assert same(tensor, whole.tensors[name][4:].contiguous()), name


def test_what_the_kernel_cannot_take_is_refused(checkpoints: Checkpoints) -> None:
    _, prepared = checkpoints.get(QWEN)
    with pytest.raises(UsageError, match="experts that follow each other"):
        nvfp4_prep.load_layer(prepared, 0, experts=(0, 2))
    with pytest.raises(UsageError, match="no prepared layer 7"):
        nvfp4_prep.load_layer(prepared, 7)
    _, batched = checkpoints.get(QWEN, ConvertOptions(layout=LayoutName.CUTEDSL_BATCHED))
    with pytest.raises(UsageError, match="is not that of FlashInfer"):
        nvfp4_prep.load_layer(batched, 0)
