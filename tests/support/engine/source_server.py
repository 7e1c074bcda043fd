"""vLLM's OpenAI server for the source checkpoint, with the experts of `source_experts.py`.

Takes the arguments of ``python -m vllm.entrypoints.openai.api_server``. The engine's process, which is spawned, imports
this program too, and so has the same experts.
"""

from __future__ import annotations

import runpy

import source_experts  # noqa: F401 (in every process)

if __name__ == "__main__":
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
