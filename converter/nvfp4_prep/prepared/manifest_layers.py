"""The manifest's record of one prepared layer, from JSON and to JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nvfp4_prep.checkpoint.tensors import TensorRecord
from nvfp4_prep.errors import CheckpointError
from nvfp4_prep.formats import Leaf
from nvfp4_prep.moe.activation import Activation, ActivationKind
from nvfp4_prep.moe.layers import LayerWithLayout, MoeLayer, TensorGroup
from nvfp4_prep.options import ConvertOptions
from nvfp4_prep.prepared.layer_record_checks import check_expert_crc32, check_gate_up, check_groups
from nvfp4_prep.prepared.manifest_values import file_name, flag, items, mapping, number, sha256, text, whole
from nvfp4_prep.prepared.problems import renewal
from nvfp4_prep_kernels import MoeDims, MoeLayout, PreparedTensor, Projection

__all__ = ["GateUpRecord", "LayerRecord", "layer_from_dict", "layer_to_dict"]

_MAX_CRC32 = 2**32 - 1


@dataclass(frozen=True)
class GateUpRecord:
    """Gate and up global scales of one layer.

    Attributes:
        differing: experts whose two scales differ.
        worst_ratio: largest ratio of the larger to the smaller.
        reconciled: experts whose block scales were rescaled, with the side (``gate`` or ``up``), in the experts' order.
        figures: what that cost: see :class:`~nvfp4_prep.moe.gate_up_scales.Reconciled`, and ``relative_error`` of the
            differing experts' dequantized gate and up weights under each policy.
    """

    differing: int
    worst_ratio: float
    reconciled: tuple[tuple[int, str], ...]
    figures: Mapping[str, Any]

    @property
    def reconciled_experts(self) -> tuple[int, ...]:
        """The numbers of the experts whose block scales were rescaled."""
        return tuple(expert for expert, _ in self.reconciled)


@dataclass(frozen=True)
class LayerRecord(LayerWithLayout):
    """One prepared layer.

    Attributes:
        source: the layer in the source; its groups have no records.
        layout: the prepared side.
        activation: of the experts.
        files: the files that hold the four big tensors.
        gate_up: see :class:`GateUpRecord`.
        source_sha256: by group key, the digest of the source tensors' bytes in the order of the experts.
        expert_crc32: for each of the four tensors, one CRC-32 for each expert's stored bytes.
    """

    source: MoeLayer = field(repr=False)
    layout: MoeLayout
    activation: Activation
    files: tuple[str, ...]
    gate_up: GateUpRecord = field(repr=False)
    source_sha256: Mapping[str, str] = field(repr=False)
    expert_crc32: Mapping[str, tuple[int, ...]] = field(repr=False)

    @property
    def tp_sizes(self) -> tuple[int, ...]:
        """Tensor-parallel sizes that this layer serves bit-exactly."""
        return self.layout.tp_sizes(self.dims)

    def check_stored(self, tensor: str, record: TensorRecord, directory: Path) -> None:
        """Check one of :meth:`stored_tensors`.

        Args:
            tensor: its short name.
            record: its place in the file.
            directory: of the checkpoint, for the message.

        Raises:
            CheckpointError: if it has another dtype or shape than this record says.
        """
        wanted = self.stored_tensors()[tensor]
        if (record.dtype, record.shape) != (wanted.dtype, wanted.shape):
            raise CheckpointError(
                f"tensor {record.name!r} has the wrong dtype or shape",
                where=str(directory / record.file),
                expected=f"{wanted.dtype} {list(wanted.shape)}",
                actual=f"{record.dtype} {list(record.shape)}",
                next_step=renewal(record.file),
            )


def layer_to_dict(record: LayerRecord) -> dict[str, Any]:
    """Return the JSON value of a layer."""
    layer, layout = record.source, record.layout
    return {
        "layer": layer.index,
        "experts_path": layer.experts_path,
        "files": list(record.files),
        "experts": layer.dims.experts,
        "intermediate": layer.dims.intermediate,
        "hidden": layer.dims.hidden,
        "padded_intermediate": layout.padded_intermediate(layer.dims.intermediate),
        "padded_hidden": layout.padded_hidden(layer.dims.hidden),
        "gated": layer.gated,
        "activation": {
            "kind": record.activation.kind.value,
            "spelled": record.activation.spelled,
            "clamp": record.activation.clamp,
        },
        "tp_sizes": list(record.tp_sizes),
        "format": layer.format,
        "naming": layer.naming,
        "source_tensors": [_group_to_dict(group, record.source_sha256[group.key]) for group in layer.groups],
        "gate_up_scales": {
            "differing": record.gate_up.differing,
            "worst_ratio": record.gate_up.worst_ratio,
            "reconciled": [list(pair) for pair in record.gate_up.reconciled],
            "figures": dict(record.gate_up.figures),
        },
        "expert_crc32": {name: list(values) for name, values in record.expert_crc32.items()},
    }


def _group_to_dict(group: TensorGroup, digest: str) -> dict[str, Any]:
    return {
        "head": group.head,
        "tail": group.tail,
        "leaf": group.leaf.value,
        "projections": [projection.value for projection in group.projections],
        "dtype": group.dtype,
        "shape": list(group.shape),
        "stacked": group.stacked,
        "transposed": group.transposed,
        "alternating": group.alternating,
        "sha256": digest,
    }


def layer_from_dict(value: Mapping[str, Any], options: ConvertOptions) -> LayerRecord:
    """Return the record of a layer's JSON value; raise ``ValueError``, ``KeyError`` or :class:`LayoutError` for
    anything that cannot be worked with. Unknown keys are ignored."""
    dims = MoeDims(*(whole(value[key], key, 1, 2**40) for key in ("experts", "intermediate", "hidden")))
    groups = tuple(_group_from_dict(group) for group in items(value["source_tensors"], "source_tensors"))
    gated = flag(value["gated"], "gated")
    layout = options.layout_for(gated=gated)
    layout.check(dims)
    layer = MoeLayer(
        experts_path=text(value["experts_path"], "experts_path"),
        index=whole(value["layer"], "layer"),
        dims=dims,
        gated=gated,
        format=text(value["format"], "format"),
        naming=text(value["naming"], "naming"),
        groups=groups,
    )
    layer.experts_path.encode("utf-8")  # tensors are named by it
    check_groups(layer)
    gate_up = _gate_up_from_dict(value["gate_up_scales"])
    check_gate_up(gate_up.reconciled, gate_up.figures, layer)
    return LayerRecord(
        source=layer,
        layout=layout,
        activation=_activation_from_dict(value["activation"]),
        files=tuple(file_name(name) for name in items(value["files"], "files")),
        gate_up=gate_up,
        source_sha256={
            group.key: sha256(item["sha256"], f"sha256 of {group.key}")
            for group, item in zip(groups, value["source_tensors"], strict=True)
        },
        expert_crc32=_crc32_from_dict(value["expert_crc32"], dims.experts),
    )


def _group_from_dict(value: Mapping[str, Any]) -> TensorGroup:
    return TensorGroup(
        head=text(value["head"], "head"),
        tail=text(value["tail"], "tail"),
        leaf=Leaf(value["leaf"]),
        projections=tuple(Projection(projection) for projection in items(value["projections"], "projections")),
        dtype=text(value["dtype"], "dtype"),
        shape=tuple(whole(size, "shape") for size in items(value["shape"], "shape")),
        stacked=flag(value["stacked"], "stacked"),
        transposed=flag(value["transposed"], "transposed"),
        alternating=flag(value["alternating"], "alternating"),
    )


def _crc32_from_dict(value: Mapping[str, Any], experts: int) -> dict[str, tuple[int, ...]]:
    known = [tensor.value for tensor in PreparedTensor]
    lists = {name: items(value[name], f"expert_crc32 of {name}") for name in known if name in value}
    found = {
        name: tuple(whole(crc32, f"expert_crc32 of {name}", 0, _MAX_CRC32) for crc32 in numbers)
        for name, numbers in lists.items()
    }
    check_expert_crc32(found, experts)
    return found


def _activation_from_dict(value: Mapping[str, Any]) -> Activation:
    clamp = value["clamp"]
    return Activation(
        ActivationKind(value["kind"]),
        text(value["spelled"], "spelled"),
        None if clamp is None else number(clamp, "clamp"),
    )


def _gate_up_from_dict(value: Mapping[str, Any]) -> GateUpRecord:
    return GateUpRecord(
        differing=whole(value["differing"], "differing"),
        worst_ratio=number(value["worst_ratio"], "worst_ratio"),
        reconciled=tuple(
            (whole(expert, "reconciled"), str(Projection(side)))
            for expert, side in items(value["reconciled"], "reconciled")
        ),
        figures=dict(mapping(value["figures"], "figures")),
    )
