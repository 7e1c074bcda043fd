"""Set before Triton is imported: without a card, Triton kernels run in its interpreter on CPU tensors."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` skip without a card."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA card"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where Triton kernels run here: the card, or CPU tensors under the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
