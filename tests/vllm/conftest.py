"""Fixtures of the tests that run the real vLLM; without vLLM (see `make test-vllm`) nothing here is collected."""

from __future__ import annotations

import importlib.util
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# This directory is itself importable as a namespace package called vllm, so find_spec("vllm") alone proves nothing.
_spec = importlib.util.find_spec("vllm")
HAVE_VLLM = _spec is not None and bool(_spec.origin)
collect_ignore_glob = [] if HAVE_VLLM else ["test_*.py"]

if HAVE_VLLM:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from support.serving.vllm_on_cpu import bring_up

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bring_up()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from support.serving.results import Checkpoints

    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="session", autouse=True)
def forked() -> Iterator[tuple[Any, Any]]:
    """Twice two processes with the plugin, forked before the first test."""
    from support.serving.ranks import Ranks

    both = Ranks(), Ranks()
    yield both
    for processes in both:
        processes.close()


@pytest.fixture(scope="session")
def ranks(forked: tuple[Any, Any]) -> Any:
    """Two processes with the plugin."""
    return forked[0]


@pytest.fixture(scope="session")
def mortal_ranks(forked: tuple[Any, Any]) -> Any:
    """Two that one test may kill."""
    return forked[1]


@pytest.fixture(autouse=True)
def fresh_probes() -> Iterator[None]:
    """What the plugin remembers of the installed vLLM is forgotten, so that no test sees another's stand-in."""
    yield
    from nvfp4_prep.vllm.layout_check import installed_layout

    installed_layout.cache_clear()


@pytest.fixture(scope="session")
def plugin() -> None:
    """The plugin in this process."""
    from nvfp4_prep.vllm import register

    register()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The table of models and configurations, and the refusals with their messages."""
    if not HAVE_VLLM:
        return
    from support.serving.results import REFUSALS, TABLE, table_lines

    if TABLE:
        terminalreporter.section("prepared against source, through vLLM's own code")
        for line in table_lines():
            terminalreporter.write_line(line)
    if REFUSALS:
        terminalreporter.section("refusals")
        for what, message in REFUSALS:
            terminalreporter.write_line(f"{what}: {message}")
    if path := os.environ.get("NVFP4_PREP_VLLM_RESULTS"):
        Path(path).write_text(json.dumps({"table": TABLE, "refusals": REFUSALS}, indent=1) + "\n")
