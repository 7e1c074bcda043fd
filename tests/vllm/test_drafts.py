"""A prepared MTP layer in a draft model (its own loader), and configs that go to other processes."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from support.serving.compare import Counts, counting
from support.serving.families import COMPRESSED, MTP
from support.serving.results import Checkpoints
from support.serving.states import differences, experts_state
from support.serving.vllm_on_cpu import load_model, make_vllm_config, rank_of, routed_experts

pytestmark = pytest.mark.usefixtures("plugin")


def draft_state(directory: Path, backend: str) -> dict[str, Any]:
    """The draft model's expert layers, loaded as speculative decoding loads them."""
    from vllm.config import SpeculativeConfig
    from vllm.model_executor.model_loader import get_model_loader

    target = make_vllm_config(directory, moe_backend=backend)
    speculative = SpeculativeConfig(
        method="mtp",
        num_speculative_tokens=1,
        target_model_config=target.model_config,
        target_parallel_config=target.parallel_config,
    )
    config = make_vllm_config(directory, moe_backend=backend, vllm={"speculative_config": speculative})
    draft = speculative.draft_model_config
    assert draft.quantization == config.model_config.quantization
    with rank_of(config), counting(Counts()):
        model = get_model_loader(config.load_config).load_model(vllm_config=config, model_config=draft)
        assert len(routed_experts(model)) == 1
        return experts_state(model)


def test_a_prepared_mtp_layer(checkpoints: Checkpoints) -> None:
    source, prepared = checkpoints.get(MTP)
    expected = draft_state(source, "flashinfer_cutedsl")
    assert differences(expected, draft_state(prepared, "auto")) == []


def test_the_target_of_an_mtp_checkpoint(checkpoints: Checkpoints) -> None:
    """The target model skips the MTP layer's tensors, prepared or not."""
    states = []
    for directory, backend in zip(checkpoints.get(MTP), ("flashinfer_cutedsl", "auto"), strict=True):
        config = make_vllm_config(directory, moe_backend=backend)
        with rank_of(config):
            states.append(experts_state(load_model(config)))
    assert differences(*states) == []


@pytest.mark.parametrize("quant", ["modelopt", "modelopt_mixed", "compressed-tensors"])
def test_the_configuration_goes_to_other_processes(checkpoints: Checkpoints, quant: str) -> None:
    """vLLM pickles its configuration for engine and workers; the stamp must still be there."""
    model = replace(COMPRESSED, quant=quant)
    config = make_vllm_config(checkpoints.get(model)[1], moe_backend="auto")
    again = pickle.loads(pickle.dumps(config))
    assert type(again.quant_config) is type(config.quant_config)
    assert again.quant_config.stamp == config.quant_config.stamp
    assert again.model_config.hf_config.quantization_config["nvfp4_prep_stamp"]["layout"]["moe_tp"] == 1
    assert again.compute_hash() == config.compute_hash()
