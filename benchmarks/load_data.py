"""Files for the load benchmarks: random NVFP4 experts at the dimensions of a real model, original and prepared.

The prepared bytes are made from the original ones by the layout package, so that every way of loading must end with
the same parameters.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from nvfp4_prep._util.buffers import byte_view
from nvfp4_prep.checkpoint.safetensors_header import encode_header
from nvfp4_prep.checkpoint.tensors import TensorRecord, TensorSpec
from nvfp4_prep_kernels import SCALE_VECTORS, MoeDims, MoeLayout, PreparedTensor

KIMI = MoeDims(experts=384, intermediate=2048, hidden=7168)
PREFIX = "model.layers.{layer}.mlp.experts"
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def prepared_name(layer: int, tensor: str) -> str:
    return f"{PREFIX.format(layer=layer)}.routed_experts.{tensor}"


@dataclass(frozen=True)
class LayerFiles:
    """One layer on disk.

    Attributes:
        layer: its number.
        dims: of the files; ``dims.experts`` may be a rank's share only.
        prepared: file of the four big tensors, and where each lies.
        records: of the big tensors.
        original: file of the per-expert tensors, where asked for.
        vectors: the float32 vectors.
    """

    layer: int
    dims: MoeDims
    prepared: Path
    records: dict[str, TensorRecord]
    original: Path | None
    vectors: dict[str, torch.Tensor]


class Writer:
    """Writes byte ranges of several files from a few threads."""

    def __init__(self, threads: int = 8) -> None:
        self._pool = ThreadPoolExecutor(threads)
        self._jobs: list[object] = []

    def put(self, path: Path, offset_bytes: int, tensor: torch.Tensor) -> None:
        host = tensor.contiguous().cpu()
        if len(self._jobs) >= 32:
            self.wait()
        self._jobs.append(self._pool.submit(_pwrite, path, offset_bytes, host))

    def wait(self) -> None:
        for job in self._jobs:
            job.result()
        self._jobs.clear()


def _pwrite(path: Path, offset: int, host: torch.Tensor) -> None:
    view = byte_view(host)
    with path.open("r+b", buffering=0) as stream:
        while view:
            done = os.pwrite(stream.fileno(), view, offset)
            view, offset = view[done:], offset + done


def create(path: Path, specs: list[TensorSpec]) -> dict[str, TensorRecord]:
    """A file with header and a hole where the data goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header, records = encode_header(path.name, specs)
    with path.open("wb") as stream:
        stream.write(header)
        stream.truncate(len(header) + sum(record.nbytes for record in records))
    return {record.name: record for record in records}


def random_bytes(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """``uint8``, never zeros."""
    words = torch.empty((*shape[:-1], shape[-1] // 8), dtype=torch.int64, device=device)
    return words.random_(-(2**63), 2**63 - 1).view(torch.uint8)


def write_layer(
    prepared: Path,
    layer: int,
    dims: MoeDims,
    experts: range,
    device: torch.device,
    *,
    original: Path | None = None,
    mirror: Path | None = None,
    batch: int = 16,
) -> LayerFiles:
    """Makes one layer.

    Args:
        prepared: directory of the prepared file: ``dims.experts`` experts, holes (no memory) but for ``experts``.
        layer: number.
        dims: sizes.
        experts: which get bytes.
        device: where random bytes are made and prepared.
        original: directory of the original file: only ``experts``, numbered from 0.
        mirror: directory of a second prepared file that holds only ``experts``.
        batch: experts at a time.
    """
    layout = MoeLayout.cutedsl(gated=True)
    path = prepared / f"experts-layer-{layer:05d}.safetensors"
    records = create(path, _prepared_specs(layer, layout, dims))
    few = MoeDims(len(experts), dims.intermediate, dims.hidden)
    copy = None if mirror is None else mirror / path.name
    copies = {} if copy is None else create(copy, _prepared_specs(layer, layout, few))
    source = None if original is None else original / f"model-{layer:05d}.safetensors"
    sources = {} if source is None else create(source, _original_specs(layer, few))
    writer = Writer()
    for start in range(0, len(experts), batch):
        count = min(batch, len(experts) - start)
        parts = _random_parts(layout, few, count, device)
        for tensor in PreparedTensor:
            made = layout.apply(tensor, *(parts[name, tensor.is_scale] for name in _names(tensor)))
            size = layout.expert_nbytes(tensor, dims)
            record = records[prepared_name(layer, tensor)]
            writer.put(path, record.offset_bytes + (experts.start + start) * size, made)
            if copy is not None:
                writer.put(copy, copies[prepared_name(layer, tensor)].offset_bytes + start * size, made)
        if source is not None:
            for (name, is_scale), part in parts.items():
                suffix = "weight_scale" if is_scale else "weight"
                host = part.cpu()
                for index in range(count):
                    key = f"{PREFIX.format(layer=layer)}.{start + index}.{name}.{suffix}"
                    writer.put(source, sources[key].offset_bytes, host[index])
    vectors = {name: torch.rand(len(experts)) * 0.01 + 0.001 for name in SCALE_VECTORS}
    if source is not None:
        _write_scalars(writer, source, sources, layer, vectors)
    writer.wait()
    return LayerFiles(layer, dims, path, {n.rsplit(".", 1)[1]: r for n, r in records.items()}, source, vectors)


def _names(tensor: PreparedTensor) -> tuple[str, ...]:
    return ("gate_proj", "up_proj") if tensor.is_w13 else ("down_proj",)


def _random_parts(
    layout: MoeLayout, dims: MoeDims, count: int, device: torch.device
) -> dict[tuple[str, bool], torch.Tensor]:
    return {
        (name, tensor.is_scale): random_bytes((count, *layout.source_shape(tensor, dims)), device)
        for tensor in PreparedTensor
        for name in _names(tensor)
    }


def _prepared_specs(layer: int, layout: MoeLayout, dims: MoeDims) -> list[TensorSpec]:
    return [
        TensorSpec(
            prepared_name(layer, tensor),
            "F8_E4M3" if tensor.is_scale else "U8",
            (dims.experts, *layout.expert_shape(tensor, dims)),
        )
        for tensor in PreparedTensor
    ]


def _original_specs(layer: int, dims: MoeDims) -> list[TensorSpec]:
    """As the official writer orders them: wide elements first, then by name."""
    specs = []
    for expert in range(dims.experts):
        for name in PROJECTIONS:
            rows, cols = (dims.hidden, dims.intermediate) if name == "down_proj" else (dims.intermediate, dims.hidden)
            key = f"{PREFIX.format(layer=layer)}.{expert}.{name}"
            specs += [
                TensorSpec(f"{key}.weight", "U8", (rows, cols // 2)),
                TensorSpec(f"{key}.weight_scale", "F8_E4M3", (rows, cols // 16)),
                TensorSpec(f"{key}.weight_scale_2", "F32", ()),
                TensorSpec(f"{key}.input_scale", "F32", ()),
            ]
    return sorted(specs, key=lambda spec: (spec.dtype != "F32", spec.dtype, spec.name))


def _write_scalars(
    writer: Writer, path: Path, records: dict[str, TensorRecord], layer: int, vectors: dict[str, torch.Tensor]
) -> None:
    for expert in range(len(vectors["w2_input_scale"])):
        for name in PROJECTIONS:
            side = "w2" if name == "down_proj" else "w13"
            key = f"{PREFIX.format(layer=layer)}.{expert}.{name}"
            for leaf in ("weight_scale_2", "input_scale"):
                value = vectors[f"{side}_{leaf}"][expert].reshape(1)
                writer.put(path, records[f"{key}.{leaf}"].offset_bytes, value)
