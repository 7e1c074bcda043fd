"""``verify --smoke``, the run at the end of ``convert``, and ``--device``."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from nvfp4_prep import SampleModel, write_sample
from nvfp4_prep import convert as convert_function
from nvfp4_prep.checkpoint.safetensors_header import read_header
from nvfp4_prep.cli import cli
from nvfp4_prep.errors import UsageError
from nvfp4_prep.pipeline.device import apply_layout, choose_device
from nvfp4_prep_kernels import MoeDims, MoeLayout, PreparedTensor
from support.checkpoint_files import zero_one_block

pytestmark = pytest.mark.slow
convert_module = importlib.import_module("nvfp4_prep.commands.convert")
"""By its path: the package's attribute of that name may be the function."""


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def test_verify_smoke_says_what_ran_and_writes_the_page(
    sample_source: Path, sample_prepared: Path, tmp_path: Path
) -> None:
    page = tmp_path / "report.html"
    done = run("verify", sample_prepared, "--source", sample_source, "--smoke", "--sample", 2, "--report", page)
    assert done.exit_code == 0, done.output
    assert "smoke test passed: 2 of 2 layers, 4 of their 10 experts" in done.output
    assert "did NOT run" in done.output
    assert "Passed" in page.read_text()
    value = json.loads(run("verify", sample_prepared, "--smoke", "--layers", "1", "--sample", 1, "--json", "-q").stdout)
    assert value["smoke"]["passed"] is True and value["smoke"]["reference"] == "restored"
    assert len(value["smoke"]["layers"]) == 1


def test_smoke_options_need_smoke(sample_prepared: Path) -> None:
    assert run("verify", sample_prepared, "--layers", "1").exit_code == 2
    assert run("verify", sample_prepared, "--smoke", "--layers", "one").exit_code == 2
    assert run("verify", sample_prepared, "--smoke", "--layers", "9").exit_code == 2
    assert run("verify", sample_prepared, "--smoke", "--layers", "0-99999999999").exit_code == 2
    page = run("verify", sample_prepared, "--report", "nowhere/page.html")
    assert page.exit_code == 2 and "nowhere/page.html: --report: its directory does not exist" in page.stderr
    if not torch.cuda.is_available():
        refused = run("verify", sample_prepared, "--smoke", "--backend", "flashinfer")
        assert refused.exit_code == 2 and "no CUDA GPU" in refused.output


def test_a_damaged_checkpoint_fails_before_the_smoke_run(sample_source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert_function(sample_source, out)
    zero_one_block(out)
    page = tmp_path / "page.html"
    done = run("verify", out, "--smoke", "--source", sample_source, "--report", page)
    assert "Do not serve this checkpoint." in page.read_text() and "verification failed" in page.read_text()
    assert done.exit_code == 6 and "no smoke test, because verification failed" in done.stderr
    assert "smoke test" not in done.stdout
    quick = run("verify", out, "--quick", "--smoke", "--source", sample_source, "--layers", "1-1")
    assert quick.exit_code == 6 and "smoke test FAILED" in quick.output and "second GEMM" in quick.output


def test_convert_ends_with_a_smoke_run(sample_source: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = run("convert", sample_source, tmp_path / "out", "-q", "--report", page)
    assert done.exit_code == 0, done.output
    experts = 10 if torch.cuda.is_available() else 8  # a CPU takes a sample
    assert f"smoke test passed: 2 of 2 layers, {experts} of their 10 experts" in done.output
    assert page.is_file()
    page.unlink()
    again = run("convert", sample_source, tmp_path / "out", "-q", "--report", page)
    assert again.exit_code == 0 and f"--smoke --report {page} makes it" in again.stderr and not page.exists()
    without = json.loads(run("convert", sample_source, tmp_path / "o2", "-q", "--no-smoke", "--json").stdout)
    assert without["smoke"] is None
    value = json.loads(run("convert", sample_source, tmp_path / "o3", "-q", "--json").stdout)
    assert value["smoke"]["result"] == "passed" and value["smoke"]["real_kernel"] is False


def test_convert_fails_if_the_smoke_run_does(
    sample_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nvfp4_prep.pipeline.runner as execution

    real = execution.pass_smoke_run

    def broken(path: Path, *rest: object) -> object:
        zero_one_block(path)
        return real(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(execution, "pass_smoke_run", broken)
    done = run("convert", sample_source, tmp_path / "out", "-q")
    assert done.exit_code == 6 and "smoke test FAILED" in done.output and "do not serve" in done.output
    assert not (tmp_path / "out" / "config.json").exists()
    assert run("convert", sample_source, tmp_path / "out", "-q").exit_code == 6  # never "complete already"
    assert run("convert", sample_source, tmp_path / "o2", "-q", "--json").exit_code == 6


def test_expert_that_computes_zeros(tmp_path: Path) -> None:
    """An expert whose global scales are zero is what the quantizer made of it, not a failure."""
    write_sample(tmp_path / "source", SampleModel(layers=2, experts=3))
    path = next((tmp_path / "source").glob("model-*.safetensors"))
    data = bytearray(path.read_bytes())
    for record in read_header(path).tensors:
        if ".experts.1." in record.name and record.name.endswith("weight_scale_2"):
            data[record.offset_bytes : record.offset_bytes + 4] = bytes(4)
    path.write_bytes(data)
    done = run("convert", tmp_path / "source", tmp_path / "out", "-q")
    assert done.exit_code == 0 and "smoke test passed" in done.output


def test_device_that_is_not_there_is_refused_before_any_work(sample_source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such device"):
        choose_device("tpu")
    if not torch.cuda.is_available():
        done = run("convert", sample_source, tmp_path / "out", "--device", "cuda")
        assert done.exit_code == 2 and "no CUDA GPU" in done.output and not (tmp_path / "out").exists()


def test_a_gpu_is_told_to_be_slower_at_once(
    sample_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(convert_module, "choose_device", lambda name: torch.device("cpu"))
    for number, (options, told) in enumerate(((["cuda"], True), (["cuda", "-q"], False), (["cpu"], False))):
        done = run("convert", sample_source, tmp_path / f"out{number}", "--no-smoke", "--device", *options)
        assert done.exit_code == 0
        assert ("expect a slower conversion" in done.stderr) == told and "expect" not in done.stdout


@pytest.mark.parametrize("tensor", list(PreparedTensor))
def test_devices_give_the_same_bytes(tensor: PreparedTensor, device: torch.device) -> None:
    """On a machine without a card this compares the CPU with itself; the card runs it by hand."""
    layout, dims = MoeLayout.cutedsl(gated=True), MoeDims(7, 80, 272)
    parts = [
        torch.randint(0, 256, (3, *layout.source_shape(tensor, dims)), dtype=torch.uint8)
        for _ in layout.projections(tensor)
    ]
    made = apply_layout(layout, tensor, dims, parts, device)
    assert made.device.type == "cpu" and torch.equal(made, layout.apply(tensor, *parts))


@pytest.mark.gpu
def test_convert_on_the_card_gives_the_same_files(sample_source: Path, sample_prepared: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("convert", sample_source, out, "--device", "cuda", "-q").exit_code == 0
    for path in sorted(sample_prepared.iterdir()):
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name
