"""Both sides of a smoke run from disk: prepared tensors, and source tensors as they came or turned back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nvfp4_prep.buffers import byte_view
from nvfp4_prep.errors import CheckpointError
from nvfp4_prep.formats import Leaf
from nvfp4_prep.index import CONFIG, read_json_file
from nvfp4_prep.manifest import LayerRecord, Manifest
from nvfp4_prep.moe_layers import MoeLayer
from nvfp4_prep.options import GateUpPolicy
from nvfp4_prep.plan_data import SCALE_VECTORS, LayerPlan
from nvfp4_prep.planning import make_plan
from nvfp4_prep.prepare import arrange_experts, read_experts, reconcile_expert
from nvfp4_prep.safetensors_io import TensorRecord
from nvfp4_prep.scalars import scale_2_multipliers
from nvfp4_prep.smoke.activations import moe_activation
from nvfp4_prep.smoke.layer import LayerUnderTest
from nvfp4_prep.source import LocalSource, Source
from nvfp4_prep_kernels import MoeLayout, PreparedTensor, Projection
from nvfp4_prep_kernels.moe_reference import SourceExpert, SourceMatrix
from nvfp4_prep_kernels.moe_types import PreparedExperts

__all__ = ["CheckpointReader"]

EXPERT_SCALES = "expert-scales.safetensors"
SOURCE_SCALES = "source-scales.safetensors"
_TOP_K_KEYS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k_experts", "moe_k")


@dataclass(frozen=True)
class _Scalars:
    """Multipliers of one layer, on the CPU."""

    gate: tuple[float, ...] | None
    up: tuple[float, ...]
    down: tuple[float, ...]
    input_scale: float
    fc2_input_scale: float


class CheckpointReader:
    """Gives the layers of a prepared checkpoint as :class:`LayerUnderTest`, some experts at a time.

    Memory: the chosen experts' prepared bytes on ``device``, and one source expert.
    """

    def __init__(self, prepared: Path, manifest: Manifest, source: Source | None, device: torch.device) -> None:
        self._files = LocalSource(prepared)
        self._manifest = manifest
        self._device = device
        self._records: dict[str, TensorRecord] = {}
        for name in (EXPERT_SCALES, SOURCE_SCALES):
            self._index(name)
        config = manifest.texts.get(CONFIG)
        self._config = {} if config is None else read_json_file(CONFIG, config)
        self._source = source
        plans = () if source is None else make_plan(source, manifest.options).layers
        self._plans = {plan.layer.experts_path: plan for plan in plans}

    def close(self) -> None:
        """Closes the files."""
        self._files.close()

    def layer(self, record: LayerRecord, experts: Sequence[int]) -> LayerUnderTest:
        """Reads one layer.

        Args:
            record: from the manifest.
            experts: numbers of the experts to take, ascending.

        Raises:
            CheckpointError: if a tensor is missing or of another size than the manifest says.
        """
        for file in record.files:
            self._index(file)
        layer, chosen = record.layer, tuple(experts)
        prepared = self._prepared(record, chosen)
        scalars = self._scalars(layer)
        wanted = [self._w13_scale_2(record, scalars, expert) for expert in chosen]
        plan = self._plans.get(layer.experts_path)
        if self._source is not None and plan is None:
            raise CheckpointError("the source has no such layer", where=layer.experts_path)

        def source(position: int) -> SourceExpert:
            if plan is None:
                return self._restored_expert(record, prepared, scalars, chosen, position)
            return self._source_expert(plan, chosen[position])

        return LayerUnderTest(
            name=layer.experts_path,
            index=layer.index,
            experts=chosen,
            experts_total=layer.dims.experts,
            prepared=prepared,
            source=source,
            activation=moe_activation(record.activation, self._config, where=layer.experts_path),
            top_k=_top_k(self._config, layer.dims.experts),
            input_scale=scalars.input_scale,
            fc2_input_scale=scalars.fc2_input_scale,
            w13_scale_2=tuple(wanted),
            w2_scale_2=tuple(scalars.down[expert] for expert in chosen),
        )

    def _index(self, file: str) -> None:
        self._records |= {record.name: record for record in self._files.header(file).tensors}

    def _record(self, name: str, nbytes: int) -> TensorRecord:
        record = self._records.get(name)
        if record is None or record.nbytes != nbytes:
            raise CheckpointError(
                "is missing or has the wrong size",
                where=name,
                expected=f"{nbytes} bytes",
                actual="nothing" if record is None else f"{record.nbytes} bytes",
                next_step="Run `nvfp4-prep verify` without --smoke to see what is damaged.",
            )
        return record

    def _prepared(self, record: LayerRecord, experts: tuple[int, ...]) -> PreparedExperts:
        layer, layout = record.layer, record.layout
        tensors: dict[str, torch.Tensor] = {}
        for tensor in PreparedTensor:
            rows, cols = layout.expert_shape(tensor, layer.dims)
            stored = self._record(layer.prepared_name(tensor), layer.dims.experts * rows * cols)
            found = torch.empty(len(experts), rows, cols, dtype=torch.uint8, device=self._device)
            for position, expert in enumerate(experts):
                found[position] = self._read(stored, expert * rows * cols, rows * cols).view(rows, cols)
            tensors[tensor.value] = found
        for vector in SCALE_VECTORS:
            stored = self._record(layer.prepared_name(vector), 4 * layer.dims.experts)
            values = self._read(stored, 0, stored.nbytes).view(torch.float32)
            tensors[vector] = values[list(experts)].to(self._device)
        return PreparedExperts(layout, replace(layer.dims, experts=len(experts)), **tensors)

    def _read(self, record: TensorRecord, begin: int, nbytes: int) -> torch.Tensor:
        buffer = torch.empty(nbytes, dtype=torch.uint8)
        self._files.read_into(record.file, record.offset_bytes + begin, byte_view(buffer))
        return buffer

    def _scalars(self, layer: MoeLayer) -> _Scalars:
        """The source's scalars, kept beside the prepared tensors for restore."""
        raw = {}
        for group in layer.groups:
            if group.leaf.is_scalar:
                stored = self._records.get(group.key)
                if stored is None:
                    raise CheckpointError("is missing", where=f"{SOURCE_SCALES}: {group.key}")
                raw[group.key] = bytes(self._read(stored, 0, stored.nbytes).tolist())

        def values(leaf: Leaf, projection: Projection) -> torch.Tensor:
            found = scale_2_multipliers(layer, raw, leaf, projection)
            if found is None:
                raise CheckpointError(f"has no {leaf.value} of {projection.value}", where=layer.experts_path)
            return found

        w13 = (Projection.GATE, Projection.UP) if layer.gated else (Projection.UP,)
        return _Scalars(
            gate=tuple(values(Leaf.GLOBAL_SCALE, Projection.GATE).tolist()) if layer.gated else None,
            up=tuple(values(Leaf.GLOBAL_SCALE, Projection.UP).tolist()),
            down=tuple(values(Leaf.GLOBAL_SCALE, Projection.DOWN).tolist()),
            input_scale=max(float(values(Leaf.INPUT_SCALE, projection).max()) for projection in w13),
            fc2_input_scale=float(values(Leaf.INPUT_SCALE, Projection.DOWN).max()),
        )

    def _w13_scale_2(self, record: LayerRecord, scalars: _Scalars, expert: int) -> float:
        """The one global scale of gate and up: the other side's where one side's block scales were rescaled."""
        sides = dict(record.gate_up.reconciled)
        if scalars.gate is None or sides.get(expert) == Projection.GATE.value:
            return scalars.up[expert]
        return scalars.gate[expert]

    def _source_expert(self, plan: LayerPlan, expert: int) -> SourceExpert:
        """From the source; gate and up brought to one scale as the conversion's policy says."""
        parts = {
            (projection, tensor.is_scale): part
            for tensor in PreparedTensor
            for projection, part in self._source_parts(plan, tensor, expert).items()
        }
        scalars = plan.scalars
        up_scale = scalars.up_scale_2[expert]
        gate_scale = up_scale if scalars.gate_scale_2 is None else scalars.gate_scale_2[expert]
        if expert in plan.reconciled:
            outcome = reconcile_expert(plan, expert, parts[Projection.GATE, True], parts[Projection.UP, True])
            parts[outcome.side, True] = outcome.block_scales
            gate_scale = up_scale = outcome.global_scale
        elif self._manifest.options.gate_up_scales is GateUpPolicy.VLLM:
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
        layer = plan.layer
        found: dict[Projection, torch.Tensor] = {}
        for group in layer.groups_for(plan.layout, tensor):
            if self._source is None:
                raise RuntimeError("no source is open")
            raw = read_experts(self._source, group, range(expert, expert + 1), layer.dims.experts)
            parts = arrange_experts(group, raw)
            found |= {name: part[0].contiguous() for name, part in zip(group.projections, parts, strict=True)}
        return found

    def _restored_expert(
        self,
        record: LayerRecord,
        prepared: PreparedExperts,
        scalars: _Scalars,
        experts: tuple[int, ...],
        position: int,
    ) -> SourceExpert:
        """From the prepared bytes, turned back by the torch reference of the layout."""
        layout: MoeLayout = record.layout
        parts: dict[tuple[Projection, bool], torch.Tensor] = {}
        for tensor in PreparedTensor:
            stored: torch.Tensor = getattr(prepared, tensor.value)
            back = layout.invert(tensor, stored[position], record.layer.dims)
            parts |= {
                (name, tensor.is_scale): part.contiguous()
                for name, part in zip(layout.projections(tensor), back, strict=True)
            }
        expert = experts[position]
        w13 = self._w13_scale_2(record, scalars, expert)

        def matrix(projection: Projection, scale_2: float) -> SourceMatrix:
            return SourceMatrix(parts[projection, False], parts[projection, True], scale_2)

        return SourceExpert(
            gate=matrix(Projection.GATE, w13) if layout.gated else None,
            up=matrix(Projection.UP, w13),
            down=matrix(Projection.DOWN, scalars.down[expert]),
        )


def _top_k(config: Mapping[str, Any], experts: int) -> int:
    """Experts of a token: the model's, or 8 where the config does not say."""
    parts = [config.get(key) for key in ("text_config", "llm_config", "language_config")]
    for part in (*parts, config):
        for key in _TOP_K_KEYS:
            value = part.get(key) if isinstance(part, Mapping) else None
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return min(value, experts)
    return min(8, experts)
