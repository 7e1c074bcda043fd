"""Every prepared layer that a rank ought to hold was taken, or the server says which one was not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from sglang_models import COMPRESSED_MTP, DRAFTED, MODELS, Checkpoints
from sglang_on_cpu import load_model, make_server_args, rank_of
from sglang_results import REFUSALS
from sglang_states import expert_layers

from nvfp4_prep.checkpoint.filenames import MANIFEST
from nvfp4_prep.errors import ServingError
from nvfp4_prep.sglang import arrivals

INDEX = "model.safetensors.index.json"
pytestmark = pytest.mark.usefixtures("plugin")


def load(directory: Path, **options: Any) -> Any:
    args = make_server_args(directory)
    with rank_of(args):
        return load_model(args, **options)


def passing_over(monkeypatch: pytest.MonkeyPatch, model_class: Any, names: str) -> None:
    """Have a model class pass over tensors in silence, as SGLang's do with names that they do not know."""
    original = model_class.load_weights

    def load_weights(self: Any, weights: Iterable[tuple[str, Any]], *args: Any, **kwargs: Any) -> Any:
        return original(self, ((name, tensor) for name, tensor in weights if names not in name), *args, **kwargs)

    monkeypatch.setattr(model_class, "load_weights", load_weights)


@pytest.fixture
def stock_layer(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Have the plugin leave one layer to SGLang."""

    def leave(prefix: str) -> None:
        from nvfp4_prep.sglang import methods

        original = methods.prepared_method

        def prepared_method(method: Any, config: Any, layer: Any, *args: Any, **kwargs: Any) -> Any:
            if str(kwargs.get("prefix", args[0] if args else "")) == prefix:
                return method
            return original(method, config, layer, *args, **kwargs)

        monkeypatch.setattr(methods, "prepared_method", prepared_method)

    return leave


@pytest.mark.parametrize("load_format", ["auto", "nvfp4_prep"])
def test_a_layer_that_is_passed_over(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, stock_layer: Callable[[str], None], load_format: str
) -> None:
    """One that the plugin did not take, in a class that does not notice: its parameters would be as they were made."""
    from sglang.srt.models.qwen3_moe import Qwen3MoeForCausalLM

    _, prepared = checkpoints.get(MODELS["qwen3_moe"], trtllm=True)
    stock_layer("model.layers.1.mlp.experts")
    passing_over(monkeypatch, Qwen3MoeForCausalLM, "model.layers.1.mlp.experts.")
    words = "prepared layers were passed over by this model class of SGLang: model.layers.1.mlp.experts"
    with pytest.raises(ServingError) as caught:
        load(prepared, load_format=load_format)
    assert caught.value.what == words
    assert caught.value.where == "Qwen3MoeForCausalLM"
    REFUSALS.append(("a layer that SGLang passes over", str(caught.value)))


def test_a_layer_that_is_in_no_file(
    checkpoints: Checkpoints, tmp_path: Path, stock_layer: Callable[[str], None]
) -> None:
    """The manifest names it, and SGLang holds something else in its place, which nothing fills."""
    prepared = Path(shutil.copytree(checkpoints.get(MODELS["qwen3_moe"], trtllm=True)[1], tmp_path / "prepared"))
    lost = "model.layers.1.mlp.experts"
    index = json.loads((prepared / INDEX).read_text())
    for file in {file for name, file in index["weight_map"].items() if name.startswith(lost)}:
        tensors = load_file(prepared / file)
        kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(lost)}
        save_file(kept, prepared / file)
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if not name.startswith(lost)}
    (prepared / INDEX).write_text(json.dumps(index))
    stock_layer(lost)
    with pytest.raises(ServingError, match=f"passed over by this model class of SGLang: {lost}"):
        load(prepared)
    (prepared / MANIFEST).unlink()
    load(prepared)  # nobody knows of it any more: a stock layer


def test_a_draft_model_that_passes_its_layer_over(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, stock_layer: Callable[[str], None]
) -> None:
    from sglang.srt.models.deepseek_nextn import DeepseekV3ForCausalLMNextN

    _, prepared = checkpoints.get(COMPRESSED_MTP, trtllm=True)
    assert len(expert_layers(load(prepared, draft=True))) == 1
    stock_layer("model.layers.3.mlp.experts")
    stock_layer("model.decoder.mlp.experts")
    passing_over(monkeypatch, DeepseekV3ForCausalLMNextN, "layers.3.mlp.experts.")
    with pytest.raises(ServingError, match=r"model\.layers\.3\.mlp\.experts") as caught:
        load(prepared, draft=True)
    REFUSALS.append(("a draft layer that SGLang passes over", str(caught.value)))


FOUR = tuple(f"model.layers.{number}.mlp.experts" for number in range(4))
MTP = "model.mtp.layers.0.mlp.experts"


def expected(
    stored: Iterable[str],
    *,
    layers: int | None = 3,
    draft: bool = False,
    stage: tuple[int, int] | None = None,
    architecture: str = "DeepseekV3ForCausalLM",
) -> list[str]:
    """The layers that such a model has to take."""
    config = SimpleNamespace(
        is_draft_model=draft,
        hf_config=SimpleNamespace(architectures=[architecture]),
        hf_text_config=SimpleNamespace(num_hidden_layers=layers),
    )
    inner = SimpleNamespace(layers=[])
    if stage is not None:
        inner.start_layer, inner.end_layer = stage
    return sorted(arrivals.expected_layers(stored, SimpleNamespace(modules=lambda: [inner]), config, None))


def test_which_layers_belong_to_which_model() -> None:
    nextn = "DeepseekV3ForCausalLMNextN"
    assert expected(FOUR) == [*FOUR[:3]]
    assert expected(FOUR, stage=(1, 2)) == [FOUR[1]]
    assert expected(FOUR, stage=(2, 3)) == [FOUR[2]]
    assert expected([*FOUR, MTP], layers=4) == [*FOUR]
    assert expected([*FOUR, MTP], layers=None) == [*FOUR]
    assert expected(FOUR, draft=True, architecture=nextn) == [FOUR[3]]
    assert expected([*FOUR, MTP], layers=4, draft=True, architecture="MiMoV2MTP") == [MTP]
    assert expected(FOUR[:3], draft=True, architecture=nextn) == []  # its draft layer is not prepared
    assert expected(FOUR[:1], layers=1, draft=True, architecture=nextn) == [FOUR[0]]  # a checkpoint of its own
    assert expected(FOUR[:2], draft=True, architecture="LlamaForCausalLMEagle") == [*FOUR[:2]]


def test_the_target_of_a_checkpoint_with_a_draft_layer_needs_its_own_alone(checkpoints: Checkpoints) -> None:
    _, prepared = checkpoints.get(DRAFTED["deepseek_v3"], trtllm=True)
    layers = expert_layers(load(prepared))
    stored = {name for layer in layers.values() for name in layer.nvfp4_prep.stored_layers}
    assert stored == {f"{name}" for name in layers}
