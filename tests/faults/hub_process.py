"""The loopback Hub of tests/hub in a process of its own, and its client here.

Started as ``python -m faults.hub_process``. It prints its address, then answers each line of stdin: ``empty`` forgets
all repositories, ``look`` says what they hold and whether any commit is servable and incomplete.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

HUB_FOLDERS = [str(Path(__file__).resolve().parents[1] / name) for name in ("support", "hub")]
"""Where the loopback Hub's modules lie."""


def _look(hub: Any) -> dict[str, Any]:
    from hub_support import assert_never_half

    half: list[str] = []
    trees = {}
    for repo_id, repository in hub.store.repositories.items():
        for branch, head in repository.heads.items():
            try:
                assert_never_half(repository, branch)
            except AssertionError as error:
                half.append(f"{repo_id} {branch}: {error}")
            if head is not None:
                tree = repository.resolve(branch).tree
                trees[f"{repo_id} {branch}"] = {name: blob.sha256 for name, blob in tree.items()}
    return {"half": half, "trees": trees}


def serve() -> None:
    """Run the Hub until stdin ends."""
    sys.path[:0] = HUB_FOLDERS
    from hub_server import loopback_hub
    from hub_store import Store

    with loopback_hub() as hub:
        print(hub.url, flush=True)
        for line in sys.stdin:
            if line.strip() == "empty":
                hub.store = Store()
            print(json.dumps(_look(hub)), flush=True)


class HubProcess:
    """A running Hub; use as a context manager."""

    def __init__(self) -> None:
        """Start the process."""
        command = [sys.executable, "-m", "faults.hub_process"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().strip()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()

    def ask(self, word: str) -> dict[str, Any]:
        """Send ``empty`` or ``look``, and return what the Hub holds then."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer


if __name__ == "__main__":
    serve()
