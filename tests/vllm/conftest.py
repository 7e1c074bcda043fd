"""These tests need the second environment (`make test-vllm`); without vLLM they are not collected."""

from __future__ import annotations

import importlib.util

# This directory is itself importable as a namespace package called vllm, so find_spec("vllm") alone proves nothing.
_spec = importlib.util.find_spec("vllm")
collect_ignore_glob = [] if _spec is not None and _spec.origin else ["test_*.py"]
