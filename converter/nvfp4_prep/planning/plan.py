"""Plan of a conversion: frozen values that say which bytes go where.

``--dry-run`` prints a plan, the engine executes it, resume compares it. Two plans of the same source and options are
equal in everything but the source files' identities, on any machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from nvfp4_prep._util.layer_strip import LayerCell
from nvfp4_prep._util.notebook import notebook_html
from nvfp4_prep._util.text import count, format_nbytes
from nvfp4_prep._version import __version__
from nvfp4_prep.checkpoint.filenames import FileKind
from nvfp4_prep.checkpoint.index import CheckpointIndex
from nvfp4_prep.checkpoint.source import SourceFile
from nvfp4_prep.checkpoint.tensors import TensorRecord
from nvfp4_prep.moe.activation import Activation
from nvfp4_prep.moe.discovery import LayerFinding
from nvfp4_prep.moe.layers import LayerWithLayout, MoeLayer
from nvfp4_prep.moe.scalars import LayerScalars
from nvfp4_prep.options import ConvertOptions
from nvfp4_prep_kernels import MoeLayout, PreparedTensor

__all__ = ["LayerPlan", "OutputFile", "Plan"]


@dataclass(frozen=True)
class LayerPlan(LayerWithLayout):
    """One layer to prepare.

    Attributes:
        source: the layer in the source.
        layout: the prepared side.
        activation: of the experts.
        scalars: the source's scalars.
        reconciled: experts whose block scales must be rescaled, because gate and up differ and the policy says so.
    """

    source: MoeLayer
    layout: MoeLayout
    activation: Activation
    scalars: LayerScalars
    reconciled: tuple[int, ...]

    @property
    def prepared_nbytes(self) -> int:
        """Bytes of the four big tensors."""
        dims = self.dims
        return dims.experts * sum(self.layout.expert_nbytes(tensor, dims) for tensor in PreparedTensor)


@dataclass(frozen=True)
class OutputFile:
    """One safetensors file to write.

    Attributes:
        name: in the output directory.
        kind: what it holds.
        header: length prefix and header.
        records: where each tensor goes.
        nbytes: size.
        shards: the source files it needs.
        layer_position: in :attr:`Plan.layers`, for a layer's files.
        tensors: for :attr:`FileKind.EXPERTS`, which of the four tensors are in it.
        copies: for :attr:`FileKind.PASSTHROUGH`, the source's record of each tensor, in the order of ``records``.
        served: whether the index lists its tensors (restore-only files are not served).
    """

    name: str
    kind: FileKind
    header: bytes
    records: tuple[TensorRecord, ...]
    nbytes: int
    shards: frozenset[str] = frozenset()
    layer_position: int | None = None
    tensors: tuple[PreparedTensor, ...] = ()
    copies: tuple[TensorRecord, ...] = ()
    served: bool = True


@dataclass(frozen=True)
class Plan:
    """Plan of a conversion: its layers, the files it writes and the files it reads.

    Attributes:
        source_label, source_revision: what the manifest calls the source.
        source_files: name, size and identity of everything that is read.
        options: what the bytes depend on.
        index: the source's index.
        layers: to prepare.
        others: MoE layers that pass through, with reasons.
        files: in the order of writing.
        side_files: copied unchanged.
        warnings: what is wrong with the source and does not keep it from being converted.
    """

    source_label: str
    source_revision: str | None
    source_files: tuple[SourceFile, ...]
    options: ConvertOptions
    index: CheckpointIndex
    layers: tuple[LayerPlan, ...]
    others: tuple[LayerFinding, ...]
    files: tuple[OutputFile, ...]
    side_files: tuple[SourceFile, ...]
    warnings: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return (
            f"Plan({self.source_label!r:.80}, layers={len(self.layers)}, others={len(self.others)},"
            f" files={len(self.files)}, output_nbytes={self.output_nbytes})"
        )

    def _repr_html_(self) -> str:
        """Return the plan as a notebook shows it."""
        cells = [
            LayerCell(
                str(item.index), "plain", f"{item.experts_path}: to prepare, {format_nbytes(item.prepared_nbytes)}"
            )
            for item in self.layers
        ]
        cells += [LayerCell("-", "other", f"{item.experts_path}: {item.reason}") for item in self.others]
        return notebook_html(
            f"Plan of {self.source_label}",
            {
                "layers": f"{len(self.layers)} to prepare, {len(self.others)} pass through",
                "layout": self.options.layout,
                "source": format_nbytes(self.source_nbytes),
                "output": f"{format_nbytes(self.output_nbytes)} in {count(len(self.files), 'file')}",
                "warnings": "; ".join(self.warnings),
            },
            cells,
        )

    @property
    def left_out(self) -> tuple[str, ...]:
        """The source's files that are not part of the model: see ``CheckpointIndex``."""
        return tuple(self.index.left_out)

    @property
    def left_out_reasons(self) -> Mapping[str, str]:
        """Why each of them is left out, by name."""
        return self.index.left_out

    @property
    def output_nbytes(self) -> int:
        """Bytes of all safetensors and copied files (configs and manifest come on top)."""
        return sum(file.nbytes for file in self.files) + sum(file.nbytes for file in self.side_files)

    @property
    def source_nbytes(self) -> int:
        """Bytes of the shards that are read."""
        return sum(header.file_nbytes for header in self.index.headers.values())

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of everything that decides the output's bytes."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()

    def identity(self) -> dict[str, object]:
        """Return what a resumed conversion must find again: version, options, shard structures, files' identities."""
        return {
            "tool": __version__,
            "options": self.options.to_dict(),
            "source": self.source_label,
            "revision": self.source_revision,
            "source_files": {file.name: [file.nbytes, file.identity] for file in self.source_files},
            "headers": {name: header.sha256 for name, header in self.index.headers.items()},
            "output": {file.name: [file.nbytes, hashlib.sha256(file.header).hexdigest()] for file in self.files},
        }

    def shard_order(self, files: Iterable[OutputFile] | None = None) -> tuple[str, ...]:
        """Return the shards in the order in which the files (all by default) first need them."""
        order: dict[str, None] = {}
        for file in self.files if files is None else files:
            order.update(dict.fromkeys(sorted(file.shards)))
        return tuple(order)

    @property
    def peak_shards_nbytes(self) -> int:
        """Largest sum of shards that must be there at once, if each is released after its last use."""
        last = {shard: position for position, file in enumerate(self.files) for shard in file.shards}
        size = {name: header.file_nbytes for name, header in self.index.headers.items()}
        held: set[str] = set()
        peak = 0
        for position, file in enumerate(self.files):
            held |= file.shards
            peak = max(peak, sum(size[shard] for shard in held))
            held = {shard for shard in held if last[shard] > position}
        return peak
