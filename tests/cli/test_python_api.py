"""The public API as people use it from Python: strings as options, short reprs, what a result says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import nvfp4_prep
from nvfp4_prep import ConvertOptions, GateUpPolicy, LayoutName, SampleModel, SmokePolicy, convert, inspect, plan
from nvfp4_prep.errors import UsageError

pytestmark = pytest.mark.default_smoke


def test_strings_mean_what_they_mean_on_the_command_line() -> None:
    options = ConvertOptions(layout="cutedsl-batched", gate_up_scales="vllm")  # type: ignore[arg-type]
    assert options == ConvertOptions(LayoutName.CUTEDSL_BATCHED, gate_up_scales=GateUpPolicy.VLLM)
    assert options.layout is LayoutName.CUTEDSL_BATCHED and options.gate_up_scales is GateUpPolicy.VLLM
    assert ConvertOptions.from_dict(options.to_dict()) == options


@pytest.mark.parametrize(
    "given",
    [
        {"layout": "cutdsl"},
        {"layout": 1},
        {"gate_up_scales": "VLLM"},
        {"gate_up_scales": None},
        {"gate_up_block": "64"},
        {"gate_up_block": True},
        {"gate_up_block": 64.0},
        {"gate_up_block": 48},
        {"moe_tp": 0},
        {"moe_tp": 1025},
        {"moe_tp": "2"},
    ],
    ids=str,
)
def test_wrong_options_are_refused_at_once(given: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        ConvertOptions(**given)  # type: ignore[arg-type]


def test_a_typo_is_answered_with_the_choices() -> None:
    with pytest.raises(UsageError, match="'cutedsl' or 'cutedsl-batched'"):
        ConvertOptions(layout="cutdsl")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "given", [{"layers": "3"}, {"hidden": 256.0}, {"experts": True}, {"differing": 2}, {"seed": -1}], ids=str
)
def test_wrong_sample_is_refused(given: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        SampleModel(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [{"backend": "tpu"}, {"sample": 0}, {"sample": "4"}], ids=str)
def test_wrong_smoke_policy_is_refused(given: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        SmokePolicy(**given)  # type: ignore[arg-type]


@pytest.mark.slow
def test_results_are_short_in_a_notebook(sample_source: Path, tmp_path: Path) -> None:
    result = convert(sample_source, tmp_path / "out")
    assert result.smoke is not None and result.smoke.passed
    for value in (result, result.manifest, result.smoke, plan(sample_source), inspect(sample_source)):
        assert len(repr(value)) < 300 + len(str(tmp_path)), repr(value)


@pytest.mark.parametrize("name", nvfp4_prep.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(nvfp4_prep, name) is not None


def test_what_was_left_out_is_named(sample_source: Path, tmp_path: Path) -> None:
    import shutil

    source = tmp_path / "source"
    shutil.copytree(sample_source, source)
    (source / "old.bin").write_bytes(b"pickle")
    assert "old.bin" in convert(source, tmp_path / "out", smoke=None).left_out


@pytest.mark.parametrize(
    "wrong",
    [{"smoke": True}, {"smoke": False}, {"options": "cutedsl"}, {"options": {}}, {"threads": "2"}, {"threads": 0}],
    ids=repr,
)
def test_arguments_of_other_types_are_refused_before_anything_is_written(
    sample_source: Path, tmp_path: Path, wrong: dict[str, Any]
) -> None:
    with pytest.raises(UsageError, match=f"argument {next(iter(wrong))} is wrong"):
        nvfp4_prep.convert(sample_source, tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layers", [5, (), (True,), (-1,), "1"], ids=repr)
def test_smoke_layers_are_checked_when_they_are_given(layers: Any) -> None:
    with pytest.raises(UsageError, match="option layers is wrong"):
        nvfp4_prep.SmokePolicy(layers=layers)
