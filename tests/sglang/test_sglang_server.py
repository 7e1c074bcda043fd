"""`python -m sglang.launch_server` as a process: tokens over HTTP, and what must end before it answers."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from sglang_results import SERVERS, WHOLE
from sglang_server import Server, launched

from nvfp4_prep.commands.convert import convert
from support.engine.whole_models import QWEN3_MOE

WHOLE["servers"] = 5
LISTENING = "Uvicorn running on"
INDEX = "model.safetensors.index.json"
PROMPTS = [[5, 6, 7, 8], [200, 3, 77], [9, 9, 9, 9, 9, 9, 100]]
UNPREPARED = ("--quantization", "modelopt_fp4", "--moe-runner-backend", "flashinfer_cutedsl")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A whole small Qwen3-MoE, and its prepared form."""
    folder = tmp_path_factory.mktemp("whole")
    source = QWEN3_MOE.write(folder / "source")
    convert(source, folder / "prepared")
    return source, folder / "prepared"


def test_tokens_over_http(checkpoint: tuple[Path, Path], tmp_path: Path) -> None:
    """A prepared checkpoint gives SGLang's own tokens of the source, and their log-probabilities to the last bit.

    Both servers have the torch kernel; loading, scales, router, attention, scheduler and HTTP are SGLang's.
    """
    source, prepared = checkpoint
    kernel = {"NVFP4_PREP_TEST_KERNEL": "1"}
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(launched(source, tmp_path / "source", *UNPREPARED, **kernel)),
            stack.enter_context(launched(prepared, tmp_path / "prepared", "--load-format", "nvfp4_prep", **kernel)),
        ]
        for server in servers:
            server.wait_until_ready()
        expected, actual = (server.generate(PROMPTS, 12) for server in servers)
        assert servers[1].update_weights(prepared)["success"]
        again = servers[1].generate(PROMPTS, 12)
        refused = servers[1].update_weights(source)
        after = servers[1].generate(PROMPTS, 12)
        output = servers[1].output
    assert actual == expected
    assert again == after == expected
    assert not refused["success"] and refused["message"].endswith("The server goes on with the former weights.")
    assert len({tuple(answer.tokens) for answer in expected}) == len(PROMPTS)
    assert "'moe_runner_backend': 'flashinfer_cutedsl'" in output and "'quantization': 'modelopt_fp4'" in output
    assert " GB of them not of prepared experts: " in output
    SERVERS.append(("the plugin, no flag but --load-format nvfp4_prep", "36 tokens, as from the source"))


@pytest.fixture(scope="module")
def ending(checkpoint: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    """Servers that end by themselves, started at once."""
    folder, prepared = tmp_path_factory.mktemp("ending"), checkpoint[1]
    with contextlib.ExitStack() as stack:
        yield {
            name: stack.enter_context(launched(directory, folder / name, **environment))
            for name, directory, environment in (
                ("kernel", prepared, {}),
                ("incomplete", without_a_tensor(prepared, folder / "incomplete-checkpoint"), {}),
                ("stock", prepared, {"SGLANG_PLUGINS": "other"}),
                ("broken", prepared, {"NVFP4_PREP_TEST_BROKEN": "1"}),
            )
        }


def without_a_tensor(prepared: Path, target: Path) -> Path:
    """A copy in which neither file nor index has one of a layer's tensors."""
    shutil.copytree(prepared, target)
    path, lost = target / INDEX, "model.layers.1.mlp.experts.routed_experts.w2_weight"
    index = json.loads(path.read_text())
    file = target / index["weight_map"].pop(lost)
    tensors = load_file(file)
    del tensors[lost]
    save_file(tensors, file)
    path.write_text(json.dumps(index))
    return target


def refused(server: Server) -> str:
    """The output of a server that must end without an answer, and before it listens."""
    assert server.wait_for_end() == []
    assert server.process.returncode != 0
    assert LISTENING not in server.output
    return server.output


def test_an_incomplete_checkpoint_never_answers(ending: dict[str, Server]) -> None:
    assert "1 of 8 tensors of prepared experts did not arrive: w2_weight" in refused(ending["incomplete"])
    SERVERS.append(("the plugin, a tensor missing", "refused while loading, no answer"))


def test_stock_sglang_never_answers(ending: dict[str, Server]) -> None:
    """Without the plugin the stamp's method name is unknown to SGLang."""
    output = refused(ending["stock"])
    assert "ValueError: Unknown quantization method: nvfp4_prep" in output
    assert "Load weight begin" not in output
    SERVERS.append(("no plugin", "SGLang: Unknown quantization method: nvfp4_prep; no answer"))


def test_a_plugin_that_fails_never_answers(ending: dict[str, Server]) -> None:
    """SGLang logs a plugin that fails and goes on: as without it."""
    output = refused(ending["broken"])
    assert "Failed to execute general plugin: nvfp4_prep" in output
    assert "Unknown quantization method: nvfp4_prep" in output
    SERVERS.append(("a plugin that fails", "SGLang logs it, and refuses as without it"))


def test_the_kernel_is_where_a_cpu_stops(ending: dict[str, Server]) -> None:
    """Without the torch kernel everything is loaded, and the first forward pass ends in the kernel's first function."""
    with pytest.raises(RuntimeError, match="did not start"):
        ending["kernel"].wait_until_ready()
    output = ending["kernel"].output
    assert "Load weight end." in output and LISTENING in output
    assert "in fused_experts_none_to_flashinfer_cutedsl_fp4" in output
    assert "Could not run 'sglang::flashinfer_fp4_quantize'" in output
    SERVERS.append(("the plugin, FlashInfer's own kernel", "loads; a CPU stops at sglang::flashinfer_fp4_quantize"))
