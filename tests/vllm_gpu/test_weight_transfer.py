"""New weights from a trainer in another process: vLLM's transfer engines on both sides, over NCCL and CUDA's handles.

The trainer drives the update through vLLM's client protocol; here its calls arrive by a pipe instead of by HTTP.
"""

from __future__ import annotations

import functools
import importlib.util
import multiprocessing
import socket
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nvfp4_prep.commands.convert import convert
from nvfp4_prep.options import ConvertOptions

pytestmark = pytest.mark.gpu

PROMPT = list(range(10, 31))
SECONDS = 120.0


class PipeClient:
    """vLLM's ``VLLMWeightSyncClient``: each call is sent, and its failure raised here."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def _call(self, method: str, *arguments: Any) -> None:
        self._pipe.send((method, arguments))
        failure = self._pipe.recv()
        if failure is not None:
            raise RuntimeError(failure)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._call("init", init_info)

    def start_weight_update(self) -> None:
        self._call("start")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._call("update", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._call("finish")


def trainer(pipe: Connection, directory: Path, gpu: int, options: dict[str, Any]) -> None:
    """Send all tensors of a directory by the engine that the options belong to, in a process of its own."""
    from support.serving.vllm_on_gpu import bring_up

    torch.cuda.set_device(gpu)
    bring_up()
    from vllm.distributed.weight_transfer import base, ipc_engine, nccl_engine

    from support.serving.installed import tensors_of_files

    indexed = (directory / "model.safetensors.index.json").exists()
    stored = tensors_of_files(directory) if indexed else load_file(directory / "model.safetensors")
    tensors = {name: tensor.to(f"cuda:{gpu}") for name, tensor in stored.items()}

    class Source(base.WeightSource):
        @functools.cached_property
        def metadata(self) -> list[Any]:
            return [base.ParamMeta(name, each.dtype, tuple(each.shape)) for name, each in tensors.items()]

        def iter_full(self) -> Any:
            return iter(tensors.items())

    if "master_port" in options:
        engine, info = nccl_engine.NCCLTrainerWeightTransferEngine, nccl_engine.NCCLTrainerInitInfo(rank=0, **options)
    else:
        engine, info = ipc_engine.IPCTrainerWeightTransferEngine, ipc_engine.IPCTrainerInitInfo(rank=0, **options)
    try:
        engine.trainer_init(info, client=PipeClient(pipe), source=Source()).send_weights()
        torch.cuda.synchronize()
        pipe.send(("done", ()))
    except Exception as error:
        pipe.send(("failed", (f"{type(error).__name__}: {error}",)))


def receive(engine: Any, directory: Path, gpu: int, options: dict[str, Any]) -> str | None:
    """Serve the trainer's calls; return its failure."""
    methods = {
        "init": lambda info: engine.init_transfer_engine(engine.parse_init_info(info)),
        "start": engine.start_weight_update,
        "update": engine.update_weights,
        "finish": engine.finish_weight_update,
    }
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=trainer, args=(theirs, directory, gpu, options), daemon=True)
    process.start()
    theirs.close()
    try:
        while pipe.poll(SECONDS):
            method, arguments = pipe.recv()
            if method in ("done", "failed"):
                return arguments[0] if arguments else None
            try:
                methods[method](*arguments)
                pipe.send(None)
            except Exception as error:  # the trainer is told, as by a server
                pipe.send(f"{type(error).__name__}: {error}")
        raise TimeoutError("the trainer says nothing")
    finally:
        process.kill()
        process.join()


@pytest.fixture(autouse=True)
def torchs_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM opens NCCL by its short name, which does not find torch's; it would then transfer nothing, in silence."""
    found = importlib.util.find_spec("nvidia.nccl")
    if found is not None and found.submodule_search_locations:
        library = Path(found.submodule_search_locations[0], "lib", "libnccl.so.2")
        monkeypatch.setenv("VLLM_NCCL_SO_PATH", str(library))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def engine_of(whole: Any, backend: str) -> Any:
    from vllm.config.weight_transfer import WeightTransferConfig
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    config = WeightTransferConfig(backend=backend)
    return WeightTransferEngineFactory.create_engine(config, whole.config, torch.device("cuda:0"), whole.model)


def route(backend: str, packed: bool) -> tuple[int, dict[str, Any]]:
    """The trainer's GPU and options."""
    if backend == "ipc":
        return 0, {"packed": packed}
    if torch.cuda.device_count() < 2:
        pytest.skip("NCCL takes one process a GPU: needs two GPUs")
    return 1, {"packed": packed, "master_address": "127.0.0.1", "master_port": free_port(), "world_size": 2}


@pytest.fixture
def newer(case: Any, tmp_path: Path) -> Path:
    """The model with other experts, prepared in the same layout."""
    source = case.model.write(tmp_path / "source", exchanged=True)
    convert(source, tmp_path / "prepared", ConvertOptions(layout=case.layout), smoke=None)
    return tmp_path / "prepared"


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "one by one"])
@pytest.mark.parametrize("backend", ["nccl", "ipc"])
def test_prepared_tensors(case: Any, newer: Path, backend: str, packed: bool) -> None:
    from support.serving.states import differences, snapshot, storage_of
    from support.serving.vllm_on_gpu import loaded

    gpu, options = route(backend, packed)
    with loaded(newer, moe_backend="flashinfer_cutedsl") as whole:
        expected, expected_state = whole.log_probabilities(PROMPT), snapshot(whole.model)
    with loaded(case.prepared, moe_backend="flashinfer_cutedsl") as whole:
        storage, engine = storage_of(whole.model), engine_of(whole, backend)
        assert not torch.equal(whole.log_probabilities(PROMPT), expected)
        assert receive(engine, newer, gpu, options) is None
        assert backend == "ipc" or engine.model_update_group.available
        assert storage_of(whole.model) == storage
        assert differences(expected_state, snapshot(whole.model)) == []
        assert torch.equal(whole.log_probabilities(PROMPT), expected)
        engine.shutdown()
    print(
        f"\n{case.model.name}, {case.layout.value}, {backend}{', packed' if packed else ''}: {len(expected_state)}"
        " tensors and the forward pass bit-equal to a server that was started with the new weights"
    )


def test_original_tensors(case: Any) -> None:
    from support.serving.vllm_on_gpu import loaded

    with loaded(case.prepared, moe_backend="flashinfer_cutedsl") as whole:
        failure = receive(engine_of(whole, "ipc"), case.source, 0, {"packed": False})
    assert failure is not None and "for a layer that the stamp says is prepared" in failure
