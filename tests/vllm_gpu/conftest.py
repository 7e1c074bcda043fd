"""Fixtures of the tests that run the real vLLM on a GPU; without vLLM nothing here is collected."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import pytest

from nvfp4_prep.commands.convert import convert
from nvfp4_prep.options import ConvertOptions, LayoutName

_spec = importlib.util.find_spec("vllm")
HAVE_VLLM = _spec is not None and bool(_spec.origin)
collect_ignore_glob = [] if HAVE_VLLM else ["test_*.py"]

if HAVE_VLLM:
    from support.engine.whole_models import NEMOTRON_H, QWEN3_MOE, WholeModel

    CASES = [(model, layout) for model in (QWEN3_MOE, NEMOTRON_H) for layout in (LayoutName.CUTEDSL, LayoutName.TRTLLM)]

    @dataclass(frozen=True)
    class Case:
        """A model, its source, and its prepared form in one layout."""

        model: WholeModel
        layout: LayoutName
        source: Path
        prepared: Path


@pytest.fixture(scope="session", autouse=True)
def vllm_on_gpu() -> None:
    """vLLM in this process."""
    from support.serving.vllm_on_gpu import bring_up

    bring_up()


@pytest.fixture(scope="session", params=CASES if HAVE_VLLM else [], ids=lambda case: f"{case[0].name}-{case[1].value}")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    model, layout = request.param
    root = tmp_path_factory.mktemp(model.name)
    source = model.write(root / "source")
    convert(source, root / "prepared", ConvertOptions(layout=layout), smoke=None)
    return Case(model, layout, source, root / "prepared")


@pytest.fixture(autouse=True)
def trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """The opt-in: FlashInfer's kernels run on compute capability 10.x only."""
    from nvfp4_prep.vllm.reference_moe import REFERENCE_VARIABLE

    monkeypatch.setenv(REFERENCE_VARIABLE, "1")
