"""ModelExpress: a stand-in makes the real loader's calls in the real order (modelexpress 0.7, engines/vllm/adapter.py).

A source loads from disk and publishes every tensor of the model. A target fills the model with DummyModelLoader, runs
process_weights_after_loading, and then receives the published tensors by name into the same storage.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor import model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader
from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading

from nvfp4_prep.errors import ServingError
from nvfp4_prep.options import ConvertOptions, LayoutName
from support.serving.families import FAMILIES
from support.serving.results import Checkpoints
from support.serving.stand_ins import trtllm_on_cpu
from support.serving.states import differences, snapshot
from support.serving.tiny_models import TinyModel
from support.serving.vllm_on_cpu import load_model, make_vllm_config, rank_of

QWEN, DEEPSEEK, NEMOTRON = FAMILIES["qwen3_moe"], FAMILIES["deepseek_v3"], FAMILIES["nemotron_h"]
pytestmark = pytest.mark.usefixtures("plugin")
PUBLISHED: dict[str, torch.Tensor] = {}


class ExpressStandIn(BaseModelLoader):
    """The order of MxModelLoader's calls, with a dictionary in the network's place."""

    target = False
    lost = ""

    def download_model(self, model_config: ModelConfig) -> None: ...

    def load_weights(self, model: torch.nn.Module, model_config: ModelConfig) -> None: ...

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> torch.nn.Module:
        from vllm.utils.torch_utils import set_default_torch_dtype

        with set_default_torch_dtype(model_config.dtype):
            model = initialize_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
            config = copy.copy(self.load_config)
            config.load_format = "dummy" if self.target else "auto"
            loader = (DummyModelLoader if self.target else DefaultModelLoader)(config)
            with without(self.lost):
                loader.load_weights(model, model_config)
            process_weights_after_loading(model, model_config, torch.device("cpu"))
        if self.target:
            for name, tensor in tensors_of(model):
                tensor.copy_(PUBLISHED[name])
        else:
            PUBLISHED.clear()
            PUBLISHED.update((name, tensor.clone()) for name, tensor in tensors_of(model))
        return model.eval()


def tensors_of(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """What modelexpress collects: named parameters and buffers."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.numel() and tensor.is_contiguous():
            yield name, tensor.data


def without(lost: str) -> Any:
    """A loader that misses tensors whose names end so."""
    read = DefaultModelLoader.get_all_weights

    def get_all_weights(self: Any, *args: Any) -> Iterator[tuple[str, torch.Tensor]]:
        return (pair for pair in read(self, *args) if not lost or not pair[0].endswith(lost))

    return mock.patch.object(DefaultModelLoader, "get_all_weights", get_all_weights)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(model_loader._LOAD_FORMAT_TO_MODEL_LOADER, "modelexpress", ExpressStandIn)


def express_state(directory: Path, *, target: bool, lost: str = "", moe_backend: str = "auto") -> dict[str, Any]:
    config = make_vllm_config(directory, moe_backend=moe_backend, load={"load_format": "modelexpress"})
    with (
        rank_of(config),
        mock.patch.object(ExpressStandIn, "target", target),
        mock.patch.object(ExpressStandIn, "lost", lost),
    ):
        return snapshot(load_model(config))


@pytest.mark.parametrize("model", [QWEN, DEEPSEEK, NEMOTRON], ids=lambda model: model.family)
def test_a_target_becomes_what_its_source_is(checkpoints: Checkpoints, model: TinyModel) -> None:
    """Kernel arguments too: 1 / input_scale of the kernel object is sent, not left as the dummy scales made it."""
    _, prepared = checkpoints.get(model)
    source = express_state(prepared, target=False)
    assert any(name.endswith("nvfp4_prep_a1_gscale") for name in PUBLISHED)
    target = express_state(prepared, target=True)
    experts = {name: value for name, value in source.items() if "/" in name}
    assert differences(experts, {name: value for name, value in target.items() if "/" in name}) == []
    assert len(experts) > 28


@pytest.mark.parametrize("backend", ["auto", "flashinfer_cutedsl"])
def test_a_target_of_the_other_kernels_file(checkpoints: Checkpoints, backend: str) -> None:
    """What the TRTLLM-gen kernel derives from the scales are parameters of the layer, which travel too."""
    _, prepared = checkpoints.get(QWEN, ConvertOptions(layout=LayoutName.TRTLLM))
    with trtllm_on_cpu():
        source = express_state(prepared, target=False, moe_backend=backend)
        assert any(name.endswith("g1_scale_c") for name in PUBLISHED) == (backend == "auto")
        target = express_state(prepared, target=True, moe_backend=backend)
    assert differences(source, target) == []


def test_a_source_that_misses_a_tensor_is_refused(checkpoints: Checkpoints) -> None:
    _, prepared = checkpoints.get(QWEN)
    with pytest.raises(ServingError, match="1 of 8 tensors of prepared experts did not arrive: w2_weight_scale_2"):
        express_state(prepared, target=False, lost="layers.0.mlp.experts.routed_experts.w2_weight_scale_2")
