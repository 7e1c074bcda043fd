"""The smoke run over a prepared checkpoint on disk."""

from __future__ import annotations

import html.parser
import json
import os
import re
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nvfp4_prep import ConvertOptions, GateUpPolicy, SampleModel, convert, write_sample
from nvfp4_prep.checkpoint.safetensors_header import read_header
from nvfp4_prep.errors import CheckpointError, UsageError
from nvfp4_prep.moe.kernel_activation import moe_activation
from nvfp4_prep.report.page import Subject, make_page
from nvfp4_prep.smoke import SmokeReport, SmokeSettings, run_smoke
from nvfp4_prep.smoke import inputs as reading
from nvfp4_prep.smoke.figures import ErrorFigures
from nvfp4_prep.smoke.run import spread

pytestmark = pytest.mark.slow

SETTINGS = SmokeSettings(per_expert=4, routed=8, noise_experts=1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("smoke") / "source"
    write_sample(path, SampleModel(layers=3, experts=6, intermediate=80, hidden=272, differing=0.5))
    return path


@pytest.fixture(scope="module", params=list(GateUpPolicy)[:2])
def prepared(request: pytest.FixtureRequest, source: Path) -> Path:
    path = source.parent / f"prepared-{request.param}"
    convert(source, path, ConvertOptions(gate_up_scales=request.param))
    return path


@pytest.mark.parametrize("with_source", [True, False])
def test_a_right_checkpoint_passes(prepared: Path, source: Path, with_source: bool) -> None:
    seen = []
    report = run_smoke(
        prepared,
        source if with_source else None,
        settings=SETTINGS,
        on_layer=lambda layer, number, total: seen.append((layer.index, number, total)),
    )
    assert report.passed, [layer.problems for layer in report.layers]
    assert seen == [(1, 1, 2), (2, 2, 2)]
    assert report.reference == ("source" if with_source else "restored")
    assert report.layers_total == len(report.layers) == 2
    assert [figure.expert for figure in report.layers[0].figures] == list(range(6))
    assert not report.backend.real_kernel and "flashinfer" in report.backend.reason
    json.dumps(report.to_dict())
    assert report.summary()["result"] == "passed"


def change(path: Path, tensor: str, offset: int, data: bytes) -> None:
    record = next(record for record in read_header(path).tensors if record.name.endswith(tensor))
    with path.open("r+b") as stream:
        stream.seek(record.offset_bytes + offset)
        stream.write(data)


def test_one_changed_block_in_a_file_is_found(source: Path, tmp_path: Path) -> None:
    """Where only the restored reference is there, it changes with the file; the source does not."""
    path = tmp_path / "prepared"
    convert(source, path)
    change(path / "experts-layer-00002.safetensors", ".w2_weight", 960, bytes(8))  # row 15, its first block
    report = run_smoke(path, source, settings=SETTINGS)
    assert [layer.passed for layer in report.layers] == [True, False]
    assert any(
        problem.startswith("second GEMM: 1 of 6 experts wrong, expert 0") for problem in report.layers[1].problems
    )
    assert run_smoke(path, settings=SETTINGS).passed
    page = make_page(Subject("checkpoint", smoke=report))
    assert "Failed" in page and "expert 0" in page


def test_dirty_padding_and_wrong_scalars_in_a_file_are_found(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "prepared"
    convert(source, path)
    # the last byte of w13 is a padded row and column of the last expert
    record = next(
        record
        for record in read_header(path / "experts-layer-00001.safetensors").tensors
        if record.name.endswith("w13_weight")
    )
    change(path / "experts-layer-00001.safetensors", ".w13_weight", record.nbytes - 1, b"\x22")
    change(path / "expert-scales.safetensors", "layers.2.mlp.experts.routed_experts.w2_input_scale", 0, b"\0\0\x80\x3f")
    report = run_smoke(path, source, settings=SETTINGS)
    assert report.layers[0].dirty_padding == 1
    assert any("w2_input_scale of 1 experts" in problem for problem in report.layers[1].problems)


@pytest.mark.parametrize("value", [0.0, float("inf"), float("nan"), -1.0])
@pytest.mark.parametrize("tensor", ["w13_input_scale", "w2_input_scale", "w13_weight_scale_2"])
def test_unusable_scales_in_a_file_are_found(source: Path, tmp_path: Path, tensor: str, value: float) -> None:
    path = tmp_path / "prepared"
    convert(source, path)
    change(path / "expert-scales.safetensors", tensor, 0, struct.pack("<6f", *[value] * 6))
    report = run_smoke(path, source, layers=[1], settings=SETTINGS)
    assert any(f"{tensor} of 6 experts" in problem for problem in report.layers[0].problems)
    assert any(problem.startswith("outputs: ") for problem in report.layers[0].problems)


@pytest.mark.parametrize("file", ["experts-layer-00001", "expert-scales", "source-scales"])
def test_a_truncated_file_is_called_truncated(source: Path, tmp_path: Path, file: str) -> None:
    path = tmp_path / "prepared"
    convert(source, path)
    victim = path / f"{file}.safetensors"
    os.truncate(victim, victim.stat().st_size - 5)
    with pytest.raises(CheckpointError, match=f"{file}.safetensors: .*file size does not match its header"):
        run_smoke(path, source, layers=[1], settings=SETTINGS)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"num_experts_per_tok": 6, "moe_topk": 3}, 6),
        ({"num_experts_per_tok": 0, "moe_topk": 6}, 6),
        ({"text_config": {"num_experts_per_tok": 0}, "num_experts_per_tok": 6}, 6),
        ({"num_experts_per_tok": float("inf")}, 8),
        ({"num_experts_per_tok": 0.5}, 1),
        ({"num_experts_per_tok": 400}, 64),
        ({}, 8),
    ],
)
def test_experts_of_a_token(config: dict[str, Any], expected: int) -> None:
    assert reading._top_k(config, 64) == expected


def test_layers_and_sample_are_chosen(prepared: Path, source: Path) -> None:
    report = run_smoke(prepared, source, layers=[2], sample=3, settings=SETTINGS)
    assert [layer.index for layer in report.layers] == [2]
    assert [figure.expert for figure in report.layers[0].figures] == [0, 2, 5]
    assert "a sample of the experts only (3 of" in make_page(Subject("checkpoint", smoke=report))
    with pytest.raises(UsageError, match="no prepared layer 0, 7"):
        run_smoke(prepared, layers=[0, 7])
    with pytest.raises(UsageError, match="argument sample is wrong"):
        run_smoke(prepared, sample=0)
    with pytest.raises(UsageError, match="argument backend is wrong"):
        run_smoke(prepared, backend="cuda")


def test_spread_takes_both_ends() -> None:
    assert spread(384, 4) == [0, 128, 255, 383]
    assert spread(3, 8) == [0, 1, 2]
    assert spread(5, 1) == [0]
    assert spread(5, None) == [0, 1, 2, 3, 4]


def test_what_is_no_checkpoint_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        run_smoke(source)
    path = tmp_path / "prepared"
    convert(source, path)
    scales = path / "expert-scales.safetensors"
    scales.write_bytes(scales.read_bytes().replace(b"w2_input_scale", b"w2_1nput_scale"))
    with pytest.raises(CheckpointError, match="w2_input_scale"):
        run_smoke(path, source)


def test_a_run_over_nothing_does_not_pass(prepared: Path) -> None:
    report = run_smoke(prepared, layers=[1], settings=SETTINGS)
    assert not replace(report, layers=()).passed


class Balanced(html.parser.HTMLParser):
    """Checks that every tag is closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "meta":
            self.open.append(tag)
        self.wrong += [value for name, value in attrs if name in ("src", "href") and value]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


def page_of(report: SmokeReport) -> str:
    page = make_page(Subject("checkpoint", smoke=report))
    parser = Balanced()
    parser.feed(page)
    assert not parser.open and not parser.wrong, (parser.open, parser.wrong)
    assert not re.search(r"https?://|@import|url\(", page)
    return page


def test_page_says_what_ran_and_what_did_not(prepared: Path, source: Path) -> None:
    report = run_smoke(prepared, source, settings=SETTINGS)
    page = page_of(report)
    assert "Passed" in page and "did NOT run" in page and report.backend.device.split("(")[0] in page
    assert page.count("<circle") == 2
    restored = page_of(replace(report, reference="restored"))
    assert "The source was not at hand" in restored
    real = page_of(replace(report, backend=replace(report.backend, real_kernel=True, name="flashinfer")))
    assert "the one that serves" in real and "did NOT run" not in real


def test_page_escapes_names_and_draws_broken_numbers(prepared: Path) -> None:
    report = run_smoke(prepared, layers=[1], settings=SETTINGS)
    nan = float("nan")
    broken = ErrorFigures(nan, nan, nan, float("inf"), nan, 3, nan)
    layer = report.layers[0]
    figures = (replace(layer.figures[0], errors=broken), *layer.figures[1:])
    page = page_of(replace(report, checkpoint="<script>x</script>", layers=(replace(layer, figures=figures),)))
    assert "<script>" not in page and "Failed" in page
    assert "not written or not finite" in page


def test_activations_of_the_manifest() -> None:
    from nvfp4_prep.errors import UnsupportedCheckpointError
    from nvfp4_prep.moe.activation import Activation, ActivationKind

    assert moe_activation(Activation(ActivationKind.SILU), {}, where="x").limit == float("inf")
    assert moe_activation(Activation(ActivationKind.SILU, clamp=10.0), {}, where="x").limit == 10.0
    oai = moe_activation(Activation(ActivationKind.SWIGLUOAI), {}, where="x")
    assert (oai.alpha, oai.beta, oai.limit) == (1.702, 1.0, 7.0)
    assert not moe_activation(Activation(ActivationKind.RELU2), {}, where="x").gated
    config = {"text_config": {"activation_situ_beta": 25.0, "activation_situ_linear_beta": 8}}
    situ = moe_activation(Activation(ActivationKind.SITU), config, where="x")
    assert (situ.situ_beta, situ.situ_linear_beta) == (25.0, 8.0)
    assert {type(situ.situ_beta), type(situ.situ_linear_beta)} == {float}
    with pytest.raises(UnsupportedCheckpointError, match="with activation_situ_beta"):
        moe_activation(Activation(ActivationKind.SITU), {"activation_situ_beta": 0}, where="x")
    for kind in (ActivationKind.GELU, ActivationKind.SITU):
        with pytest.raises(UnsupportedCheckpointError, match="cannot be called with"):
            moe_activation(Activation(kind), {}, where="x")
