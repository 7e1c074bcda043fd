"""Discovery of the MoE layers of an index, in canonical form, with the reason for each one that is not prepared.

Classification goes by the tensors that are there: names, dtypes and shapes. Three outcomes for a layer: it is prepared;
it passes through unchanged because it is of another kind (bf16, FP8, MXFP4, weight-only), which is how mixed-precision
checkpoints and MTP layers look; or it is refused because it looks like NVFP4 and is damaged or has parts that the
kernel cannot compute.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from nvfp4_prep._util.text import bounded, first_of
from nvfp4_prep.checkpoint.tensors import TensorRecord
from nvfp4_prep.formats import ExpertNaming, ExpertTensorName, Leaf, QuantFormat
from nvfp4_prep.moe.activation import Activation
from nvfp4_prep.moe.layers import MoeLayer, TensorGroup
from nvfp4_prep.moe.other_kinds import check_one_kind, other_kind, unknown_nvfp4, unknown_paths
from nvfp4_prep.moe.validation import (
    NotPrepared,
    check_complete,
    check_foreign,
    check_numbers,
    check_spelled_once,
    find_dims,
    is_transposed,
    refuse,
)
from nvfp4_prep_kernels import Projection

__all__ = ["FoundLayers", "LayerFinding", "find_layers"]


@dataclass(frozen=True)
class LayerFinding:
    """The reason why a layer is not prepared.

    Attributes:
        experts_path: module path of the layer's experts.
        kind: short class of the reason, e.g. ``bf16`` or ``incomplete``.
        reason: what was found.
        instead: what would work.
        refused: the layer must not be converted at all; otherwise it passes through.
    """

    experts_path: str
    kind: str
    reason: str
    instead: str
    refused: bool

    def __post_init__(self) -> None:
        object.__setattr__(self, "reason", bounded(self.reason, 2_000))


@dataclass(frozen=True)
class FoundLayers:
    """All MoE layers of a checkpoint.

    Attributes:
        layers: those to prepare, in the order of their numbers.
        others: the others, with reasons.
        activations: of the layers to prepare, by the path of their experts; filled once the config was looked at.
        warnings: what the config says against the tensors, and does not keep the layers from being prepared.
    """

    layers: tuple[MoeLayer, ...]
    others: tuple[LayerFinding, ...]
    activations: Mapping[str, Activation] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def refused(self) -> tuple[LayerFinding, ...]:
        """Findings that forbid a conversion."""
        return tuple(finding for finding in self.others if finding.refused)

    @property
    def passed(self) -> tuple[LayerFinding, ...]:
        """Layers that pass through unchanged."""
        return tuple(finding for finding in self.others if not finding.refused)


_Tensors = list[tuple[ExpertTensorName, TensorRecord]]


def find_layers(
    tensors: Mapping[str, TensorRecord],
    namings: Sequence[ExpertNaming],
    formats: Mapping[str, QuantFormat],
    *,
    alternating: bool | None = False,
) -> FoundLayers:
    """Classify every MoE layer.

    Args:
        tensors: the index, by name.
        namings: asked in this order; the first that understands a name wins.
        formats: known formats by name.
        alternating: whether gate and up rows of fused tensors alternate, where the naming does not say; ``None`` if
            that is not known (:func:`nvfp4_prep.moe.activation.alternating_stacks`).
    """
    by_layer: dict[tuple[str, str], _Tensors] = defaultdict(list)
    strangers = []
    for name, record in tensors.items():
        for naming in namings:
            parsed = naming.parse(name)
            if parsed is not None:
                by_layer[(parsed.experts, naming.name)].append((parsed, record))
                break
        else:
            strangers.append(record)
    layers: dict[str, MoeLayer] = {}
    unknown = unknown_paths(strangers)
    others = [_finding(path, unknown_nvfp4(unknown[path])) for path in sorted(unknown)]
    for position, ((path, naming_name), members) in enumerate(sorted(by_layer.items(), key=lambda item: item[0])):
        try:
            layer = _layer(path, naming_name, members, formats, _layer_number(path, position), alternating)
            if path in layers:
                raise refuse(
                    "ambiguous",
                    f"experts are there twice, named {layers[path].naming} and {naming_name}",
                    "Remove one of the two.",
                )
            layers[path] = layer
        except NotPrepared as why:
            others.append(_finding(path, why))
    spelled = [(path, members[0][1].name) for (path, _), members in sorted(by_layer.items(), key=lambda item: item[0])]
    spelled += [(path, records[0].name) for path, records in unknown.items()]
    others = _say_mixed_spellings(others, spelled, layers.keys())
    return FoundLayers(
        tuple(sorted(layers.values(), key=lambda layer: (layer.index, layer.experts_path))), tuple(others)
    )


def _finding(path: str, why: NotPrepared) -> LayerFinding:
    return LayerFinding(path, why.kind, why.reason, why.instead, why.refused)


def _say_mixed_spellings(
    findings: list[LayerFinding], spelled: Sequence[tuple[str, str]], whole: Collection[str]
) -> list[LayerFinding]:
    """Say once, of experts of one path that are spelled in several ways, why each part looks damaged.

    A part of another kind beside a whole layer makes a mixed layer, of which nothing may pass through.

    Args:
        findings: as the parts by themselves gave them.
        spelled: path and one tensor's name of each part.
        whole: paths with a part that is a whole layer.
    """
    names: dict[str, list[str]] = defaultdict(list)
    for path, name in spelled:
        names[path].append(name)
    found: dict[tuple[str, str], LayerFinding] = {}
    for finding in findings:
        path, kind = finding.experts_path, finding.kind
        if finding.refused and len(names[path]) > 1 and kind in ("incomplete", "misnumbered"):
            why = refuse(
                "ambiguous",
                f"experts are spelled in different ways: {' and '.join(names[path])}",
                "All experts of a layer must be named alike: rename them.",
            )
            finding = _finding(path, why)
        elif not finding.refused and path in whole:
            reason = (
                f"experts are there twice: NVFP4, and under other names {finding.reason.removeprefix('experts are ')}"
            )
            finding = _finding(path, refuse("mixed", reason, "Remove one of the two."))
        found.setdefault((finding.experts_path, finding.kind), finding)
    return list(found.values())


def _layer_number(path: str, fallback: int) -> int:
    numbers = re.findall(r"(?:^|\.)layers\.([0-9]{1,6})(?=\.|$)", path) or re.findall(r"\.([0-9]{1,6})(?=\.)", path)
    return int(numbers[-1]) if numbers else fallback


def _layer(
    path: str,
    naming: str,
    members: _Tensors,
    formats: Mapping[str, QuantFormat],
    index: int,
    alternating: bool | None,
) -> MoeLayer:
    format_ = _format_of(members, formats)
    check_one_kind(members, format_, formats)
    by_role: dict[tuple[tuple[Projection, ...], Leaf], _Tensors] = defaultdict(list)
    foreign = []
    for parsed, record in members:
        leaf = format_.leaves.get(parsed.leaf)
        if leaf is None:
            foreign.append((parsed.leaf, record.name))
        else:
            by_role[(parsed.projections, leaf)].append((parsed, record))
    check_foreign(foreign)
    experts = _count_experts(members)
    groups = [
        _group(leaf, entries, alternating)
        for (_, leaf), entries in sorted(by_role.items(), key=lambda item: _role_order(item[0]))
    ]
    check_spelled_once(groups)
    gated = any(Projection.GATE in group.projections for group in groups)
    check_complete(groups, gated, experts, format_)
    groups = [replace(group, transposed=is_transposed(group, groups)) for group in groups]
    return MoeLayer(path, index, find_dims(groups, experts), gated, format_.name, naming, tuple(groups))


def _role_order(role: tuple[tuple[Projection, ...], Leaf]) -> tuple[int, int]:
    projections, leaf = role
    return list(Projection).index(projections[0]), list(Leaf).index(leaf)


def _format_of(members: _Tensors, formats: Mapping[str, QuantFormat]) -> QuantFormat:
    """Return the format of a layer by its leaves and their dtypes; else the reason why the layer is of another kind."""
    dtypes = {(parsed.leaf, record.dtype) for parsed, record in members}
    spelled = {leaf for leaf, _ in dtypes}
    for format_ in formats.values():
        of = {leaf: spelling for spelling, leaf in format_.leaves.items()}
        # Without a global scale, e2m1 codes with e4m3 block scales are still NVFP4: an incomplete one.
        damaged = {(of[Leaf.CODES], "U8"), (of[Leaf.BLOCK_SCALE], "F8_E4M3")} <= dtypes
        if of[Leaf.GLOBAL_SCALE] in spelled or damaged:
            return format_
    raise other_kind(spelled, [record for _, record in members])


def _group(leaf: Leaf, entries: _Tensors, alternating: bool | None) -> TensorGroup:
    stacks = [entry for entry in entries if entry[0].expert is None]
    if stacks and (len(entries) > 1):
        raise refuse("ambiguous", f"{stacks[0][1].name} is mixed with per-expert tensors", "Remove one of them.")
    entries.sort(key=lambda entry: entry[0].expert or 0)
    parsed, first = entries[0]
    odd = next((record for _, record in entries if (record.dtype, record.shape) != (first.dtype, first.shape)), None)
    if odd is not None:
        raise refuse(
            f"different {'dtypes' if odd.dtype != first.dtype else 'shapes'}",
            f"{odd.name} is {odd.dtype} {list(odd.shape)}, {first.name} is {first.dtype} {list(first.shape)}",
            "All experts of a layer must have one shape and dtype: quantize the layer as a whole.",
        )
    head, tail = (first.name, "") if parsed.expert is None else _split_name(parsed, first.name)
    group = TensorGroup(
        head=head,
        tail=tail,
        leaf=leaf,
        projections=parsed.projections,
        dtype=first.dtype,
        shape=first.shape,
        stacked=parsed.expert is None,
        alternating=_alternates(parsed, leaf, first.name, alternating),
        records=tuple(record for _, record in entries),
    )
    check_numbers(group, [parsed.expert for parsed, _ in entries])
    return group


def _split_name(parsed: ExpertTensorName, name: str) -> tuple[str, str]:
    """Return what stands before and after the expert's number."""
    number = f".{parsed.expert}."
    at = len(parsed.experts) if name.startswith(parsed.experts + number) else name.rfind(number)
    if at < 0:
        raise refuse(
            "naming",
            f"{name} does not hold its expert's number {parsed.expert} between dots",
            "Correct the plugin that provides this naming.",
        )
    return name[: at + 1], name[at + len(number) - 1 :]


def _alternates(parsed: ExpertTensorName, leaf: Leaf, name: str, default: bool | None) -> bool:
    if leaf.is_scalar or len(parsed.projections) == 1:
        return False
    decided = default if parsed.alternating is None else parsed.alternating
    if decided is None:
        raise refuse(
            "row order",
            f"{name} holds gate and up of a SWIGLUOAI model that is not known: their rows may alternate or not",
            "Write a small naming plugin that says which (docs/adding-a-format.md).",
        )
    return decided


def _count_experts(members: _Tensors) -> int:
    numbers = {parsed.expert for parsed, _ in members if parsed.expert is not None}
    if not numbers:
        return max((record.shape[0] for _, record in members if len(record.shape) == 3), default=0)
    experts = max(numbers) + 1
    if len(numbers) != experts:
        missing = sorted(set(range(experts)) - numbers)
        raise refuse(
            "misnumbered",
            f"experts are not numbered 0 to {experts - 1}: {first_of(missing, 8)} missing",
            "Is the checkpoint complete?",
        )
    return experts
