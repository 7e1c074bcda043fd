"""`python -m sglang.launch_server` as a process: tokens over HTTP, and what must end before it answers."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from sglang_results import SERVERS, WHOLE
from sglang_server import Server, launched

from nvfp4_prep.commands.convert import convert
from support.engine.whole_models import QWEN3_MOE

WHOLE["servers"] = 5
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
        output = servers[1].output
    assert actual == expected
    assert len({tuple(answer.tokens) for answer in expected}) == len(PROMPTS)
    assert "'moe_runner_backend': 'flashinfer_cutedsl'" in output and "'quantization': 'modelopt_fp4'" in output
    assert "Prepared experts: " in output
    SERVERS.append(("the plugin, no flag but --load-format nvfp4_prep", "36 tokens, as from the source"))


def test_the_kernel_is_where_a_cpu_stops(checkpoint: tuple[Path, Path], tmp_path: Path) -> None:
    """Without the torch kernel everything is loaded, and the first forward pass ends in the kernel's first function."""
    with launched(checkpoint[1], tmp_path) as server:
        with pytest.raises(RuntimeError, match="did not start"):
            server.wait_until_ready()
        output = server.output
    assert "Load weight end." in output
    assert "in fused_experts_none_to_flashinfer_cutedsl_fp4" in output
    assert "Could not run 'sglang::flashinfer_fp4_quantize'" in output
    SERVERS.append(("the plugin, FlashInfer's own kernel", "loads; a CPU stops at sglang::flashinfer_fp4_quantize"))


def refused(server: Server) -> str:
    """The end of a server that must never answer."""
    assert server.wait_for_end() == []
    assert server.process.returncode != 0
    return server.output


def test_an_incomplete_checkpoint_never_answers(checkpoint: tuple[Path, Path], tmp_path: Path) -> None:
    prepared = Path(shutil.copytree(checkpoint[1], tmp_path / "prepared"))
    path, index = prepared / "model.safetensors.index.json", "weight_map"
    weight_map = json.loads(path.read_text())[index]
    lost = "model.layers.1.mlp.experts.routed_experts.w2_weight"
    file = prepared / weight_map.pop(lost)
    tensors = load_file(file)
    del tensors[lost]
    save_file(tensors, file)
    path.write_text(json.dumps({"metadata": {}, index: weight_map}))
    with launched(prepared, tmp_path) as server:
        output = refused(server)
    assert "1 of 8 tensors of prepared experts did not arrive: w2_weight" in output
    SERVERS.append(("the plugin, a tensor missing", "refused while loading, no answer"))


def test_stock_sglang_never_answers(checkpoint: tuple[Path, Path], tmp_path: Path) -> None:
    """Without the plugin the stamp's method name is unknown to SGLang."""
    with launched(checkpoint[1], tmp_path, SGLANG_PLUGINS="other") as server:
        output = refused(server)
    assert "ValueError: Unknown quantization method: nvfp4_prep" in output
    assert "Load weight begin" not in output
    SERVERS.append(("no plugin", "SGLang: Unknown quantization method: nvfp4_prep; no answer"))


def test_a_plugin_that_fails_never_answers(checkpoint: tuple[Path, Path], tmp_path: Path) -> None:
    """SGLang logs a plugin that fails and goes on: as without it."""
    with launched(checkpoint[1], tmp_path, NVFP4_PREP_TEST_BROKEN="1") as server:
        output = refused(server)
    assert (
        "Failed to execute general plugin: nvfp4_prep" in output and "Unknown quantization method: nvfp4_prep" in output
    )
    SERVERS.append(("a plugin that fails", "SGLang logs it, and refuses as without it"))
