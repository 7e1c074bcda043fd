"""A checkpoint's own draft layer (multi-token prediction), loaded as speculative decoding loads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sglang_compare import RAW_COMPRESSED
from sglang_models import COMPRESSED_MTP, DRAFTED, Checkpoints
from sglang_on_cpu import load_model, make_server_args, rank_of
from sglang_results import REFUSALS
from sglang_states import differences, experts_state

from nvfp4_prep.errors import ServingError

TRTLLM = "flashinfer_trtllm"
pytestmark = pytest.mark.usefixtures("plugin")


def experts_of(directory: Path, backend: str, *, draft: bool) -> dict[str, Any]:
    args = make_server_args(directory, moe_runner_backend=backend)
    with rank_of(args):
        return experts_state(load_model(args, draft=draft))


@pytest.mark.parametrize("draft", [False, True], ids=["target", "draft"])
def test_compressed_tensors(checkpoints: Checkpoints, draft: bool) -> None:
    source, prepared = checkpoints.get(COMPRESSED_MTP, trtllm=True)
    expected, actual = experts_of(source, TRTLLM, draft=draft), experts_of(prepared, "auto", draft=draft)
    layers = {name.partition("/")[0] for name in expected}
    numbers = ("1", "2")
    assert layers == {"model.decoder.mlp.experts"} if draft else {f"model.layers.{n}.mlp.experts" for n in numbers}
    kept = [
        {name: value for name, value in state.items() if not name.endswith(RAW_COMPRESSED)}
        for state in (expected, actual)
    ]
    assert differences(*kept) == []


@pytest.mark.parametrize("family", DRAFTED)
@pytest.mark.parametrize("load_format", ["auto", "nvfp4_prep"])
def test_modelopt_is_refused_by_name(checkpoints: Checkpoints, family: str, load_format: str) -> None:
    """SGLang keeps these experts unquantized: the source fails in its loader, and the prepared file says why."""
    source, prepared = checkpoints.get(DRAFTED[family], trtllm=True)
    with pytest.raises(RuntimeError, match="must match"):
        experts_of(source, TRTLLM, draft=True)
    args = make_server_args(prepared)
    with rank_of(args), pytest.raises(ServingError, match="does not hold in NVFP4") as caught:
        load_model(args, draft=True, load_format=load_format)
    assert "model.decoder.mlp.experts." in str(caught.value)
    REFUSALS.append((f"NVFP4 draft layer, ModelOpt, {family}", str(caught.value)))


@pytest.mark.parametrize("family", DRAFTED)
def test_the_target_of_such_a_checkpoint(checkpoints: Checkpoints, family: str) -> None:
    """The target model skips the draft layer's tensors, prepared or not."""
    source, prepared = checkpoints.get(DRAFTED[family], trtllm=True)
    found = differences(experts_of(source, TRTLLM, draft=False), experts_of(prepared, "auto", draft=False))
    assert [name for name in found if not name.endswith("_input_scale")] == []
