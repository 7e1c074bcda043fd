"""The smoke run at the end of a conversion: due on disk until it passed, the same from Python and the command line."""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from nvfp4_prep import (
    SampleModel,
    SmokeFailedError,
    SmokePolicy,
    convert,
    convert_part,
    inspect,
    join_parts,
    restore,
    run_smoke,
    verify,
    write_sample,
)
from nvfp4_prep.checkpoint.safetensors_header import read_header
from nvfp4_prep.cli import cli
from nvfp4_prep.errors import (
    CheckpointError,
    ConversionInterrupted,
    ResumeConflictError,
    SourceError,
    UnsupportedCheckpointError,
    UsageError,
)
from nvfp4_prep.output.journal_line import read_line
from nvfp4_prep.prepared.manifest import LayerRecord
from nvfp4_prep.smoke import gate as smoke_gate
from support.cases import slow_after
from support.checkpoint_files import zero_one_block

pytestmark = pytest.mark.default_smoke


def run(*arguments: object) -> int:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments]).exit_code


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_sample(tmp_path / "source", SampleModel(layers=2, experts=3))
    return tmp_path / "source"


def leave_before_the_smoke_run(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch, spoil: bool) -> None:
    """Convert all but what the smoke run decides; with ``spoil`` with a damaged layer 1."""
    with monkeypatch.context() as patch:
        stop_in_smoke_run(patch, spoil)
        with pytest.raises(ConversionInterrupted):
            convert(source, out)


def stop_in_smoke_run(monkeypatch: pytest.MonkeyPatch, spoil: bool) -> None:
    def stopped(path: Path, *rest: object) -> None:
        if spoil:
            zero_one_block(path)
        raise ConversionInterrupted("stopped", where=str(path))

    monkeypatch.setattr("nvfp4_prep.pipeline.runner.pass_smoke_run", stopped)


@pytest.mark.parametrize("spoil", slow_after(1, [False, True]), ids=["whole", "damaged"])
def test_a_run_stopped_before_the_smoke_run_runs_it_next_time(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: bool
) -> None:
    out = tmp_path / "out"
    leave_before_the_smoke_run(source, out, monkeypatch, spoil)
    assert not (out / "config.json").exists()
    if not spoil:
        result = convert(source, out)
        assert result.smoke is not None and result.smoke.passed and result.resumed and not result.already_complete
        assert convert(source, out).already_complete
        return
    with pytest.raises(SmokeFailedError):
        convert(source, out)
    assert run("convert", source, out, "-q") == 6
    assert run("convert", source, out, "-q") == 6  # the same verdict again
    with pytest.raises(ResumeConflictError, match=r"smoke test of these files failed.*--restart"):
        convert(source, out, smoke=None)
    assert run("convert", source, out, "-q", "--no-smoke") == 7
    assert not (out / "config.json").exists()
    assert run("convert", source, out, "-q", "--restart") == 0
    assert (out / "config.json").exists() and not (out / ".nvfp4_prep").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "narrower", [SmokePolicy(layers=(2,), sample=1), SmokePolicy(layers=(2,)), SmokePolicy(sample=1)]
)
def test_a_wrong_verdict_stays_whatever_a_later_run_looks_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, narrower: SmokePolicy
) -> None:
    """The layer that failed is run again with the experts that failed, also where the new scope leaves them out."""
    write_sample(tmp_path / "source", SampleModel(layers=3, experts=6))
    out = tmp_path / "out"
    leave_before_the_smoke_run(tmp_path / "source", out, monkeypatch, spoil=True)
    with pytest.raises(SmokeFailedError):
        convert(tmp_path / "source", out, smoke=SmokePolicy(layers=(1,), sample=6))
    with pytest.raises(SmokeFailedError) as failed:
        convert(tmp_path / "source", out, smoke=narrower)
    assert 1 in {layer.index for layer in failed.value.report.layers if layer.experts == 6}
    assert not (out / "config.json").exists()


_ALL_MADE = re.compile(rb'.*"made": .*\n')
VERDICT_DAMAGES: dict[str, Callable[[bytes, bytes], bytes]] = {
    "gone": lambda before, verdict: before,
    "zeros": lambda before, verdict: before + bytes(60) + b"\n",
    "another key": lambda before, verdict: before + verdict.replace(b'"verdict"', b'"verdicu"'),
    "another word": lambda before, verdict: before + verdict.replace(b'"wrong"', b'"wrono"'),
    "cut off": lambda before, verdict: before + verdict[:20],
    "without its newline": lambda before, verdict: before + verdict[:-1],
    "one with the line before": lambda before, verdict: before[:-1] + b" " + verdict,
    "gone with the manifest's": lambda before, verdict: _ALL_MADE.sub(b"", before),
}


@pytest.mark.parametrize("how", slow_after(1, VERDICT_DAMAGES))
def test_a_verdict_that_cannot_be_read_is_due(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Whatever it was on: a smoke test has to clear every layer and every expert then."""
    out = tmp_path / "out"
    leave_before_the_smoke_run(source, out, monkeypatch, spoil=True)
    with pytest.raises(SmokeFailedError):
        convert(source, out)
    journal = out / ".nvfp4_prep" / "journal.jsonl"
    *before, verdict = journal.read_bytes().splitlines(keepends=True)
    assert read_line(verdict).value is not None and b'"verdict"' in verdict and b"nvfp4_prep.json" in before[-1]
    journal.write_bytes(VERDICT_DAMAGES[how](b"".join(before), verdict))
    if how != "gone":  # earlier releases did not count verdicts
        (journal.parent / "verdicts").unlink()
    for _ in range(2):  # the first run mends the journal's end
        assert run("convert", source, out, "-q", "--no-smoke", "--dry-run") == 7
        with pytest.raises(ResumeConflictError, match="the smoke test of these files failed"):
            convert(source, out, smoke=None)
        with pytest.raises(ConversionInterrupted), monkeypatch.context() as patch:
            stop_in_smoke_run(patch, spoil=False)
            convert(source, out)
    with pytest.raises(SmokeFailedError) as failed:
        convert(source, out, smoke=SmokePolicy(sample=1))
    assert {layer.index: layer.experts for layer in failed.value.report.layers}[1] == 3
    with pytest.raises(ConversionInterrupted), monkeypatch.context() as patch:
        stop_in_smoke_run(patch, spoil=False)
        convert(source, out, restart=True)
    assert convert(source, out, smoke=None).resumed  # --restart takes back what was said of files that it discards


def test_a_verdict_of_an_older_journal_means_everything(source: Path, tmp_path: Path) -> None:
    scope = smoke_gate.FailedScope.parse({"verdict": "wrong"})
    assert scope == smoke_gate.FailedScope(None, None)
    assert smoke_gate.FailedScope.parse({"layers": ["1"], "samples": [True]}) == scope
    some = smoke_gate.FailedScope((1, 4), (3, 5))
    assert smoke_gate.FailedScope.parse({**some.to_json(), "verdict": "wrong"}) == some


@pytest.mark.parametrize("what", ["padding", "header", "scalars"])
def test_damage_is_damage_without_the_source_too(tmp_path: Path, what: str) -> None:
    """The reference comes from the prepared bytes then: nothing is said of a source."""
    write_sample(tmp_path / "source", SampleModel(layers=2, experts=2, hidden=192, intermediate=96))
    out = tmp_path / "out"
    convert(tmp_path / "source", out, smoke=None)
    path = out / ("source-scales.safetensors" if what == "scalars" else "experts-layer-00001.safetensors")
    header = read_header(path)
    with path.open("r+b") as stream:
        if what == "header":
            stream.seek(9)
            stream.write(b"!!!!")
        elif what == "scalars":
            stream.seek(header.data_start)
            stream.write(b"\0\0\xc0\x7f" * ((header.file_nbytes - header.data_start) // 4))
        else:
            scales = next(record for record in header.tensors if record.name.endswith(".w2_weight_scale"))
            stream.seek(scales.offset_bytes)
            stream.write(b"\x38" * scales.nbytes)
    with pytest.raises(CheckpointError, match=r"is damaged.*nvfp4-prep verify") as failed:
        run_smoke(out)
    assert failed.value.exit_code == 6
    assert run("verify", out, "--smoke", "-q") == 6


@pytest.mark.slow
@pytest.mark.parametrize("ending", slow_after(1, [KeyboardInterrupt, MemoryError, RuntimeError]))
def test_a_verdict_stands_from_the_moment_a_layer_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: type[BaseException]
) -> None:
    """What ends the run before its last layer must not save the files."""
    write_sample(tmp_path / "source", SampleModel(layers=3, experts=2))
    out = tmp_path / "out"
    leave_before_the_smoke_run(tmp_path / "source", out, monkeypatch, spoil=True)

    def end(layer: object, number: int, total: int) -> None:
        if number == 2:
            raise ending

    with pytest.raises((ending, ConversionInterrupted)):
        convert(tmp_path / "source", out, smoke=SmokePolicy(on_layer=end))
    with pytest.raises(ResumeConflictError, match="smoke test"):
        convert(tmp_path / "source", out, smoke=None)
    with pytest.raises(SmokeFailedError):
        convert(tmp_path / "source", out, smoke=SmokePolicy(layers=(2,), sample=1))


def test_a_read_error_is_no_verdict(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that answers badly once says nothing of the bytes."""
    out = tmp_path / "out"

    def stale(self: object, layer: object) -> None:
        raise SourceError("cannot be read (Stale file handle)") from OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr("nvfp4_prep.prepared.checkpoint.PreparedCheckpoint.scalars", stale)
        with pytest.raises(SourceError, match="Stale"):
            convert(source, out)
    assert '"verdict"' not in (out / ".nvfp4_prep" / "journal.jsonl").read_text()
    assert convert(source, out, smoke=None).resumed


def test_damage_is_a_verdict_on_its_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a conversion from the Hub finds it, whose source is not at hand any more."""
    write_sample(tmp_path / "source", SampleModel(layers=3, experts=2, hidden=192, intermediate=96))
    out = tmp_path / "out"

    def damaged(self: object, layer: LayerRecord) -> None:
        raise UnsupportedCheckpointError("scales are not finite")

    with monkeypatch.context() as patch:
        patch.setattr("nvfp4_prep.prepared.checkpoint.PreparedCheckpoint.scalars", damaged)
        with pytest.raises(CheckpointError, match="is damaged: scales are not finite"):
            convert(tmp_path / "source", out)
    line = read_line((out / ".nvfp4_prep" / "journal.jsonl").read_bytes().splitlines()[-1]).value
    assert line == {"verdict": "wrong", "layers": [1], "samples": None}


def test_a_format_of_a_package_that_is_not_here_is_no_zero_one_block(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(source, out, smoke=None)
    manifest = json.loads((out / "nvfp4_prep.json").read_text())
    for layer in manifest["layers"]:
        layer["format"] = "acme-fp4"
    (out / "nvfp4_prep.json").write_text(json.dumps(manifest))
    with pytest.raises(UnsupportedCheckpointError, match=r"acme-fp4.*Install the package"):
        run_smoke(out)


def test_no_smoke_finishes_what_waits_for_it(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    leave_before_the_smoke_run(source, out, monkeypatch, spoil=False)
    result = convert(source, out, smoke=None)
    assert result.smoke is None and (out / "config.json").exists()


def test_ctrl_c_in_the_smoke_run_leaves_it_due(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*rest: object, **more: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("nvfp4_prep.smoke.gate.run_smoke", interrupted)
        with pytest.raises(ConversionInterrupted, match="smoke test"):
            convert(source, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()
    assert convert(source, tmp_path / "out").smoke is not None


@pytest.mark.parametrize(
    ("leaf", "data"),
    slow_after(
        1,
        [
            (".weight", b"\x00"),
            (".weight_scale", b"\x00"),
            (".weight_scale", b"\x7f"),
            (".weight_scale_2", bytes.fromhex("b8db561a")),  # 4.4e-23: silu(gate) * up underflows
            (".weight_scale_2", bytes.fromhex("50e36c00")),  # 1e-38
            (".weight_scale_2", bytes.fromhex("caf24971")),  # 1e30
        ],
    ),
    ids=["codes-0", "blocks-0", "blocks-nan", "underflow", "1e-38", "1e30"],
)
def test_an_expert_that_is_degenerate_in_the_source_is_no_failure(tmp_path: Path, leaf: str, data: bytes) -> None:
    source = tmp_path / "source"
    write_sample(source, SampleModel(layers=2, experts=3))
    path = next(source.glob("model-*.safetensors"))
    whole = bytearray(path.read_bytes())
    for record in read_header(path).tensors:
        if ".experts.1." in record.name and record.name.endswith(leaf):
            end = record.offset_bytes + record.nbytes
            whole[record.offset_bytes : end] = data * (record.nbytes // len(data))
    path.write_bytes(whole)
    result = convert(source, tmp_path / "out", smoke=SmokePolicy(backend="torch"))
    assert result.smoke is not None and result.smoke.result == "passed"
    assert list(result.smoke.layers[0].inconclusive) == [1]
    assert run("convert", source, tmp_path / "out", "-q") == 0


def scale_all(source: Path, leaf: str, factor: float) -> None:
    """Multiply the scalars of all experts whose names end so."""
    for shard in source.glob("*.safetensors"):
        tensors = load_file(shard)
        scaled = {
            name: value * factor for name, value in tensors.items() if ".experts." in name and name.endswith(leaf)
        }
        save_file(tensors | scaled, shard, metadata={"format": "pt"})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("leaf", "factor", "result", "why"),
    slow_after(
        1,
        [
            ("_proj.weight_scale_2", 1e6, "inconclusive", "values are out of range"),
            ("_proj.weight_scale_2", 1e15, "inconclusive", "values are out of range"),
            ("_proj.input_scale", 1e10, "inconclusive", "values are out of range"),
            ("down_proj.input_scale", 1e10, "inconclusive", "reference is zero"),
            ("down_proj.weight_scale_2", 1e30, "passed", None),
            ("down_proj.input_scale", 1e-10, "passed", None),
        ],
    ),
)
def test_right_bytes_of_values_out_of_range_are_not_called_wrong(
    source: Path, tmp_path: Path, leaf: str, factor: float, result: str, why: str | None
) -> None:
    """Of all experts, so that none can be judged; a single dead expert is the test above."""
    scale_all(source, leaf, factor)
    out, page = tmp_path / "out", tmp_path / "page.html"
    ran = CliRunner().invoke(cli, ["convert", str(source), str(out), "-q", "--report", str(page)])
    assert ran.exit_code == 0 and (out / "config.json").exists(), ran.output
    assert f"smoke test {result}:" in ran.output and "do not serve" not in ran.output
    assert (
        ("no expert could be judged" in ran.output)
        == (result == "inconclusive")
        == ("Inconclusive" in page.read_text())
    )
    again = CliRunner().invoke(cli, ["verify", str(out), "--smoke", "--source", str(source)])
    assert again.exit_code == 0 and (why is None or f"expert 0: {why}" in again.output), again.output
    assert convert(source, out).already_complete


def test_wrong_scalars_fail_where_outputs_prove_nothing(source: Path, tmp_path: Path) -> None:
    scale_all(source, "_proj.weight_scale_2", 1e6)
    out = convert(source, tmp_path / "out").path
    scales = load_file(out / "expert-scales.safetensors")
    save_file({name: value * 1.5 for name, value in scales.items()}, out / "expert-scales.safetensors")
    report = run_smoke(out, source)
    assert report.result == "failed" and any("scalars" in text for text in report.layers[0].problems)


def test_default_is_one() -> None:
    assert SmokePolicy() == smoke_gate.DEFAULT_SMOKE


@pytest.mark.parametrize("hidden", [128, 320])
def test_nan_of_the_source_is_not_dirty_padding(tmp_path: Path, hidden: int) -> None:
    """NaN times the zeros of the padding is NaN: the source's value, not a wrong byte."""
    write_sample(tmp_path / "source", SampleModel(layers=2, experts=4, intermediate=64, hidden=hidden))
    for shard in (tmp_path / "source").glob("*.safetensors"):
        tensors = load_file(shard)
        for name in tensors:
            if name.endswith("experts.1.gate_proj.weight_scale"):
                tensors[name].view(torch.uint8)[0, 0] = 0x7F
        save_file(tensors, shard, metadata={"format": "pt"})
    result = convert(tmp_path / "source", tmp_path / "out")
    assert result.smoke is not None and result.smoke.passed


@pytest.mark.parametrize("look", [verify, inspect, lambda path: restore(path, path.parent / "restored")])
def test_a_conversion_whose_smoke_run_is_due_is_called_unfinished(
    sample_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, look: Callable[[Path], object]
) -> None:
    """Not damaged: advice to remove it would cost the whole conversion."""

    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nvfp4_prep.smoke.gate.run_smoke", interrupted)
    with pytest.raises(ConversionInterrupted):
        convert(sample_source, tmp_path / "out")
    assert (tmp_path / "out" / "nvfp4_prep.json").is_file()
    with pytest.raises(CheckpointError, match=r"unfinished run.*Repeat the command"):
        look(tmp_path / "out")


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (SmokePolicy(layers=(99,)), "no prepared layer 99; expected layers among 1 to 1"),
        (SmokePolicy(layers=(0, 1)), "no prepared layer 0"),
        (SmokePolicy(backend="flashinfer"), "the flashinfer backend cannot run here"),
    ],
    ids=str,
)
def test_a_smoke_run_that_cannot_be_made_fails_before_the_first_byte(
    source: Path, tmp_path: Path, policy: SmokePolicy, words: str
) -> None:
    if policy.backend == "flashinfer" and torch.cuda.is_available():
        pytest.skip("the backend may run here")
    with pytest.raises(UsageError, match=words):
        convert(source, tmp_path / "out", smoke=policy)
    assert not (tmp_path / "out").exists()
    part = convert_part(source, tmp_path / "out", "1/1")
    before = sorted((tmp_path / "out").rglob("*"))
    with pytest.raises(UsageError, match=words):
        join_parts(source, tmp_path / "out", smoke=policy)
    assert sorted((tmp_path / "out").rglob("*")) == before and part.path in before


@pytest.mark.slow
def test_the_advice_of_a_failed_join_can_be_followed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    convert_part(source, out, "1/1")
    with monkeypatch.context() as patch:
        stop_in_smoke_run(patch, spoil=True)
        with pytest.raises(ConversionInterrupted):
            join_parts(source, out)
    with pytest.raises(SmokeFailedError) as failed:
        join_parts(source, out)
    done = CliRunner().invoke(cli, ["convert", str(source), str(out), "--join", "-q"])
    assert done.exit_code == 6
    for advice in (str(failed.value), done.stderr):
        assert "--restart" not in advice and "remove the directory and make its parts again" in advice
    shutil.rmtree(out)
    convert_part(source, out, "1/1")
    result = join_parts(source, out)
    assert result.smoke is not None and result.smoke.passed
