"""Fixtures of the tests that run the real SGLang; without it (see `make test-sglang`) nothing here is collected."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

# This directory is itself importable as a namespace package called sglang, so find_spec alone proves nothing.
_spec = importlib.util.find_spec("sglang")
HAVE_SGLANG = _spec is not None and bool(_spec.origin)
collect_ignore_glob = [] if HAVE_SGLANG else ["test_*.py"]

if HAVE_SGLANG:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("SGLANG_LOGGING_LEVEL", "ERROR")
    sys.path.append(str(Path(__file__).parent))  # the helpers beside this file: pytest imports in importlib mode
    from sglang_on_cpu import bring_up

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bring_up()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from sglang_models import Checkpoints

    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="session", autouse=True)
def preloading(request: pytest.FixtureRequest) -> None:
    """What ranks need most of their time for, beside the tests that come before theirs."""
    if any("ranks_of" in getattr(item, "fixturenames", ()) for item in request.session.items):
        from sglang_ranks import start_preloading

        start_preloading()


@pytest.fixture(scope="session")
def ranks_of() -> Iterator[Callable[[int], Any]]:
    """As many processes with the plugin as are asked for; started when a test needs them."""
    from sglang_ranks import Ranks

    started: dict[int, Any] = {}

    def get(world: int) -> Any:
        if world not in started:
            started[world] = Ranks(world)
        return started[world]

    yield get
    for processes in started.values():
        processes.close()


@pytest.fixture(scope="session")
def ranks(ranks_of: Callable[[int], Any]) -> Any:
    """Two processes with the plugin."""
    return ranks_of(2)


@pytest.fixture(scope="session")
def plugin() -> None:
    """The plugin in this process."""
    from sglang_on_cpu import plug_in

    plug_in()


@pytest.fixture
def start(plugin: None) -> Iterator[Callable[..., Any]]:
    """Starts a server's model on one rank, which ends with the test."""
    from sglang_running import Running

    with ExitStack() as stack:
        yield lambda directory, **options: Running(stack, directory, **options)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The table of models and configurations, and the refusals with their messages."""
    if not HAVE_SGLANG:
        return
    from sglang_results import REFUSALS, SERVERS, TABLE, table_lines

    if TABLE:
        terminalreporter.section("prepared against source, through SGLang's own code")
        for line in table_lines():
            terminalreporter.write_line(line)
    if REFUSALS:
        terminalreporter.section("refusals")
        for what, message in REFUSALS:
            terminalreporter.write_line(f"{what}: {message}")
    if SERVERS:
        terminalreporter.section("server processes")
        for what, result in SERVERS:
            terminalreporter.write_line(f"{what}: {result}")
    if path := os.environ.get("NVFP4_PREP_SGLANG_RESULTS"):
        Path(path).write_text(json.dumps({"table": TABLE, "refusals": REFUSALS, "servers": SERVERS}, indent=1) + "\n")
