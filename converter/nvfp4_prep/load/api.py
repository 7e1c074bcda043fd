"""``load_layer``: one rank's share of prepared layers as tensors."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nvfp4_prep._util.arguments import ANYTHING, PATH, checked, either, instance, offering, optional, sequence
from nvfp4_prep._util.buffers import byte_view
from nvfp4_prep._util.text import format_nbytes
from nvfp4_prep.checkpoint.filenames import EXPERT_SCALES
from nvfp4_prep.checkpoint.local_files import read_exactly
from nvfp4_prep.checkpoint.safetensors_header import TensorRecord
from nvfp4_prep.checkpoint.small_files import open_regular
from nvfp4_prep.errors import LoadError, SourceError, UsageError
from nvfp4_prep.load.arguments import as_experts, as_rank, check_experts
from nvfp4_prep.load.cooperative import CooperativeGroup, CooperativeLoad
from nvfp4_prep.load.loader import ExpertLoader
from nvfp4_prep.load.options import LoadOptions, rank_threads
from nvfp4_prep.load.report import LoadReport
from nvfp4_prep.load.shared_parameter import SharedParameter
from nvfp4_prep.prepared.catalog import Catalog
from nvfp4_prep.prepared.manifest import LayerRecord
from nvfp4_prep_kernels import ExpertSlice, LayoutError, PreparedTensor, rank_slice

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["LayerLoad", "LoadedLayer", "RankShare", "load_layer", "load_layers"]


@dataclass(frozen=True)
class RankShare:
    """The share of every layer that one rank holds.

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


_GROUP = optional(
    either(instance(CooperativeGroup), offering("a torch.distributed.ProcessGroup", "rank", "size", "allgather"))
)


@checked(
    path=PATH,
    options=optional(instance(LoadOptions)),
    group=_GROUP,
    **dict.fromkeys(("layer", "tp", "ep", "device", "experts"), ANYTHING),  # checked where they are used, in one place
)
def load_layer(
    path: Path | str,
    layer: int | str,
    *,
    tp: tuple[int, int] = (0, 1),
    ep: tuple[int, int] = (0, 1),
    experts: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    options: LoadOptions | None = None,
    group: ProcessGroup | CooperativeGroup | None = None,
) -> LoadedLayer:
    """Load one rank's share of one prepared layer.

    Args:
        path: a directory that ``nvfp4-prep convert`` wrote.
        layer: the layer's number, or its experts' module path.
        tp, ep: ``(rank, size)`` of tensor and expert parallelism.
        experts: the stored expert of each slot, instead of ``ep``; any order, repetitions allowed.
        device: where the tensors go.
        options: of the loader. Without ``threads``, the ranks of a ``group`` share the cores of this host.
        group: the tensor-parallel ranks of this host, which all call this at once, with the same arguments but for
            ``tp`` and ``device``: each reads a part of w2 and they exchange their columns
            (:class:`nvfp4_prep.load.CooperativeGroup`).

    Raises:
        CheckpointError: if the directory is not a complete prepared checkpoint.
        UsageError: if the layer or the rank does not exist, or the file does not serve this tensor-parallel size.
        LoadError, VerificationError: if the load fails; nothing is returned then. With a ``group``, every failure of
            any rank is a LoadError on all of them that names the rank.
    """
    with ExpertLoader(device, _shared_cores(options, group)) as loader:
        together = _together(group, loader)
        with _preparing(together):
            catalog = Catalog.open(path)
            record = catalog.layer(layer)
            share = RankShare.of(record.dims.experts, tp, ep)
            if experts is not None:
                share = RankShare(as_experts(experts), share.tp_rank, share.tp_size)
        loaded, _ = _load_layers(catalog, [record], share, loader, together)
    return loaded[0]


@checked(
    catalog=instance(Catalog),
    layers=sequence(instance(LayerRecord), "a sequence of layer records", least=0),
    share=instance(RankShare),
    loader=instance(ExpertLoader),
    group=_GROUP,
)
def load_layers(
    catalog: Catalog,
    layers: Sequence[LayerRecord],
    share: RankShare,
    loader: ExpertLoader,
    group: ProcessGroup | CooperativeGroup | None = None,
) -> tuple[list[LoadedLayer], LoadReport]:
    """Load one rank's share of several layers with one loader; with a ``group`` together with its other ranks.

    Raises what :func:`load_layer` raises.
    """
    return _load_layers(catalog, layers, share, loader, _together(group, loader))


def _load_layers(
    catalog: Catalog,
    layers: Sequence[LayerRecord],
    share: RankShare,
    loader: ExpertLoader,
    together: CooperativeLoad | None,
) -> tuple[list[LoadedLayer], LoadReport]:
    try:
        with _preparing(together):
            if loader.options.verify:
                catalog.check_sha256(EXPERT_SCALES)
            loads: list[LayerLoad] = []
            for layer in layers:
                loads.append(LayerLoad(catalog, layer, share, loader))
                if together is None:
                    for item in (loads[-1].parameter(tensor) for tensor in PreparedTensor):
                        item.submit(loader)
                loads[-1].read_vectors()
            if together is not None:
                parameters = [(tensor, load.parameter(tensor)) for load in loads for tensor in PreparedTensor]
                shared = [not tensor.is_w13 or item.is_exchanged(together.size) for tensor, item in parameters]
                exchanged = [item for (_, item), kept in zip(parameters, shared, strict=True) if kept]
                own = [item for (_, item), kept in zip(parameters, shared, strict=True) if not kept]
                together.begin(exchanged, own)
        if together is None:
            return [load.loaded for load in loads], loader.finish()
        report = together.complete()
    except BaseException:
        loader.abandon()
        raise
    return [load.loaded for load in loads], report


def _shared_cores(options: LoadOptions | None, group: ProcessGroup | CooperativeGroup | None) -> LoadOptions:
    options = LoadOptions() if options is None else options
    ranks = group.group if isinstance(group, CooperativeGroup) else group
    if ranks is None or not isinstance(options, LoadOptions) or options.threads or not hasattr(ranks, "size"):
        return options  # what is neither options nor a group is refused later
    return replace(options, threads=rank_threads(ranks.size()))


def _together(group: ProcessGroup | CooperativeGroup | None, loader: ExpertLoader) -> CooperativeLoad | None:
    if group is None:
        return None
    return CooperativeLoad(group if isinstance(group, CooperativeGroup) else CooperativeGroup(group), loader)


def _preparing(together: CooperativeLoad | None) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if together is None else together.preparing()


class LayerLoad:
    """One layer's parameters, allocated, and where their bytes are."""

    def __init__(self, catalog: Catalog, layer: LayerRecord, share: RankShare, loader: ExpertLoader) -> None:
        self._catalog, self._layer, self._share, self._loader = catalog, layer, share, loader
        self._records = catalog.records(layer)
        self._experts = share.experts if share.experts is not None else tuple(range(layer.dims.experts))
        check_experts(self._records[PreparedTensor.W13_WEIGHT.value], self._experts)
        self._tensors: dict[str, torch.Tensor] = {}
        for tensor in PreparedTensor:
            shape = (len(self._experts), *self._part(tensor, share.tp_rank, share.tp_size).shape)
            record = self._records[tensor.value]
            self._tensors[tensor.value] = _allocate(shape, tensor.torch_dtype, loader.device, record)
        self.loaded = LoadedLayer(layer, share, self._tensors)

    def parameter(self, tensor: PreparedTensor) -> SharedParameter:
        """Return a big tensor's parameter and where its bytes are."""
        record = self._records[tensor.value]
        return SharedParameter(
            self._catalog.root / record.file,
            record,
            self._part(tensor, self._share.tp_rank, self._share.tp_size),
            self._experts,
            self._tensors[tensor.value],
            self._layer.expert_crc32.get(tensor.value),
        )

    def read_vectors(self) -> None:
        """Read the scale vectors of the slots."""
        for name in self._layer.layout.scale_vectors:
            vector = _read_vector(self._catalog.root / self._records[name].file, self._records[name])
            self._tensors[name] = vector[list(self._experts)].to(self._loader.device)

    def _part(self, tensor: PreparedTensor, rank: int, size: int) -> ExpertSlice:
        try:
            return rank_slice(self._layer.layout, tensor, self._layer.dims, rank, size)
        except LayoutError as error:
            raise UsageError(str(error), where=self._layer.experts_path) from error


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
    descriptor, _ = open_regular(path, LoadError, "Copy or download it again.")
    try:
        read_exactly(descriptor, str(path), record.offset_bytes, byte_view(vector))
    except SourceError as error:
        where = f"{path}, tensor {record.name!r}"
        raise LoadError(error.what, where=where, expected=error.expected, actual=error.actual) from error
    finally:
        os.close(descriptor)
    return vector
