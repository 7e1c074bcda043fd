"""Set before Triton is imported: without a card, Triton kernels run in its interpreter on CPU tensors."""

from __future__ import annotations

import inspect
import os
import signal
from pathlib import Path

import pytest
import torch

from nvfp4_prep import SampleModel, convert, join_parts, write_sample

# small tensors: more threads only wait for each other, ten times slower on a busy machine
torch.set_num_threads(1)

# A suite started in the background ignores SIGINT, and its children inherit that: the Ctrl-C tests would hang or fail.
signal.signal(signal.SIGINT, signal.default_int_handler)

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` skip without a card."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def _smoke_run_only_where_it_is_the_subject(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Convert without the default smoke run, which costs three times the conversion of a tiny checkpoint, but for tests
    marked ``default_smoke``. The command line asks for its smoke run itself and is not touched.
    """
    if request.node.get_closest_marker("default_smoke"):
        return
    for function in (convert, join_parts):
        monkeypatch.setitem(inspect.unwrap(function).__kwdefaults__, "smoke", None)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where Triton kernels run here: the card, or CPU tensors under the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def sample_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sample checkpoint of several shards, with padding and differing gate/up scales. Read-only by convention."""
    folder = tmp_path_factory.mktemp("sample") / "source"
    model = SampleModel(experts=5, intermediate=96, hidden=336, shard_nbytes=200_000, differing=0.5, seed=3)
    write_sample(folder, model)
    return folder


@pytest.fixture(scope="session")
def sample_prepared(sample_source: Path) -> Path:
    """The sample, converted with default options. Read-only by convention: copy before changing anything."""
    return convert(sample_source, sample_source.parent / "prepared").path
