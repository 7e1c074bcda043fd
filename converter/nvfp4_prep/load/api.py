"""``load_layer``: one rank's share of prepared layers as tensors."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nvfp4_prep._util.buffers import byte_view
from nvfp4_prep._util.text import format_nbytes
from nvfp4_prep.checkpoint.filenames import EXPERT_SCALES
from nvfp4_prep.checkpoint.safetensors_header import TensorRecord
from nvfp4_prep.checkpoint.small_files import open_regular
from nvfp4_prep.checkpoint.source import read_exactly
from nvfp4_prep.errors import LoadError, SourceError, UsageError
from nvfp4_prep.load.arguments import as_experts, as_rank
from nvfp4_prep.load.catalog import Catalog
from nvfp4_prep.load.loader import ExpertLoader
from nvfp4_prep.load.options import LoadOptions
from nvfp4_prep.load.report import LoadReport
from nvfp4_prep.prepared.manifest import LayerRecord
from nvfp4_prep_kernels import LayoutError, PreparedTensor, rank_slice

__all__ = ["LoadedLayer", "RankShare", "load_layer", "load_layers"]


@dataclass(frozen=True)
class RankShare:
    """What one rank holds of every layer.

    Attributes:
        experts: stored experts, one for each slot; None for all, in their order.
        tp_rank, tp_size: share of the intermediate size.
    """

    experts: tuple[int, ...] | None = None
    tp_rank: int = 0
    tp_size: int = 1

    def __post_init__(self) -> None:
        """Check what may come from a caller's own placement; raises :class:`UsageError`."""
        as_rank((self.tp_rank, self.tp_size), "tp")
        if self.experts is not None:
            object.__setattr__(self, "experts", as_experts(self.experts))

    @classmethod
    def of(cls, experts: int, tp: tuple[int, int] = (0, 1), ep: tuple[int, int] = (0, 1)) -> RankShare:
        """Return the share of tensor-parallel and expert-parallel ranks, each ``(rank, size)``, of ``experts`` experts.

        Experts are spread as vLLM's linear placement does: the first ``experts % size`` ranks hold one more.

        Raises:
            UsageError: if a rank does not exist.
        """
        tp, (rank, size) = as_rank(tp, "tp"), as_rank(ep, "ep")
        each, more = divmod(experts, size)
        first = rank * each + min(rank, more)
        return cls(tuple(range(first, first + each + (rank < more))), *tp)


@dataclass(frozen=True)
class LoadedLayer:
    """One rank's share of one layer.

    Attributes:
        record: the manifest's entry: sizes, layout, activation.
        share: whose.
        tensors: by short name: ``w13_weight`` uint8 and ``w13_weight_scale`` float8_e4m3fn ``[slots, rows, bytes per
            row]``, the same for ``w2``, and the float32 ``[slots]`` vectors that ``layout.scale_vectors`` names.
    """

    record: LayerRecord
    share: RankShare
    tensors: Mapping[str, torch.Tensor]

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in self.tensors.items())
        return f"<LoadedLayer {self.record.experts_path!r}: {shapes}>"


def load_layer(
    path: Path | str,
    layer: int | str,
    *,
    tp: tuple[int, int] = (0, 1),
    ep: tuple[int, int] = (0, 1),
    experts: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    options: LoadOptions | None = None,
) -> LoadedLayer:
    """Load one rank's share of one prepared layer.

    Args:
        path: a directory that ``nvfp4-prep convert`` wrote.
        layer: the layer's number, or its experts' module path.
        tp, ep: ``(rank, size)`` of tensor and expert parallelism.
        experts: the stored expert of each slot, instead of ``ep``; any order, repetitions allowed.
        device: where the tensors go.
        options: of the loader.

    Raises:
        CheckpointError: if the directory is no complete prepared checkpoint.
        UsageError: if the layer or the rank does not exist, or the file does not serve this tensor-parallel size.
        LoadError, VerificationError: if the load fails; nothing is returned then.
    """
    catalog = Catalog.open(path)
    record = catalog.layer(layer)
    share = RankShare.of(record.dims.experts, tp, ep)
    if experts is not None:
        share = RankShare(as_experts(experts), share.tp_rank, share.tp_size)
    with ExpertLoader(device, options) as loader:
        loaded, _ = load_layers(catalog, [record], share, loader)
    return loaded[0]


def load_layers(
    catalog: Catalog, layers: Sequence[LayerRecord], share: RankShare, loader: ExpertLoader
) -> tuple[list[LoadedLayer], LoadReport]:
    """Load one rank's share of several layers with one loader.

    Raises:
        As :func:`load_layer`.
    """
    if loader.options.verify:
        catalog.check_sha256(EXPERT_SCALES)
    try:
        loaded = [LoadedLayer(layer, share, dict(_submit(catalog, layer, share, loader))) for layer in layers]
    except BaseException:
        loader.abandon()
        raise
    return loaded, loader.finish()


def _submit(
    catalog: Catalog, layer: LayerRecord, share: RankShare, loader: ExpertLoader
) -> Iterator[tuple[str, torch.Tensor]]:
    dims, records = layer.dims, catalog.records(layer)
    experts = share.experts if share.experts is not None else tuple(range(dims.experts))
    for tensor in PreparedTensor:
        try:
            part = rank_slice(layer.layout, tensor, dims, share.tp_rank, share.tp_size)
        except LayoutError as error:
            raise UsageError(str(error), where=layer.experts_path) from error
        record = records[tensor.value]
        parameter = _allocate((len(experts), *part.shape), tensor.torch_dtype, loader.device, record)
        loader.submit(
            catalog.root / record.file, record, part, experts, parameter, layer.expert_crc32.get(tensor.value)
        )
        yield tensor.value, parameter
    for name in layer.layout.scale_vectors:
        vector = _read_vector(catalog.root / records[name].file, records[name])
        yield name, vector[list(experts)].to(loader.device)


def _allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, record: TensorRecord) -> torch.Tensor:
    try:
        return torch.empty(shape, dtype=dtype, device=device)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        nbytes = torch.Size(shape).numel()
        raise LoadError(
            f"no memory for {format_nbytes(nbytes)} on {device} ({str(error).splitlines()[0]})",
            where=f"{record.file}, tensor {record.name!r}",
            next_step="Spread the model over more devices.",
        ) from error


def _read_vector(path: Path, record: TensorRecord) -> torch.Tensor:
    vector = torch.empty(record.shape, dtype=torch.float32, device="cpu")
    descriptor, _ = open_regular(path, LoadError, "Complete the download.")
    try:
        read_exactly(descriptor, str(path), record.offset_bytes, byte_view(vector))
    except SourceError as error:
        where = f"{path}, tensor {record.name!r}"
        raise LoadError(error.what, where=where, expected=error.expected, actual=error.actual) from error
    finally:
        os.close(descriptor)
    return vector
