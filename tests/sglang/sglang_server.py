"""SGLang's real server in processes of its own: `python -m sglang.launch_server`, plugins by entry point, HTTP.

What such a process needs on a machine without a GPU is in `server_site/sitecustomize.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.engine.http_server import Completion, free_port
from support.paths import ROOT

__all__ = ["Server", "install_entry_point", "launched"]

HERE = Path(__file__).parent
START_S = 300
OPTIONS = ("--device", "cpu", "--skip-tokenizer-init", "--skip-server-warmup", "--disable-cuda-graph")
MEMORY = ("--max-total-tokens", "1024")  # else SGLang takes most of the machine's memory for its KV cache


@dataclass(frozen=True)
class Server:
    """A server process.

    Attributes:
        process: the first of its processes; it leads the others' group.
        url: without path.
        log: its output.
    """

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    @property
    def output(self) -> str:
        """What it wrote so far."""
        return self.log.read_text(errors="replace")

    def wait_until_ready(self) -> None:
        """Return once the server generates; raise ``RuntimeError`` with its output if it ended."""
        for _ in self._running():
            with contextlib.suppress(OSError):
                self._get("/health_generate")
                return
        raise RuntimeError(f"the server did not start:\n{self.output[-4000:]}")

    def wait_for_end(self) -> list[str]:
        """Return what it answered over HTTP until it ended by itself."""
        answers = []
        for _ in self._running():
            with contextlib.suppress(OSError):
                answers.append(self._get("/health"))
        return answers

    def generate(self, prompts: list[list[int]], max_tokens: int) -> list[Completion]:
        """Greedy completions of prompts given as token ids."""
        sampling = {"max_new_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        body = {"input_ids": prompts, "sampling_params": sampling, "return_logprob": True}
        answers: list[dict[str, Any]] = self._post("/generate", body)
        logprobs = [answer["meta_info"]["output_token_logprobs"] for answer in answers]
        return [Completion([token for _, token, _ in one], [value for value, _, _ in one]) for one in logprobs]

    def update_weights(self, directory: Path) -> dict[str, Any]:
        """Return the answer to a reload from a checkpoint, while the server runs; also one that says no."""
        try:
            answer: dict[str, Any] = self._post("/update_weights_from_disk", {"model_path": str(directory)})
        except urllib.error.HTTPError as error:
            answer = json.load(error)
        return answer

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=START_S) as answer:
            return json.load(answer)

    def _get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=START_S) as answer:
            return str(answer.read(100))

    def _running(self) -> Iterator[None]:
        until = time.monotonic() + START_S
        while self.process.poll() is None:
            assert time.monotonic() < until, self.output[-4000:]
            yield
            time.sleep(0.3)


@contextlib.contextmanager
def launched(directory: Path, folder: Path, *options: str, **environment: str) -> Iterator[Server]:
    """`sglang.launch_server` on a checkpoint until the end of the block; `folder` takes its output.

    The environment's ``NVFP4_PREP_TEST_KERNEL`` puts torch in the place of FlashInfer's kernel.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    command = ["-W", "ignore", "-m", "sglang.launch_server", "--model-path", str(directory), "--port", str(port)]
    paths = [str(HERE / "server_site"), str(HERE), str(install_entry_point(folder)), *filter(None, sys.path)]
    variables = {**os.environ, "SGLANG_LOGGING_LEVEL": "INFO", "PYTHONPATH": os.pathsep.join(paths), **environment}
    log = folder / "log.txt"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *command, *OPTIONS, *MEMORY, *options],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=variables,
            start_new_session=True,
        )
        try:
            yield Server(process, f"http://127.0.0.1:{port}", log)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def install_entry_point(folder: Path) -> Path:
    """Return a folder for PYTHONPATH with a distribution that has pyproject.toml's entry points for SGLang.

    So the tree need not be installed, and what is tested is what stands there.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    installed = folder / "site" / "nvfp4_prep_under_test-1.dist-info"
    installed.mkdir(parents=True, exist_ok=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: nvfp4-prep-under-test\nVersion: 1\n")
    points = project["entry-points"]["sglang.srt.plugins"]
    lines = ["[sglang.srt.plugins]", *(f"{name} = {value}" for name, value in points.items())]
    (installed / "entry_points.txt").write_text("\n".join(lines))
    return installed.parent
