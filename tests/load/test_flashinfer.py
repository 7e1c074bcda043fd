"""A layer as FlashInfer's call takes it: the arguments, and what is refused before anything large is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import nvfp4_prep
from nvfp4_prep.errors import CheckpointError, UnsupportedCheckpointError, UsageError
from nvfp4_prep.load import load_layer
from nvfp4_prep_kernels.flashinfer_moe import bind_call
from nvfp4_prep_kernels.moe_types import MoeActivation, MoeTokens, PreparedExperts
from support.paths import DATA

FLASHINFER = json.loads((DATA / "flashinfer_signatures.json").read_text())["0.7.2.post1"]
OF_THE_TOKENS = {
    "x",
    "x_sf",
    "token_selected_experts",
    "token_final_scales",
    "top_k",
    "moe_output",
    "output_dtype",
}


@pytest.fixture
def copied(sample_prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sample_prepared, tmp_path / "copy"))


def test_arguments_are_those_that_the_smoke_run_binds(sample_prepared: Path) -> None:
    ready = nvfp4_prep.load_layer(sample_prepared, 1)
    record, experts = ready.loaded.record, ready.loaded.record.dims.experts
    raw = {name: tensor.view(torch.uint8) if tensor.ndim == 3 else tensor for name, tensor in ready.tensors.items()}
    prepared = PreparedExperts(record.layout, record.dims, **raw)
    zeros = torch.zeros(1, 2, dtype=torch.uint8)
    tokens = MoeTokens(zeros, zeros, torch.zeros(1, 2, dtype=torch.int32), torch.zeros(1, 2))
    names = FLASHINFER["cute_dsl_fused_moe"]["positional"]
    call = bind_call(names, "0.7.2.post1", prepared, tokens, MoeActivation(), torch.zeros(1, 2))
    assert set(call) == set(ready.arguments) | OF_THE_TOKENS
    for name, value in ready.arguments.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == call[name].dtype and value.stride() == call[name].stride(), name
            if value.element_size() == 1:
                value, call[name] = value.view(torch.uint8), call[name].view(torch.uint8)
            assert torch.equal(value, call[name]), name
        else:
            assert value == call[name], name
    assert (ready.arguments["num_experts"], ready.arguments["local_expert_offset"]) == (experts, 0)
    assert ready.x_global_scale.item() == pytest.approx(1 / ready.tensors["w13_input_scale"][0].item())


def test_a_rank_knows_its_first_expert(sample_prepared: Path) -> None:
    whole = nvfp4_prep.load_layer(sample_prepared, 1)
    last = nvfp4_prep.load_layer(sample_prepared, 1, ep=(1, 2))
    chosen = nvfp4_prep.load_layer(sample_prepared, 1, experts=[3, 4])
    for ready in (last, chosen):
        numbers = [ready.arguments[name] for name in ("num_experts", "num_local_experts", "local_expert_offset")]
        assert numbers == [5, 2, 3]
        assert torch.equal(ready.tensors["w13_weight"], whole.tensors["w13_weight"][3:])
        assert torch.equal(ready.arguments["w1_alpha"], whole.arguments["w1_alpha"][3:])


@pytest.mark.parametrize("experts", [[0, 2], [1, 0], [3, 3], []])
def test_experts_that_do_not_follow_each_other(copied: Path, experts: list[int]) -> None:
    for file in copied.glob("experts-layer-*"):
        file.unlink()  # refused before anything is read
    with pytest.raises(UsageError, match="follow each other"):
        nvfp4_prep.load_layer(copied, 1, experts=experts)


def test_the_batched_layout_is_refused_before_it_is_read(tmp_path: Path) -> None:
    source = tmp_path / "source"
    nvfp4_prep.write_sample(source, nvfp4_prep.SampleModel(layers=2, experts=2, intermediate=64, hidden=256))
    options = nvfp4_prep.ConvertOptions(layout=nvfp4_prep.LayoutName.CUTEDSL_BATCHED)
    out = nvfp4_prep.convert(source, tmp_path / "out", options).path
    assert load_layer(out, 1).tensors["w13_weight"].shape == (2, 128, 128)
    (out / "experts-layer-00001.safetensors").unlink()
    with pytest.raises(UsageError, match="batched CuteDSL layout is not that of FlashInfer"):
        nvfp4_prep.load_layer(out, 1)


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("{", CheckpointError, "is not valid JSON"),
        ("[" * 100_000, CheckpointError, "is nested too deep; expected at most 200 levels"),
        ("[]", CheckpointError, "must be a JSON object"),
        (None, CheckpointError, "cannot be read"),
    ],
)
def test_a_config_that_cannot_be_read(copied: Path, text: str | None, kind: type[Exception], message: str) -> None:
    (copied / "config.json").unlink()
    if text is not None:
        (copied / "config.json").write_text(text)
    with pytest.raises(kind, match=message):
        nvfp4_prep.load_layer(copied, 1)


def test_an_activation_without_parameters(copied: Path) -> None:
    manifest = json.loads((copied / "nvfp4_prep.json").read_text())

    def situ(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: {**v, "kind": "situ"} if k == "activation" else situ(v) for k, v in value.items()}
        return [situ(item) for item in value] if isinstance(value, list) else value

    (copied / "nvfp4_prep.json").write_text(json.dumps(situ(manifest)))
    with pytest.raises(UnsupportedCheckpointError, match="cannot be called with the activation"):
        nvfp4_prep.load_layer(copied, 1)
