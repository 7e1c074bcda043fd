"""New weights for a running model: what is served, what is refused by name, and that the former bytes stay."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file

from nvfp4_prep.errors import CheckpointError, NvfpPrepError, ServingError
from nvfp4_prep.options import ConvertOptions, LayoutName
from nvfp4_prep.vllm import updates
from support.serving.families import FAMILIES
from support.serving.installed import reload_from, reload_with, tensors_of_files
from support.serving.results import REFUSALS, Checkpoints
from support.serving.states import differences, experts_state, snapshot, state_of_open, storage_of
from support.serving.tiny_models import TinyModel
from support.serving.vllm_on_cpu import load_model, make_vllm_config, rank_of

QWEN, DEEPSEEK, NEMOTRON = FAMILIES["qwen3_moe"], FAMILIES["deepseek_v3"], FAMILIES["nemotron_h"]
BATCHED = ConvertOptions(layout=LayoutName.CUTEDSL_BATCHED)
TRTLLM = ConvertOptions(layout=LayoutName.TRTLLM)
ANOTHER_LAYOUT = "weights of another layout than the served one"
pytestmark = pytest.mark.usefixtures("plugin")


@pytest.fixture(autouse=True)
def own_rotary_embeddings() -> Iterator[None]:
    """A failed reload leaves a model on the meta device, with the rotary embeddings that vLLM shares between models."""
    from vllm.model_executor.layers import rotary_embedding

    with mock.patch.dict(rotary_embedding._ROPE_DICT, clear=True):
        yield


class Running:
    """A model that was started from a prepared checkpoint."""

    def __init__(self, stack: ExitStack, directory: Path, **load: Any) -> None:
        self.directory = directory
        self.config = make_vllm_config(directory, moe_backend="auto", load=load)
        stack.enter_context(rank_of(self.config))
        self.model = load_model(self.config)
        self.before, self.storage = snapshot(self.model), storage_of(self.model)

    def refuses(self, directory: Path | str, kind: type[NvfpPrepError], match: str) -> None:
        """The update is refused, and every parameter and kernel argument is what it was, in the same storage."""
        with pytest.raises(kind, match=match) as refused:
            reload_from(self.config, self.model, Path(directory))
        REFUSALS.append(("new weights for a running model", str(refused.value)))
        assert storage_of(self.model) == self.storage
        assert differences(self.before, snapshot(self.model)) == []


@pytest.fixture
def start() -> Iterator[Callable[..., Running]]:
    with ExitStack() as stack:
        yield lambda directory, **load: Running(stack, directory, **load)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (QWEN, ConvertOptions(gate_up_block=16)),
        (QWEN, BATCHED),
        (QWEN, TRTLLM),
        (QWEN, ConvertOptions(moe_tp=2)),
        (DEEPSEEK, BATCHED),
        (DEEPSEEK, TRTLLM),
        (NEMOTRON, TRTLLM),
    ],
    ids=lambda value: getattr(value, "family", None),
)
def test_another_layout(
    checkpoints: Checkpoints, start: Callable[..., Running], model: TinyModel, options: ConvertOptions
) -> None:
    running = start(checkpoints.get(model)[1])
    other = checkpoints.get(model, options)[1]
    running.refuses(other, ServingError, ANOTHER_LAYOUT)
    reload_from(running.config, running.model, running.directory)
    assert differences(running.before, snapshot(running.model)) == []


@pytest.mark.parametrize(("model", "options"), [(QWEN, BATCHED), (NEMOTRON, TRTLLM)], ids=["qwen", "nemotron"])
def test_another_layout_would_be_served_in_silence(
    checkpoints: Checkpoints, start: Callable[..., Running], model: TinyModel, options: ConvertOptions
) -> None:
    """The reason for the check: without it the same update ends well and the kernel reads other bytes."""
    running = start(checkpoints.get(model)[1])
    with mock.patch.object(updates, "_check_update"):
        reload_from(running.config, running.model, checkpoints.get(model, options)[1])
    found = {name.split("/")[1] for name in differences(running.before, snapshot(running.model))}
    assert {"w13_weight", "w13_weight_scale"} <= found


@pytest.mark.parametrize(
    "load",
    [{}, {"load_format": "safetensors"}, {"load_format": "fastsafetensors"}, {"load_format": "nvfp4_prep"}],
    ids=lambda load: load.get("load_format", "auto"),
)
def test_every_load_format_checks(
    checkpoints: Checkpoints, start: Callable[..., Running], load: dict[str, Any]
) -> None:
    running = start(checkpoints.get(QWEN)[1])
    running.config.load_config = replace(running.config.load_config, **load)
    running.refuses(checkpoints.get(QWEN, BATCHED)[1], ServingError, ANOTHER_LAYOUT)


@pytest.mark.parametrize("model", [QWEN, DEEPSEEK, NEMOTRON], ids=lambda model: model.family)
def test_the_source(checkpoints: Checkpoints, start: Callable[..., Running], model: TinyModel) -> None:
    """The original checkpoint is not prepared on the way: it is refused."""
    source, prepared = checkpoints.get(model)
    start(prepared).refuses(source, ServingError, f"{ANOTHER_LAYOUT}.*no stamp of nvfp4-prep")


@pytest.mark.parametrize("model", [QWEN, DEEPSEEK], ids=lambda model: model.family)
def test_original_tensors_without_a_directory(
    checkpoints: Checkpoints, start: Callable[..., Running], model: TinyModel
) -> None:
    """What a trainer sends whose experts are in the source's form."""
    source, prepared = checkpoints.get(model)
    running = start(prepared)
    with pytest.raises(ServingError, match="for a layer that the stamp says is prepared"):
        reload_with(running.config, running.model, tensors_of_files(source).items())


def without_config(directory: Path) -> None:
    (directory / "config.json").unlink()


def without_manifest(directory: Path) -> None:
    (directory / "nvfp4_prep.json").unlink()


def without_a_layer(directory: Path) -> None:
    sorted(directory.glob("experts-layer-*.safetensors"))[-1].unlink()


def without_scales(directory: Path) -> None:
    next(directory.glob("*scales*.safetensors")).unlink()


def cut_short(directory: Path) -> None:
    file = sorted(directory.glob("experts-layer-*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-64])


@pytest.mark.parametrize(
    ("damage", "kind", "match"),
    [
        (without_config, ServingError, "config.json"),
        (without_manifest, CheckpointError, "nvfp4_prep.json"),
        (without_a_layer, CheckpointError, "experts-layer-"),
        (without_scales, CheckpointError, "scales"),
        (cut_short, CheckpointError, "experts-layer-"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_damaged_directory(
    checkpoints: Checkpoints,
    start: Callable[..., Running],
    tmp_path: Path,
    damage: Callable[[Path], None],
    kind: type[NvfpPrepError],
    match: str,
) -> None:
    prepared = checkpoints.get(QWEN)[1]
    copy = shutil.copytree(prepared, tmp_path / "copy")
    damage(copy)
    start(prepared).refuses(copy, kind, match)


def test_a_missing_layer_would_keep_its_former_bytes(
    checkpoints: Checkpoints, start: Callable[..., Running], tmp_path: Path
) -> None:
    """vLLM warns of a layer of which nothing arrived, and serves two checkpoints mixed."""
    running = start(checkpoints.get(QWEN)[1])
    other = checkpoints.get(replace(QWEN, family="qwen3_moex"))[1]
    copy = shutil.copytree(other, tmp_path / "copy")
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    lost = {name: file for name, file in index["weight_map"].items() if ".layers.1.mlp.experts." in name}
    kept = {name: file for name, file in index["weight_map"].items() if name not in lost}
    (copy / "model.safetensors.index.json").write_text(json.dumps({**index, "weight_map": kept}))
    scales = next(copy.glob("*scales*.safetensors"))
    rest = {name: tensor for name, tensor in tensors_of_files(copy).items() if kept[name] == scales.name}
    save_file(rest, scales)
    for file in set(lost.values()) - {scales.name}:
        (copy / file).unlink()
    running.refuses(copy, CheckpointError, "layer")
    with mock.patch.object(updates, "_check_update"):
        reload_from(running.config, running.model, copy)
    changed = {name.split("/")[0] for name in differences(running.before, snapshot(running.model)) if "/w" in name}
    assert changed == {"model.layers.0.mlp.experts"}


@pytest.mark.parametrize(
    ("other", "actual"),
    [
        (QWEN.with_sizes(4, 256, 128), r"\(F32 \[4\], not F32 \[8\]\)"),
        (QWEN.with_sizes(8, 512, 128), r"in other sizes .*\(U8 \[|\(F8_E4M3 \["),
        (DEEPSEEK, "no such prepared layer"),
    ],
    ids=["experts", "sizes", "layers"],
)
def test_another_model(checkpoints: Checkpoints, start: Callable[..., Running], other: TinyModel, actual: str) -> None:
    match = f"weights of another model than the served one: .*({actual})"
    start(checkpoints.get(QWEN)[1]).refuses(checkpoints.get(other)[1], ServingError, match)


@pytest.mark.parametrize("place", ["nobody/no-such-model", "s3://bucket/model"])
def test_a_place_without_a_readable_config(checkpoints: Checkpoints, start: Callable[..., Running], place: str) -> None:
    from vllm.model_executor.model_loader import get_model_loader

    running = start(checkpoints.get(QWEN)[1])
    running.config.model_config.model = place
    loader = get_model_loader(running.config.load_config)
    with pytest.raises(ServingError, match=r"come from a place whose config\.json cannot be read"):
        loader.get_all_weights(running.config.model_config, running.model)


def test_a_name_on_the_hub(checkpoints: Checkpoints, start: Callable[..., Running]) -> None:
    """Its files are not here yet: the layout alone is checked."""
    from vllm.model_executor.model_loader import get_model_loader

    running = start(checkpoints.get(QWEN)[1])
    running.config.model_config.model = "somebody/model"
    loader = get_model_loader(running.config.load_config)

    def ask(of: Path) -> Any:
        config = json.loads((of / "config.json").read_text())
        with mock.patch.object(updates, "get_hf_file_to_dict", lambda *_args: config):
            return loader.get_all_weights(running.config.model_config, running.model)

    ask(running.directory)
    with pytest.raises(ServingError, match=f"somebody/model, config.json: {ANOTHER_LAYOUT}"):
        ask(checkpoints.get(QWEN, BATCHED)[1])


def test_a_reload_that_would_copy_over_the_kernels_tensors(
    checkpoints: Checkpoints, start: Callable[..., Running]
) -> None:
    """is_checkpoint_format=False: vLLM copies by name, and the names of a prepared file are those of the parameters."""
    inplace = pytest.importorskip("vllm.model_executor.model_loader.reload.inplace", reason="new in vLLM 0.32")
    running = start(checkpoints.get(QWEN)[1])
    with pytest.raises(ServingError, match="is_checkpoint_format=True"):
        inplace.reload_weights(running.config, running.model, None, str(running.directory), is_checkpoint_format=False)
    assert differences(running.before, snapshot(running.model)) == []


@pytest.mark.parametrize("model", [QWEN, DEEPSEEK], ids=lambda model: model.family)
def test_tensors_loaded_over_a_running_kernels(
    checkpoints: Checkpoints, start: Callable[..., Running], model: TinyModel
) -> None:
    """``model.load_weights`` alone: the kernel's products of scales would be those of one factor."""
    running = start(checkpoints.get(model)[1])
    prepared = [pair for pair in tensors_of_files(running.directory).items() if ".routed_experts." in pair[0]]
    with pytest.raises(ServingError, match="came for a running kernel's parameter"):
        running.model.load_weights(prepared)
    assert differences(running.before, snapshot(running.model)) == []


def test_a_reload_after_dummy_weights_must_be_complete(checkpoints: Checkpoints, start: Callable[..., Running]) -> None:
    """Started with --load-format dummy, as trainers do: the first real weights come by a reload."""
    prepared = checkpoints.get(QWEN)[1]
    running = start(prepared, load_format="dummy")
    tensors = tensors_of_files(prepared)
    reload_with(running.config, running.model, tensors.items())
    assert differences(experts_state(running.model), state_of_open(prepared)) == []
    lost = "model.layers.0.mlp.experts.routed_experts.w2_weight_scale_2"
    with pytest.raises(ServingError, match="1 of 8 tensors of prepared experts did not arrive: w2_weight_scale_2"):
        reload_with(running.config, running.model, [pair for pair in tensors.items() if pair[0] != lost])


class TestTransferEngine:
    """vLLM's transfer engine for trainers on the same GPU; CUDA's handles of memory are replaced by the tensors."""

    @pytest.fixture(autouse=True)
    def handles_on_the_cpu(self) -> Iterator[None]:
        ipc = pytest.importorskip("vllm.distributed.weight_transfer.ipc_engine")
        if not hasattr(ipc.IPCWeightTransferEngine, "start_weight_update"):
            pytest.skip("this vLLM's engine has no update of its own to start and finish")
        with (
            mock.patch.object(torch.cuda, "get_device_properties", lambda _index: mock.Mock(uuid="gpu")),
            mock.patch.object(ipc, "rebuild_cuda_tensor", lambda tensor, *_rest: tensor),
            mock.patch.object(torch.accelerator, "synchronize", lambda: None),
        ):
            yield

    def update(self, running: Running, tensors: dict[str, torch.Tensor]) -> None:
        from vllm.config.weight_transfer import WeightTransferConfig
        from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

        config = WeightTransferConfig(backend="ipc")
        engine = WeightTransferEngineFactory.create_engine(config, running.config, torch.device("cpu"), running.model)
        engine.init_transfer_engine(engine.parse_init_info({}))
        engine.start_weight_update()
        for pairs in (list(tensors.items())[0::2], list(tensors.items())[1::2]):  # layers come in two pieces
            engine.update_weights(
                {
                    "names": [name for name, _ in pairs],
                    "dtype_names": [str(tensor.dtype).split(".")[-1] for _, tensor in pairs],
                    "shapes": [list(tensor.shape) for _, tensor in pairs],
                    "ipc_handles": [{"gpu": (tensor, *[None] * 6)} for _, tensor in pairs],
                }
            )
        engine.finish_weight_update()

    @pytest.mark.parametrize("model", [QWEN, DEEPSEEK, NEMOTRON], ids=lambda model: model.family)
    def test_prepared_tensors(self, checkpoints: Checkpoints, start: Callable[..., Running], model: TinyModel) -> None:
        running = start(checkpoints.get(model)[1])
        other = checkpoints.get(replace(model, family=f"{model.family}x"))[1]
        self.update(running, tensors_of_files(other))
        assert storage_of(running.model) == running.storage
        assert differences(experts_state(running.model), state_of_open(other)) == []
        assert any("w13_weight" in name for name in differences(running.before, snapshot(running.model)))

    @pytest.mark.parametrize("model", [QWEN, DEEPSEEK], ids=lambda model: model.family)
    def test_original_tensors(self, checkpoints: Checkpoints, start: Callable[..., Running], model: TinyModel) -> None:
        source, prepared = checkpoints.get(model)
        with pytest.raises(ServingError, match="for a layer that the stamp says is prepared"):
            self.update(start(prepared), tensors_of_files(source))

    def test_a_layer_of_which_a_part_arrived(self, checkpoints: Checkpoints, start: Callable[..., Running]) -> None:
        running = start(checkpoints.get(QWEN)[1])
        tensors = tensors_of_files(running.directory)
        del tensors["model.layers.1.mlp.experts.routed_experts.w13_input_scale"]
        with pytest.raises(ServingError, match="1 of 8 tensors of prepared experts did not arrive: w13_input_scale"):
            self.update(running, tensors)


@pytest.mark.parametrize("model", [QWEN, DEEPSEEK], ids=lambda model: model.family)
def test_patches_of_a_sparse_update(checkpoints: Checkpoints, start: Callable[..., Running], model: TinyModel) -> None:
    """vLLM's sparse transfer engine loads changed elements over the running parameters: refused for prepared ones."""
    patches = pytest.importorskip("vllm.model_executor.model_loader.checkpoint_weight_patch")
    running = start(checkpoints.get(model)[1])
    name = next(name for name in tensors_of_files(running.directory) if name.endswith("w13_weight_scale_2"))
    shape = tensors_of_files(running.directory)[name].shape
    patch = patches.CheckpointWeightPatch(
        name=name, shape=tuple(shape), dtype=torch.float32, values=torch.ones(1), indices=torch.tensor([0])
    )
    with pytest.raises(ServingError, match="came for a running kernel's parameter"):
        patches.load_checkpoint_weight_patches(running.model, [patch])
    assert differences(running.before, snapshot(running.model)) == []


class TestShardedTransfer:
    """The transfer engine ``sharded_rdt`` runs the loaders once, with placeholders, and repeats their copies later.

    Everything of it is vLLM's but for Ray's transport and CUDA's streams.
    """

    @pytest.fixture(autouse=True)
    def no_streams(self) -> Iterator[None]:
        with (
            mock.patch.object(torch.cuda, "stream", lambda _stream: nullcontext()),
            mock.patch.object(torch.cuda, "device", lambda _device: nullcontext()),
            mock.patch.object(torch.accelerator, "device_index", lambda _index: nullcontext()),
            mock.patch.object(torch.cuda, "Event", mock.Mock()),
            mock.patch.object(torch, "Event", mock.Mock()),
        ):
            yield

    def engine(self, running: Running, tensors: dict[str, torch.Tensor]) -> Any:
        """An engine after its dry run."""
        rdt = pytest.importorskip("vllm.distributed.weight_transfer.sharded_rdt_engine")
        from vllm.config.weight_transfer import WeightTransferConfig

        running.config.parallel_config.distributed_executor_backend = "ray"
        config = WeightTransferConfig(backend="sharded_rdt")
        engine = rdt.ShardedRDTWeightTransferEngine(config, running.config, torch.device("cpu"), running.model)
        engine._router = mock.Mock(**{"class_of.return_value": 0, "producer_for.return_value": 0})
        engine._mark_slot_done = lambda _slot: None
        engine._slot_read_done, engine._proc_stream = [mock.Mock()], mock.Mock()
        engine._bake(
            SimpleNamespace(
                names=list(tensors),
                dtype_names=[str(tensor.dtype).split(".")[-1] for tensor in tensors.values()],
                shapes=[list(tensor.shape) for tensor in tensors.values()],
            )
        )
        return engine

    def test_prepared_tensors(self, checkpoints: Checkpoints, start: Callable[..., Running]) -> None:
        running = start(checkpoints.get(QWEN)[1])
        with pytest.raises(ServingError, match="sharded_rdt cannot load prepared experts: w") as refused:
            self.engine(running, tensors_of_files(running.directory))
        REFUSALS.append(("new weights for a running model", str(refused.value)))

    def test_other_tensors(self, checkpoints: Checkpoints, start: Callable[..., Running]) -> None:
        """They are replaced, twice, and the experts stay."""
        rdt = pytest.importorskip("vllm.distributed.weight_transfer.sharded_rdt_engine")
        running = start(checkpoints.get(QWEN)[1])
        other = checkpoints.get(replace(QWEN, family=f"{QWEN.family}x"))[1]
        tensors = {name: each for name, each in tensors_of_files(other).items() if "experts" not in name.split(".")}
        engine = self.engine(running, tensors)
        assert differences(running.before, snapshot(running.model)) == []
        plan = engine._build_call_plan(list(tensors), [len(tensors)])
        experts = experts_state(running.model)
        for factor in (1, 2):
            engine.start_weight_update()
            for chunk in plan.chunks:
                came = {key: replayed(tensors[key[0]] * factor, key[1]) for key in chunk.keys}
                engine._process_item(rdt._ProcItem(chunk=chunk, results=came, slot=0))
            engine.finish_weight_update()
            assert storage_of(running.model) == running.storage
            assert differences(experts, experts_state(running.model)) == []
            gates = {name: param for name, param in running.model.named_parameters() if name in tensors}
            assert len(gates) > 3
            assert all(torch.equal(param, tensors[name] * factor) for name, param in gates.items())


def replayed(tensor: torch.Tensor, operations: Any) -> torch.Tensor:
    """What a trainer sends: a tensor, sliced as the loader of the dry run sliced it."""
    for name, arguments, named in operations:
        tensor = getattr(tensor, name)(*arguments, **dict(named))
    return tensor
