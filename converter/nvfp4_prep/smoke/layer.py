"""The smoke run of one layer: prepared bytes through a backend, source tensors through the reference, compared."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from nvfp4_prep._util.arguments import COUNT, check_fields, integer
from nvfp4_prep.smoke.compare import compare, in_tolerances
from nvfp4_prep.smoke.figures import CaseFigures, ErrorFigures, ExpertFigures, NoiseFloor, StageFigures
from nvfp4_prep.smoke.report import LayerReport
from nvfp4_prep.smoke.tokens import Routing, pack_tokens, random_tokens, routed_tokens, routings
from nvfp4_prep.smoke.under_test import LayerUnderTest, dirty_padding, wrong_scalars
from nvfp4_prep_kernels.moe_reference import Evaluation, SourceExpert, evaluate, evaluate_down
from nvfp4_prep_kernels.moe_types import MoeBackend, MoeTrace, PreparedExperts
from nvfp4_prep_kernels.nvfp4 import E2M1_MAX, E4M3_MAX

__all__ = ["SmokeSettings", "run_layer"]

_BF16_HALF_STEP = 2.0**-9


@dataclass(frozen=True)
class SmokeSettings:
    """Size of a smoke run: tokens, experts and seed.

    Attributes:
        per_expert: tokens that go to each expert alone.
        routed: tokens of each of the other routings.
        noise_experts: experts on which the noise floor is measured.
        seed: of the random tokens; the same seed on the same device gives the same figures.
    """

    per_expert: int = 16
    routed: int = 64
    noise_experts: int = 4
    seed: int = 20260101

    def __post_init__(self) -> None:
        check_fields(self, per_expert=COUNT, routed=COUNT, noise_experts=integer(0), seed=integer(0, 2**63 - 1))


def run_layer(layer: LayerUnderTest, backend: MoeBackend, settings: SmokeSettings | None = None) -> LayerReport:
    """Run and judge one layer.

    Peak memory beside the layer: the backend's, and one expert decoded to float32 (about nine times its bytes).
    """
    settings = settings or SmokeSettings()
    device = layer.prepared.w13_weight.device
    generator = torch.Generator(device=device).manual_seed(settings.seed + layer.index)
    cases = routings(len(layer.experts), layer.top_k, settings.per_expert, settings.routed, generator)
    count = sum(case.tokens for case in cases)
    values = random_tokens(count, layer.prepared.dims.hidden, generator)
    amplitude, reach = _choose_amplitude(layer, values[: 2 * settings.per_expert])
    values = values * amplitude
    outputs, trace, stray = _run_backend(layer, backend, values, cases)
    _, _, x = pack_tokens(values, layer.input_scale, layer.prepared.padded_hidden)
    wanted = _Expected(layer, cases, x)
    figures, noise = [], []
    for position in range(len(layer.experts)):
        expert = layer.source(position)
        result = wanted.add(position, expert)
        if position < settings.noise_experts:
            noise.append(wanted.noise(position, expert, generator))
        rows = slice(position * settings.per_expert, (position + 1) * settings.per_expert)
        errors = wanted.judge(cases[0], outputs[0], backend.out_dtype, rows)
        stages = None if trace is None else _stages(layer, expert, result, trace, cases[0], outputs[0], rows)
        projections = (expert.gate, expert.up, expert.down)
        zero = any(matrix is not None and matrix.global_scale == 0.0 for matrix in projections)
        figures.append(
            ExpertFigures(layer.experts[position], settings.per_expert, errors, result.doubtful, stages, zero)
        )
    return LayerReport(
        name=layer.name,
        index=layer.index,
        experts=len(layer.experts),
        experts_total=layer.experts_total,
        amplitude=amplitude,
        intermediate_range=reach,
        cases=tuple(
            _case_figures(case, len(layer.experts), wanted.judge(case, out, backend.out_dtype))
            for case, out in zip(cases, outputs, strict=True)
        ),
        figures=tuple(figures),
        noise=NoiseFloor(len(noise), max(item[0] for item in noise), max(item[1] for item in noise)),
        padded_outputs_not_zero=stray,
        dirty_padding=dirty_padding(layer.prepared),
        wrong_scalars=tuple(wrong_scalars(layer)),
    )


def _choose_amplitude(layer: LayerUnderTest, values: torch.Tensor) -> tuple[float, float]:
    """Return a size of the tokens at which the intermediate uses its range well: neither near zero nor saturated.

    Returns:
        ``(amplitude, largest intermediate over the largest that its scale can hold)``, both for values up to 1.
    """
    amplitude, reach = 1.0, 0.0
    experts = [layer.source(position) for position in range(min(2, len(layer.experts)))]
    for _ in range(8):
        _, _, x = pack_tokens(values * amplitude, layer.input_scale, layer.prepared.padded_hidden)
        largest = 0.0
        for expert in experts:
            gate = None
            if expert.gate is not None:
                gate = x @ expert.gate.decode().T * (expert.gate.global_scale * layer.input_scale)
            up = x @ expert.up.decode().T * (expert.up.global_scale * layer.input_scale)
            size = float(layer.activation(gate, up).abs().max())
            if math.isfinite(size):  # one expert with NaN or infinite scales must not make the others' tokens tiny
                largest = max(largest, size)
        reach = largest / (layer.fc2_input_scale * E2M1_MAX * E4M3_MAX)
        if 0.2 <= reach <= 0.95 or (reach < 0.2 and amplitude == 1.0):
            break
        step = math.sqrt(0.6 / reach) if reach > 0 else 2.0
        amplitude = min(1.0, max(2.0**-8, amplitude * step))
    return amplitude, reach


def _run_backend(
    layer: LayerUnderTest, backend: MoeBackend, values: torch.Tensor, cases: tuple[Routing, ...]
) -> tuple[list[torch.Tensor], MoeTrace | None, int]:
    """Return the outputs ``[T, H]`` of each case, the first case's trace, and how many padded outputs are not zero."""
    prepared, hidden = layer.prepared, layer.prepared.dims.hidden
    # a server quantizes with the prepared file's scale, whatever it is
    packed, blocks, _ = pack_tokens(values, float(prepared.w13_input_scale[0]), prepared.padded_hidden)
    outputs, traces, stray = [], [], 0
    for case in cases:
        shape = (case.tokens, prepared.padded_hidden)
        out = torch.full(shape, math.nan, dtype=backend.out_dtype, device=values.device)
        traces.append(backend(prepared, routed_tokens(packed, blocks, case), layer.activation, out))
        # a token whose outputs are not finite has padded outputs that are not, too: NaN times the padding's zeros
        finite = out[:, :hidden].isfinite().all(dim=1, keepdim=True)
        stray += int(((out[:, hidden:] != 0) & finite).sum())
        outputs.append(out[:, :hidden].to(torch.float32))
    return outputs, traces[0], stray


def _stages(
    layer: LayerUnderTest,
    expert: SourceExpert,
    wanted: Evaluation,
    trace: MoeTrace,
    alone: Routing,
    out: torch.Tensor,
    rows: slice,
) -> StageFigures:
    """Return each stage of one expert on its own; the first rows of ``wanted`` are the tokens that go to it alone."""
    count = rows.stop - rows.start
    columns = _real_columns(layer.prepared, out.device)
    hidden, quantized = (values[rows][:, columns].to(torch.float32) for values in (trace.hidden, trace.quantized))
    known = torch.where(quantized.isfinite(), quantized, 0.0)
    strayed = (quantized - wanted.quantized[:count]).abs() > wanted.spread[:count] * (1 + 1e-6)
    defined = wanted.hidden[:count].isfinite().all(dim=1, keepdim=True)
    down, tolerance = evaluate_down(expert, known, layer.fc2_input_scale)
    weights = alone.weights[rows]
    return StageFigures(
        first=compare(hidden, wanted.hidden[:count], wanted.hidden_tolerance[:count]),
        misrounded=int(((strayed | ~quantized.isfinite()) & defined).sum()),
        second=compare(out[rows], torch.where(defined, down * weights, math.nan), tolerance * weights),
    )


def _real_columns(prepared: PreparedExperts, device: torch.device) -> torch.Tensor:
    """Return the channels of the padded intermediate that the source has."""
    size = prepared.padded_intermediate // prepared.layout.moe_tp
    share = prepared.dims.intermediate // prepared.layout.moe_tp
    channel = torch.arange(prepared.padded_intermediate, device=device)
    return channel[channel % size < share]


class _Expected:
    """Reference outputs of all cases, added up expert by expert; memory: three times the tokens in float32."""

    def __init__(self, layer: LayerUnderTest, cases: tuple[Routing, ...], x: torch.Tensor) -> None:
        self._layer = layer
        self._cases = cases
        self._x = x
        self._out = torch.zeros_like(x)
        self._tolerance = torch.zeros_like(x)
        self._magnitude = torch.zeros_like(x)

    def add(self, position: int, expert: SourceExpert) -> Evaluation:
        """Evaluate one expert on all its tokens."""
        rows, weights = self._tokens_of(position)
        result = self._evaluate(expert, self._x[rows])
        self._out.index_add_(0, rows, result.out * weights)
        self._tolerance.index_add_(0, rows, result.tolerance * weights)
        self._magnitude.index_add_(0, rows, result.out.abs() * weights)
        return result

    def noise(self, position: int, expert: SourceExpert, generator: torch.Generator) -> tuple[float, float]:
        """Return the relative and the worst difference of one expert when its sums are made in another order."""
        rows, _ = self._tokens_of(position)
        x = self._x[rows]
        dims = self._layer.prepared.dims
        order = (
            torch.randperm(dims.hidden, device=x.device, generator=generator),
            torch.randperm(dims.intermediate, device=x.device, generator=generator),
        )
        first, second = self._evaluate(expert, x), self._evaluate(expert, x, order)
        defined = first.out.isfinite() & second.out.isfinite()
        difference = torch.where(defined, (second.out - first.out).abs(), 0.0)
        tolerance = torch.where(defined, first.tolerance, 0.0) + torch.finfo(torch.float32).tiny
        size = torch.where(defined, first.out, 0.0).norm().clamp(min=1e-30)
        return float(difference.norm() / size), float(in_tolerances(difference, tolerance).max())

    def judge(self, case: Routing, out: torch.Tensor, dtype: torch.dtype, rows: slice | None = None) -> ErrorFigures:
        """Compare the outputs of one case, or some of its rows."""
        mine = rows or slice(0, case.tokens)
        span = slice(case.first_token + mine.start, case.first_token + mine.stop)
        want, tolerance = self._out[span], self._tolerance[span]
        if dtype != torch.float32:
            # each contribution is rounded, and the running sum after each of the k additions
            tolerance = tolerance + (case.expert_ids.shape[1] + 1) * _BF16_HALF_STEP * self._magnitude[span]
        return compare(out[mine], want, tolerance)

    def _evaluate(
        self, expert: SourceExpert, x: torch.Tensor, order: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> Evaluation:
        layer = self._layer
        found = evaluate(expert, x, layer.activation, layer.input_scale, layer.fc2_input_scale, order=order)
        # what quantization makes of NaN and infinity is not defined, so neither are the outputs
        defined = found.hidden.isfinite().all(dim=1, keepdim=True)
        return replace(found, out=torch.where(defined, found.out, math.nan))

    def _tokens_of(self, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rows and router weights ``[n, 1]`` of an expert's tokens over all cases."""
        rows, weights = [], []
        for case in self._cases:
            token, slot = (case.expert_ids == position).nonzero(as_tuple=True)
            rows.append(token + case.first_token)
            weights.append(case.weights[token, slot])
        return torch.cat(rows), torch.cat(weights).unsqueeze(1)


def _case_figures(case: Routing, experts: int, errors: ErrorFigures) -> CaseFigures:
    load = torch.bincount(case.expert_ids.flatten(), minlength=experts)
    return CaseFigures(
        case.name, case.expert_ids.shape[1], case.tokens, int(load.max()), int((load == 0).sum()), errors
    )
