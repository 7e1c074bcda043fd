"""The fused-MoE implementations over the prepared layout against the reference from source tensors."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from nvfp4_prep_kernels import MoeDims, MoeLayout, PreparedTensor
from nvfp4_prep_kernels.moe_reference import SourceExpert, evaluate
from nvfp4_prep_kernels.moe_types import ActivationFunction, MoeActivation, MoeBackend, MoeTokens
from nvfp4_prep_kernels.nvfp4 import decode, encode_codes, quantize
from nvfp4_prep_kernels.tile_relayout import relayout_tiles
from nvfp4_prep_kernels.torch_moe import TorchMoe
from nvfp4_prep_kernels.triton_moe import TritonMoe, sort_pairs
from support.moe_cases import CASES, SITU, Layer, random_layer
from support.paths import SUPPORT

pytestmark = pytest.mark.slow


def random_tokens(layer: Layer, count: int, top_k: int, device: torch.device, seed: int = 1) -> MoeTokens:
    """Quantized tokens whose padded columns are NOT zero: only zero weights may meet them."""
    generator = torch.Generator().manual_seed(seed)
    hidden, padded = layer.prepared.dims.hidden, layer.prepared.padded_hidden
    values, scales = quantize(torch.randn(count, hidden, generator=generator), 1 / layer.input_scale)
    codes = torch.full((count, padded // 2), 0x22, dtype=torch.uint8)
    codes[:, : hidden // 2] = encode_codes(values)
    blocks = torch.full((count, padded // 16), 0x40, dtype=torch.uint8)
    blocks[:, : hidden // 16] = scales.to(torch.float8_e4m3fn).view(torch.uint8)
    ids = torch.rand(count, layer.prepared.dims.experts, generator=generator).topk(top_k).indices.to(torch.int32)
    weights = torch.rand(count, top_k, generator=generator)
    return MoeTokens(codes.to(device), blocks.to(device), ids.to(device), weights.to(device))


def reference(
    layer: Layer, tokens: MoeTokens, *, order: tuple[torch.Tensor, torch.Tensor] | None = None
) -> tuple[torch.Tensor, ...]:
    """``(out, tolerance)`` of routed tokens."""
    hidden = layer.prepared.dims.hidden
    x = decode(tokens.codes[:, : hidden // 2], tokens.block_scales[:, : hidden // 16].contiguous())
    out, tolerance = torch.zeros_like(x), torch.zeros_like(x)
    for number, expert in enumerate(layer.source):
        result = evaluate(expert, x, layer.activation, layer.input_scale, layer.fc2_input_scale, order=order)
        weight = (tokens.weights * (tokens.expert_ids == number)).sum(dim=1, keepdim=True)
        out += weight * result.out
        tolerance += weight * result.tolerance
    return out, tolerance


def backends() -> list[MoeBackend]:
    return [TorchMoe(), TritonMoe()]


@pytest.mark.parametrize("backend", backends(), ids=lambda backend: backend.name)
@pytest.mark.parametrize("case", CASES)
def test_prepared_layer_computes_what_the_source_computes(case: str, backend: MoeBackend, device: torch.device) -> None:
    layer = random_layer(*CASES[case], device)
    tokens = random_tokens(layer, 20, 2, device)
    expected, tolerance = reference(layer, tokens)
    out = torch.full((20, layer.prepared.padded_hidden), math.nan, device=device)
    trace = backend(layer.prepared, tokens, layer.activation, out)
    hidden, inter = layer.prepared.dims.hidden, layer.prepared.dims.intermediate
    assert expected.abs().mean() > 1e-4
    assert bool(((out[:, :hidden] - expected).abs() <= tolerance).all())
    assert bool((out[:, hidden:] == 0).all())
    assert trace is not None
    for values in (trace.hidden, trace.quantized):
        assert values.shape == (40, layer.prepared.padded_intermediate)
        assert bool(values.isfinite().all())
        if layer.prepared.layout.moe_tp == 1:
            assert bool((values[:, inter:] == 0).all())


@pytest.mark.parametrize("backend", backends(), ids=lambda backend: backend.name)
def test_gate_and_up_with_different_global_scales(backend: MoeBackend, device: torch.device) -> None:
    """Each half is multiplied by its own factor; with gate's for both, as stock vLLM does, the result is wrong."""
    layer = random_layer(*CASES["trtllm"], device, two_w13_scales=True)
    tokens = random_tokens(layer, 20, 2, device)
    expected, tolerance = reference(layer, tokens)
    out = torch.full((20, layer.prepared.padded_hidden), math.nan, device=device)
    backend(layer.prepared, tokens, layer.activation, out)
    assert bool(((out - expected).abs() <= tolerance).all())
    backend(replace(layer.prepared, w13_weight_scale_2_up=None), tokens, layer.activation, out)
    assert float((out - expected).norm() / expected.norm()) > 0.1


def test_two_global_scales_keep_the_weights_exactly(device: torch.device) -> None:
    """Relative error 0 of the dequantized weights: the source's block scales are stored as they are."""
    layer = random_layer(*CASES["trtllm"], device, two_w13_scales=True)
    experts = layer.prepared
    assert experts.w13_weight_scale_2_up is not None
    names = (PreparedTensor.W13_WEIGHT, PreparedTensor.W13_WEIGHT_SCALE)
    codes, scales = (experts.layout.invert(name, getattr(experts, name.value), experts.dims) for name in names)
    factors = (experts.w13_weight_scale_2, experts.w13_weight_scale_2_up)
    for number, expert in enumerate(layer.source):
        assert expert.gate is not None
        for half, wanted in enumerate((expert.gate, expert.up)):
            found = decode(codes[half][number], scales[half][number]).double() * float(factors[half][number])
            assert torch.equal(found, wanted.decode().double() * wanted.global_scale)
        one_factor = expert.up.decode().double() * float(factors[0][number])
        assert not torch.equal(one_factor, expert.up.decode().double() * expert.up.global_scale)


@pytest.mark.parametrize("backend", backends(), ids=lambda backend: backend.name)
@pytest.mark.parametrize("tensor", list(PreparedTensor))
def test_bytes_of_the_other_layout_are_not_read_as_these(
    tensor: PreparedTensor, backend: MoeBackend, device: torch.device
) -> None:
    """Each of the four tensors in CuteDSL's order makes the result wrong where TRTLLM-gen's is said."""
    layer = random_layer(*CASES["trtllm"], device)
    tokens = random_tokens(layer, 20, 2, device)
    expected, tolerance = reference(layer, tokens)
    right = getattr(layer.prepared, tensor.value)
    wrong = relayout_tiles(tensor, right, layer.prepared.layout, MoeLayout.cutedsl(gated=True))
    out = torch.full((20, layer.prepared.padded_hidden), math.nan, device=device)
    backend(replace(layer.prepared, **{tensor.value: wrong}), tokens, layer.activation, out)
    assert float(((out - expected).abs() > tolerance).float().mean()) > 0.5


@pytest.mark.parametrize("case", CASES)
def test_tolerance_covers_another_order_of_addition_and_little_more(case: str, device: torch.device) -> None:
    layer = random_layer(*CASES[case], device)
    tokens = random_tokens(layer, 20, 2, device)
    expected, tolerance = reference(layer, tokens)
    generator = torch.Generator().manual_seed(0)
    dims = layer.prepared.dims
    order = tuple(torch.randperm(size, generator=generator).to(device) for size in (dims.hidden, dims.intermediate))
    again, _ = reference(layer, tokens, order=(order[0], order[1]))
    assert bool(((again - expected).abs() <= tolerance).all())
    assert tolerance.norm() < 0.05 * expected.norm()
    assert tolerance.median() < 1e-4 * expected.abs().mean()


def test_scales_are_read_by_the_reference() -> None:
    """Halving one global scale halves what it should: the reference is no constant."""
    device = torch.device("cpu")
    layer = random_layer(*CASES["relu2"], device)
    x = torch.randint(-6, 7, (4, layer.prepared.dims.hidden)).float()
    expert = layer.source[0]
    out = evaluate(expert, x, layer.activation, 0.003, 0.002).out
    weaker = SourceExpert(None, expert.up, type(expert.down)(expert.down.codes, expert.down.block_scales, 0.0))
    assert evaluate(weaker, x, layer.activation, 0.003, 0.002).out.abs().max() == 0
    assert out.abs().max() > 0


def test_activation_formulas() -> None:
    gate, up = torch.tensor([0.5, -1.0, 9.0]), torch.tensor([2.0, -8.0, 0.25])
    for i, (g, u) in enumerate(zip(gate.tolist(), up.tolist(), strict=True)):
        assert MoeActivation()(gate, up)[i].item() == pytest.approx(u * g / (1 + math.exp(-g)), rel=1e-5)
        limited_g, limited_u = min(g, 7.0), max(-7.0, min(u, 7.0))
        oai = (limited_u + 1) * limited_g / (1 + math.exp(-1.702 * limited_g))
        assert MoeActivation.swigluoai()(gate, up)[i].item() == pytest.approx(oai, rel=1e-5)
        situ = 4 * math.tanh(g / 4) / (1 + math.exp(-g)) * 3 * math.tanh(u / 3)
        assert SITU(gate, up)[i].item() == pytest.approx(situ, rel=1e-5)
        assert MoeActivation.relu2()(None, up)[i].item() == pytest.approx(max(u, 0) ** 2)
    with pytest.raises(ValueError, match="situ_beta"):
        MoeActivation(ActivationFunction.SITU)
    with pytest.raises(ValueError, match="belong to SiTU"):
        MoeActivation(situ_linear_beta=3.0)
    for beta, linear in ((0.0, None), (math.nan, None), (4.0, 0.0), (4.0, -1.0), (math.inf, 1.0)):
        with pytest.raises(ValueError, match="must be positive"):
            MoeActivation(ActivationFunction.SITU, situ_beta=beta, situ_linear_beta=linear)


@pytest.mark.parametrize("backend", backends(), ids=lambda backend: backend.name)
def test_situ_of_small_values_is_within_its_tolerance(backend: MoeBackend, device: torch.device) -> None:
    """Kimi-K3's betas: the error of a tanh made from a sigmoid is that of its bound, however small the value is."""
    activation = MoeActivation(ActivationFunction.SITU, situ_beta=4.0, situ_linear_beta=25.0)
    layer = random_layer(MoeLayout.cutedsl(gated=True), MoeDims(3, 64, 512), activation, device)
    tokens = random_tokens(layer, 20, 2, device)
    weak = layer.prepared.w13_weight_scale_2 * 0.05
    out = torch.empty(20, 512, device=device)
    trace = backend(replace(layer.prepared, w13_weight_scale_2=weak), tokens, activation, out)
    assert trace is not None
    x = decode(tokens.codes, tokens.block_scales)
    for number, expert in enumerate(layer.source):
        assert expert.gate is not None
        scale = float(weak[number])
        weakened = replace(
            expert, gate=replace(expert.gate, global_scale=scale), up=replace(expert.up, global_scale=scale)
        )
        wanted = evaluate(weakened, x, activation, layer.input_scale, layer.fc2_input_scale)
        token, slot = (tokens.expert_ids == number).nonzero(as_tuple=True)
        error = (trace.hidden[2 * token + slot] - wanted.hidden[token]).abs()
        assert bool((error <= wanted.hidden_tolerance[token]).all())
        assert wanted.hidden_tolerance.norm() < 0.01 * wanted.hidden.norm()


def test_nan_in_weights_is_not_swallowed(device: torch.device) -> None:
    """0x7F is NaN in e4m3; a kernel that rounds it to a number would hide broken scales."""
    layer = random_layer(*CASES["kimi-like"], device)
    tokens = random_tokens(layer, 8, 1, device)
    layer.prepared.w13_weight_scale.fill_(0x7F)
    for backend in backends():
        out = torch.zeros(8, 256, device=device)
        backend(layer.prepared, tokens, layer.activation, out)
        assert bool(out.isnan().all()), backend.name


def test_sort_pairs_puts_each_pair_in_a_tile_of_its_expert() -> None:
    ids = torch.tensor([[2, 0], [2, 5], [2, 0], [2, 1]], dtype=torch.int32)
    pairs, owners = sort_pairs(ids, 7, 2)
    assert len(pairs) == 2 * len(owners)
    seen = []
    for tile, owner in enumerate(owners.tolist()):
        for pair in pairs[2 * tile : 2 * tile + 2].tolist():
            if pair >= 0:
                assert ids.flatten()[pair] == owner
                seen.append(pair)
    assert sorted(seen) == list(range(8))
    assert owners.tolist() == [0, 1, 2, 2, 5]


def test_kernels_compile_for_real_cards() -> None:
    program = SUPPORT / "compile_moe.py"
    run = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == 3 * 5
    units = {"80": "mma.sync", "90": "wgmma", "100": "tcgen05.mma"}
    for line in lines:
        assert units[line.split()[0]] in line, line
