"""Conversion to the TRTLLM-gen layout: bytes by the closed formula, two global scales, what the outputs say."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from nvfp4_prep import ConvertOptions, GateUpPolicy, LayoutName, convert, inspect, load, restore, verify
from nvfp4_prep.cli import cli
from nvfp4_prep.errors import UnsupportedCheckpointError, UsageError
from nvfp4_prep.load.flashinfer import load_layer as load_for_flashinfer
from nvfp4_prep.smoke import run_smoke
from nvfp4_prep_kernels import UP_SCALE_VECTOR, MoeLayout
from nvfp4_prep_kernels.fingerprint import fingerprint
from support.tiny_checkpoints import TinyLayer, config, write

TRTLLM = LayoutName.TRTLLM
MAP = [0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27, 4, 12, 20, 28, 5, 13, 21, 29, 6, 14, 22, 30, 7, 15]
MAP += [23, 31]
PREFIX = "model.layers.0.mlp.experts.routed_experts"


def options(policy: GateUpPolicy = GateUpPolicy.RECONCILE) -> ConvertOptions:
    return ConvertOptions(layout=TRTLLM, gate_up_scales=policy)


def made(tmp_path: Path, policy: GateUpPolicy = GateUpPolicy.RECONCILE, **changes: Any) -> tuple[TinyLayer, Path, Path]:
    layer = TinyLayer(**changes)
    gated = len(layer.names) == 3
    source = write(tmp_path / "source", layer.tensors(), config(**({} if gated else {"mlp_hidden_act": "relu2"})))
    convert(source, tmp_path / "out", options(policy))
    return layer, source, tmp_path / "out"


def row_of_place(place: int) -> int:
    """z(n) of the specification."""
    return 32 * (place // 32) + MAP.index(place % 32)


def swizzled(scales: torch.Tensor, m: int, k: int) -> int:
    cols = scales.shape[1]
    offset = (m // 128) * (cols // 4) * 512 + (k // 4) * 512 + (m % 32) * 16 + (m % 128 // 32) * 4 + k % 4
    return int(scales.flatten()[offset])


@pytest.mark.parametrize("names", [("gate_proj", "up_proj", "down_proj"), ("up_proj", "down_proj")], ids=len)
def test_bytes_by_the_closed_formula(tmp_path: Path, names: tuple[str, ...]) -> None:
    """In plain Python, row by row; I 80 and H 144 are padded."""
    layer, _, out = made(tmp_path, names=names, intermediate=80, hidden=144, differing=True)
    found = load_file(out / "experts-layer-00000.safetensors")
    for expert in range(layer.experts):
        parts = {name: layer.leaves(expert, name) for name in names}
        for fused in (True, False):
            leaf = "w13" if fused else "w2"
            codes = found[f"{PREFIX}.{leaf}_weight"][expert]
            scales = found[f"{PREFIX}.{leaf}_weight_scale"][expert].view(torch.uint8)
            for place in range(len(codes)):
                row, name = row_of_place(place), names[-1]
                if fused:
                    name = "up_proj"
                    if len(names) == 3:
                        row, name = row // 2, "gate_proj" if row % 2 else "up_proj"
                matrix, blocks, _, _ = parts[name]
                want, want_scales = torch.zeros(len(codes[0])), torch.zeros(len(scales[0]))
                if row < len(matrix):
                    want[: matrix.shape[1]] = matrix[row]
                    want_scales[: blocks.shape[1]] = blocks.view(torch.uint8)[row]
                assert codes[place].tolist() == want.tolist()
                assert [swizzled(scales, place, k) for k in range(len(scales[0]))] == want_scales.tolist()


@pytest.mark.parametrize("policy", [GateUpPolicy.RECONCILE, GateUpPolicy.VLLM])
def test_both_global_scales_are_stored(tmp_path: Path, policy: GateUpPolicy) -> None:
    layer, source, out = made(tmp_path, policy, differing=True)
    found = load_file(out / "expert-scales.safetensors")
    gate, up = (
        [struct.unpack("f", struct.pack("f", layer.leaves(expert, name)[2]))[0] for expert in range(layer.experts)]
        for name in layer.names[:2]
    )
    assert gate != up
    assert found[f"{PREFIX}.w13_weight_scale_2"].tolist() == gate
    assert found[f"{PREFIX}.{UP_SCALE_VECTOR}"].tolist() == (up if policy is GateUpPolicy.RECONCILE else gate)
    assert not list(out.glob("source-block-scales*"))
    manifest = json.loads((out / "nvfp4_prep.json").read_text())
    (record,) = manifest["layers"]
    assert record["gate_up_scales"]["differing"] == layer.experts
    assert record["gate_up_scales"]["reconciled"] == []
    assert record["gate_up_scales"]["figures"]["relative_error"]["source"] == 0.0
    assert manifest["options"]["layout"] == "trtllm"
    report = verify(out, source=source)
    assert report.ok, report.problems
    card = (out / "README.md").read_text()
    assert ("both are stored" if policy is GateUpPolicy.RECONCILE else "gate's is used for both") in card
    restore(out, tmp_path / "back")
    back = load_file(tmp_path / "back" / "model-00001-of-00001.safetensors")
    tensors = layer.tensors()
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name].float(), tensors[name].float()) for name in tensors)


E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def weights(codes: torch.Tensor, scales: torch.Tensor, global_scale: float) -> torch.Tensor:
    """Dequantized ``float64 [rows, columns]`` of ``uint8 [rows, columns/2]`` and ``float8 [rows, columns/16]``."""
    values = torch.tensor([*E2M1, *(-value for value in E2M1)], dtype=torch.float64)
    nibbles = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)
    return values[nibbles.long()] * scales.double().repeat_interleave(16, dim=-1) * global_scale


@pytest.mark.parametrize("policy", [GateUpPolicy.RECONCILE, GateUpPolicy.VLLM])
@pytest.mark.slow
def test_error_of_the_dequantized_weights(tmp_path: Path, policy: GateUpPolicy) -> None:
    """Both factors stored: 0, exactly. Gate's for both, as stock vLLM has it: up is off by the scales' ratio."""
    layer, _, out = made(tmp_path, policy, differing=True, intermediate=128, hidden=256)
    found, vectors = load_file(out / "experts-layer-00000.safetensors"), load_file(out / "expert-scales.safetensors")
    for expert in range(layer.experts):
        codes = found[f"{PREFIX}.w13_weight"][expert]
        scales = found[f"{PREFIX}.w13_weight_scale"][expert].view(torch.uint8)
        plain = torch.tensor(
            [[swizzled(scales, m, k) for k in range(scales.shape[1])] for m in range(len(scales))], dtype=torch.uint8
        ).view(torch.float8_e4m3fn)
        factors = [vectors[f"{PREFIX}.w13_weight_scale_2"][expert], vectors[f"{PREFIX}.{UP_SCALE_VECTOR}"][expert]]
        for odd, name in ((1, "gate_proj"), (0, "up_proj")):
            places = [n for row in range(128) for n in range(256) if row_of_place(n) == 2 * row + odd]
            prepared = weights(codes[places], plain[places], float(factors[0 if odd else 1]))
            matrix, blocks, scale, _ = layer.leaves(expert, name)
            source = weights(matrix, blocks, float(torch.tensor(scale, dtype=torch.float32)))
            assert source.abs().max() > 0
            if odd or policy is GateUpPolicy.RECONCILE:
                assert torch.equal(prepared, source)
            else:
                gate, up = (
                    float(torch.tensor(layer.leaves(expert, x)[2], dtype=torch.float32)) for x in layer.names[:2]
                )
                error = (prepared - source).norm() / source.norm()
                assert error == pytest.approx(abs(gate / up - 1), rel=1e-6)
                assert error > 0.01


def test_the_policy_error_refuses_differing_scales_in_this_layout_too(tmp_path: Path) -> None:
    write(tmp_path / "source", TinyLayer(differing=True).tensors())
    with pytest.raises(UnsupportedCheckpointError, match="different global scales"):
        convert(tmp_path / "source", tmp_path / "out", options(GateUpPolicy.ERROR))


def test_stamp_and_inspection(tmp_path: Path) -> None:
    _, _, out = made(tmp_path)
    layout = json.loads((out / "config.json").read_text())["quantization_config"]["layout"]
    assert layout["name"] == "flashinfer_trtllm"
    assert layout["fingerprint"] == fingerprint(MoeLayout.trtllm(gated=True))
    assert layout["fingerprint"] != fingerprint(MoeLayout.cutedsl(gated=True))
    assert inspect(out).prepared_as["options"]["layout"] == "trtllm"


@pytest.mark.slow
@pytest.mark.parametrize("layout", LayoutName)
def test_outputs_say_which_kernel_runs(tmp_path: Path, layout: LayoutName) -> None:
    """Plan, conversion, card and smoke run; the default names the kernel of servers without flags."""
    source = write(tmp_path / "source", TinyLayer(differing=True).tensors())
    arguments = ["convert", str(source), str(tmp_path / "out"), "--layout", layout.value]
    runs = {
        "cutedsl": "FlashInfer's CuteDSL fused MoE",
        "cutedsl-batched": "FlashInfer's batched CuteDSL fused MoE",
        "trtllm": "FlashInfer's TRTLLM-gen fused MoE",
    }[layout.value]
    kernel = {"cutedsl": "CuteDSL", "cutedsl-batched": "batched CuteDSL", "trtllm": "TRTLLM-gen"}[layout.value]
    planned = CliRunner().invoke(cli, [*arguments, "--dry-run"]).output
    done = CliRunner().invoke(cli, arguments).output
    assert f"kernel   runs {runs} (vLLM's FLASHINFER_" in planned
    assert f"\nruns {runs} (vLLM's FLASHINFER_" in done
    if layout is LayoutName.CUTEDSL:
        assert "without flags runs the source on FLASHINFER_TRTLLM" in done
        assert "convert with --layout trtllm, or serve with --moe-backend flashinfer_trtllm" in done
    both = "both are stored, nothing was rescaled; relative error of the weights: 0"
    assert (both in done) == (layout is TRTLLM)
    assert f"the real {kernel} kernel did NOT run" in done or torch.cuda.is_available()
    assert f"prepared for {runs}" in (tmp_path / "out" / "README.md").read_text()
    told = CliRunner().invoke(cli, ["inspect", str(tmp_path / "out")]).output
    assert ("both are stored" in told) == (layout is TRTLLM)


def test_there_are_no_blocks_to_choose() -> None:
    with pytest.raises(UsageError, match="no gate/up blocks whose height"):
        ConvertOptions(layout=TRTLLM, gate_up_block=16)


@pytest.mark.parametrize("with_source", [True, False])
@pytest.mark.parametrize("policy", [GateUpPolicy.RECONCILE, GateUpPolicy.VLLM])
@pytest.mark.slow
def test_smoke_run(tmp_path: Path, policy: GateUpPolicy, with_source: bool) -> None:
    _, source, out = made(tmp_path, policy, differing=True, hidden=256)
    report = run_smoke(out, source if with_source else None, backend="torch")
    assert report.passed, report


def test_smoke_run_needs_the_right_factor_for_up(tmp_path: Path) -> None:
    """Up's factor replaced by gate's, as stock vLLM takes it: the outputs tell."""
    _, source, out = made(tmp_path, differing=True, hidden=256)
    path = out / "expert-scales.safetensors"
    data = path.read_bytes()
    found = load_file(path)
    gate, up = (found[f"{PREFIX}.{name}"].numpy().tobytes() for name in ("w13_weight_scale_2", UP_SCALE_VECTOR))
    assert data.count(up) == 1
    path.write_bytes(data.replace(up, gate))
    report = run_smoke(out, source, backend="torch")
    problems = [problem for layer in report.layers for problem in layer.problems]
    assert any(problem.startswith("first GEMM") for problem in problems), problems
    assert any(UP_SCALE_VECTOR in problem for problem in problems), problems


def test_loading(tmp_path: Path) -> None:
    """Tensors come as they are stored, with the fifth vector; FlashInfer's CuteDSL call is refused."""
    layer, _, out = made(tmp_path, differing=True, intermediate=128)
    loaded = load.load_layer(out, 0, tp=(1, 2))
    assert loaded.tensors[UP_SCALE_VECTOR].shape == (layer.experts,)
    assert loaded.tensors["w13_weight"].shape == (layer.experts, 128, 128)
    with pytest.raises(UsageError, match="TRTLLM-gen layout is not that of"):
        load_for_flashinfer(out, 0)
