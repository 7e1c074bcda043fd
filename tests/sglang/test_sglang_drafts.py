"""A ModelOpt checkpoint's own draft layer (multi-token prediction), loaded as speculative decoding loads it.

Those of compressed-tensors are served: test_sglang_models.py has them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sglang_models import DRAFTED, Checkpoints
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
