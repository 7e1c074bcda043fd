"""Both sides of a smoke run from disk: prepared tensors, and source tensors as they came or inverted."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from nvfp4_prep._util.buffers import byte_view
from nvfp4_prep.checkpoint.filenames import CONFIG, EXPERT_SCALES, SOURCE_SCALES
from nvfp4_prep.checkpoint.index import read_json_file
from nvfp4_prep.checkpoint.source import Source
from nvfp4_prep.errors import CheckpointError, NvfpPrepError, SourceError, UnsupportedCheckpointError
from nvfp4_prep.moe.expert_bytes import arrange_experts, read_experts
from nvfp4_prep.moe.gate_up_scales import reconcile_expert
from nvfp4_prep.moe.kernel_activation import moe_activation
from nvfp4_prep.moe.model_config import find_number
from nvfp4_prep.moe.scalars import LayerScalars, known_format
from nvfp4_prep.options import GateUpPolicy
from nvfp4_prep.planning.builder import make_plan
from nvfp4_prep.planning.plan import LayerPlan
from nvfp4_prep.prepared.checkpoint import PreparedCheckpoint
from nvfp4_prep.prepared.manifest import LayerRecord
from nvfp4_prep.smoke.read_ahead import ReadAhead, Sequential
from nvfp4_prep.smoke.under_test import LayerUnderTest
from nvfp4_prep_kernels import PreparedTensor, Projection
from nvfp4_prep_kernels.moe_reference import SourceExpert, SourceMatrix
from nvfp4_prep_kernels.moe_types import PreparedExperts

__all__ = ["CheckpointReader", "LayerDamagedError"]

_TENSORS = tuple(PreparedTensor)
_TOP_K_KEYS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k_experts", "moe_k")


class LayerDamagedError(CheckpointError):
    """The bytes of a prepared layer cannot be what was converted: found while the smoke run read them.

    Attributes:
        layer: the model's number of the layer.
    """

    def __init__(self, what: str, layer: int, where: str) -> None:
        self.layer = layer
        super().__init__(f"is damaged: {what}", where=where, next_step="Run `nvfp4-prep verify` on the directory.")


class CheckpointReader:
    """Reader of a prepared checkpoint's layers as :class:`LayerUnderTest`, some experts at a time.

    Memory: the chosen experts' prepared bytes on ``device``, and one source expert for each thread that reads ahead.
    """

    def __init__(
        self, checkpoint: PreparedCheckpoint, source: Source | None, device: torch.device, ahead: ReadAhead
    ) -> None:
        """Plan the source, where there is one.

        Args:
            checkpoint: opened; whoever opened it closes it.
            source: what it was made from, or ``None``: then the prepared tensors are inverted.
            device: where prepared and source tensors go.
            ahead: the threads that read them.

        Raises:
            SourceError, UnsupportedCheckpointError: if the source cannot be planned as the checkpoint was.
        """
        self._checkpoint = checkpoint
        self._policy = checkpoint.manifest.options.gate_up_scales
        self._device = device
        self._ahead = ahead
        config = checkpoint.manifest.texts.get(CONFIG)
        self._config = {} if config is None else read_json_file(CONFIG, config)
        self._source = source
        plans = () if source is None else make_plan(source, checkpoint.manifest.options).layers
        self._plans = {plan.experts_path: plan for plan in plans}

    def layer(self, record: LayerRecord, experts: Sequence[int]) -> LayerUnderTest:
        """Read one layer.

        Args:
            record: from the manifest.
            experts: numbers of the experts to take, ascending.

        Raises:
            CheckpointError: if one of the layer's files or tensors is missing, of another size, or damaged.
            SourceError: if a file of the source cannot be read.
        """
        for file in (*record.files, EXPERT_SCALES, SOURCE_SCALES):
            if file in self._checkpoint.header_errors:
                with _as_damage(record.index, str(self._checkpoint.path / file)):
                    raise self._checkpoint.header_errors[file]  # its tensors are not missing
        layer, chosen = record.source, tuple(experts)
        prepared = self._prepared(record, chosen)
        known_format(layer)  # of a package that is not installed: no damage
        with _as_damage(record.index, f"{self._checkpoint.path}, {layer.experts_path}"):
            scalars = self._checkpoint.scalars(record)
        plan = self._plans.get(layer.experts_path)
        if self._source is not None and plan is None:
            raise CheckpointError("the source has no such layer", where=layer.experts_path)

        def restored(position: int) -> SourceExpert:
            w13 = _w13_scale_2(record, self._policy, scalars, chosen[position])
            w2 = scalars.w2_scale_2[chosen[position]]
            where = f"{self._checkpoint.path}, {layer.experts_path}, expert {chosen[position]}"
            with _as_damage(record.index, where):
                return _restored_expert(record, prepared, w13, w2, position)

        w13_scales = [_w13_scale_2(record, self._policy, scalars, expert) for expert in chosen]
        return LayerUnderTest(
            name=layer.experts_path,
            index=layer.index,
            experts=chosen,
            experts_total=layer.dims.experts,
            prepared=prepared,
            source=restored if plan is None else self._read_source(plan, chosen),
            activation=moe_activation(record.activation, self._config, where=layer.experts_path),
            top_k=_top_k(self._config, layer.dims.experts),
            input_scale=scalars.w13_input_scale,
            fc2_input_scale=scalars.w2_input_scale,
            w13_scale_2=tuple(gate for gate, _ in w13_scales),
            w13_scale_2_up=tuple(up for _, up in w13_scales) if record.layout.takes_two_w13_scales else None,
            w2_scale_2=tuple(scalars.w2_scale_2[expert] for expert in chosen),
        )

    def _prepared(self, record: LayerRecord, experts: tuple[int, ...]) -> PreparedExperts:
        layer, layout = record.source, record.layout
        tensors: dict[str, torch.Tensor] = {}
        for tensor in PreparedTensor:
            shape = (len(experts), *layout.expert_shape(tensor, layer.dims))
            tensors[tensor.value] = torch.empty(shape, dtype=torch.uint8, device=self._device)

        def read(job: int) -> None:
            tensor, position = divmod(job, len(experts))
            expert = experts[position]
            stored = self._checkpoint.read_prepared(record, _TENSORS[tensor], range(expert, expert + 1))
            tensors[_TENSORS[tensor].value][position] = stored[0]

        self._ahead.for_each(read, range(len(_TENSORS) * len(experts)))
        for vector in layout.scale_vectors:
            stored = self._checkpoint.tensor_record(record, vector)
            values = torch.empty(layer.dims.experts, dtype=torch.float32)
            byte_view(values)[:] = byte_view(self._checkpoint.read(stored))
            tensors[vector] = values[list(experts)].to(self._device)
        return PreparedExperts(layout, replace(layer.dims, experts=len(experts)), **tensors)

    def _read_source(self, plan: LayerPlan, experts: tuple[int, ...]) -> Callable[[int], SourceExpert]:
        return Sequential(self._ahead, lambda position: self._source_expert(plan, experts[position]), len(experts))

    def _source_expert(self, plan: LayerPlan, expert: int) -> SourceExpert:
        """Return an expert from the source, gate and up brought to one scale as the conversion's policy says."""
        parts = {
            (projection, tensor.is_scale): part
            for tensor in PreparedTensor
            for projection, part in self._source_parts(plan, tensor, expert).items()
        }
        scalars = plan.scalars
        up_scale = scalars.up_scale_2[expert]
        gate_scale = up_scale if scalars.gate_scale_2 is None else scalars.gate_scale_2[expert]
        if expert in plan.reconciled:
            outcome = reconcile_expert(plan.scalars, expert, parts[Projection.GATE, True], parts[Projection.UP, True])
            parts[outcome.side, True] = outcome.block_scales
            gate_scale = up_scale = outcome.global_scale
        elif self._policy is GateUpPolicy.VLLM:
            up_scale = gate_scale

        def matrix(projection: Projection, scale_2: float) -> SourceMatrix:
            codes, scales = (parts[projection, is_scale].to(self._device) for is_scale in (False, True))
            return SourceMatrix(codes, scales, scale_2)

        return SourceExpert(
            gate=None if scalars.gate_scale_2 is None else matrix(Projection.GATE, gate_scale),
            up=matrix(Projection.UP, up_scale),
            down=matrix(Projection.DOWN, scalars.w2_scale_2[expert]),
        )

    def _source_parts(self, plan: LayerPlan, tensor: PreparedTensor, expert: int) -> Mapping[Projection, torch.Tensor]:
        layer = plan.source
        found: dict[Projection, torch.Tensor] = {}
        for group in layer.groups_for(plan.layout, tensor):
            if self._source is None:
                raise RuntimeError("no source is open")
            raw = read_experts(self._source, group, range(expert, expert + 1), layer.dims.experts)
            parts = arrange_experts(group, raw)
            found |= {name: part[0].contiguous() for name, part in zip(group.projections, parts, strict=True)}
        return found


@contextlib.contextmanager
def _as_damage(layer: int, where: str) -> Iterator[None]:
    """Say of what a prepared checkpoint itself holds that the checkpoint is damaged, not its source.

    Errors of the system say nothing of the bytes and stay what they are.
    """
    try:
        yield
    except (SourceError, UnsupportedCheckpointError, ValueError) as error:
        if isinstance(error.__cause__, OSError):
            raise
        what = error.what if isinstance(error, NvfpPrepError) else str(error)
        raise LayerDamagedError(what, layer, where) from error


def _w13_scale_2(record: LayerRecord, policy: GateUpPolicy, scalars: LayerScalars, expert: int) -> tuple[float, float]:
    """Return the global scales that gate and up are served with, said once more on their own.

    Where the kernel takes one for both, it is the other side's where one side was rescaled, else gate's.
    """
    up = scalars.up_scale_2[expert]
    gate = up if scalars.gate_scale_2 is None else scalars.gate_scale_2[expert]
    if record.layout.takes_two_w13_scales:
        return gate, gate if policy is GateUpPolicy.VLLM else up
    rescaled_gate = dict(record.gate_up.reconciled).get(expert) == Projection.GATE.value
    return (up, up) if rescaled_gate else (gate, gate)


def _restored_expert(
    record: LayerRecord, prepared: PreparedExperts, w13: tuple[float, float], w2: float, position: int
) -> SourceExpert:
    """Restore an expert from the prepared bytes by the torch reference of the layout, with these global scales."""
    layout = record.layout
    parts: dict[tuple[Projection, bool], torch.Tensor] = {}
    for tensor in PreparedTensor:
        stored: torch.Tensor = getattr(prepared, tensor.value)
        back = layout.invert(tensor, stored[position], record.dims)
        parts |= {
            (name, tensor.is_scale): part.contiguous()
            for name, part in zip(layout.projections(tensor), back, strict=True)
        }

    def matrix(projection: Projection, scale_2: float) -> SourceMatrix:
        return SourceMatrix(parts[projection, False], parts[projection, True], scale_2)

    return SourceExpert(
        gate=matrix(Projection.GATE, w13[0]) if layout.gated else None,
        up=matrix(Projection.UP, w13[1]),
        down=matrix(Projection.DOWN, w2),
    )


def _top_k(config: Mapping[str, Any], experts: int) -> int:
    """Return experts of a token: the model's, or 8 where the config does not say."""
    found = find_number(config, _TOP_K_KEYS)
    return min(8 if found is None else math.ceil(found), experts)
