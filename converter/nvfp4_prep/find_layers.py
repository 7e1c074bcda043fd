"""Finds the MoE layers of an index, makes them canonical, and says of each other one why it is not prepared.

Classification goes by the tensors that are there: names, dtypes and shapes. Three outcomes for a layer: it is prepared;
it passes through unchanged because it is of another kind (bf16, FP8, MXFP4, weight-only), which is how mixed-precision
checkpoints and MTP layers look; or it is refused because it looks like NVFP4 and is damaged or has parts that the
kernel cannot compute.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nvfp4_prep.formats import ExpertNaming, ExpertTensorName, Leaf, QuantFormat
from nvfp4_prep.moe_layers import MoeLayer, TensorGroup
from nvfp4_prep.safetensors_io import TensorRecord
from nvfp4_prep_kernels import BLOCK_COLS, MoeDims, Projection

__all__ = ["FoundLayers", "LayerFinding", "find_layers"]

_FLOATS = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}
_FP8 = {"F8_E4M3", "F8_E5M2"}


@dataclass(frozen=True)
class LayerFinding:
    """Why a layer is not prepared.

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


@dataclass(frozen=True)
class FoundLayers:
    """All MoE layers of a checkpoint: those to prepare in the order of their numbers, and the others with reasons."""

    layers: tuple[MoeLayer, ...]
    others: tuple[LayerFinding, ...]

    @property
    def refused(self) -> tuple[LayerFinding, ...]:
        """Findings that forbid a conversion."""
        return tuple(finding for finding in self.others if finding.refused)

    @property
    def passed(self) -> tuple[LayerFinding, ...]:
        """Layers that pass through unchanged."""
        return tuple(finding for finding in self.others if not finding.refused)


class _NotPrepared(Exception):
    def __init__(self, kind: str, reason: str, instead: str, *, refused: bool) -> None:
        super().__init__(reason)
        self.kind, self.reason, self.instead, self.refused = kind, reason, instead, refused


def _refuse(kind: str, reason: str, instead: str) -> _NotPrepared:
    return _NotPrepared(kind, reason, instead, refused=True)


def _pass(kind: str, reason: str) -> _NotPrepared:
    return _NotPrepared(kind, reason, "It passes through unchanged.", refused=False)


_Tensors = list[tuple[ExpertTensorName, TensorRecord]]


def find_layers(
    tensors: Mapping[str, TensorRecord], namings: Sequence[ExpertNaming], formats: Mapping[str, QuantFormat]
) -> FoundLayers:
    """Classifies every MoE layer.

    Args:
        tensors: the index, by name.
        namings: asked in this order; the first that understands a name wins.
        formats: known formats by name.
    """
    by_layer: dict[tuple[str, str], _Tensors] = defaultdict(list)
    for name, record in tensors.items():
        for naming in namings:
            parsed = naming.parse(name)
            if parsed is not None:
                by_layer[(parsed.experts, naming.name)].append((parsed, record))
                break
    layers, others = [], []
    for position, ((path, naming_name), members) in enumerate(sorted(by_layer.items(), key=lambda item: item[0])):
        try:
            layers.append(_layer(path, naming_name, members, formats, _layer_number(path, position)))
        except _NotPrepared as why:
            others.append(LayerFinding(path, why.kind, why.reason, why.instead, why.refused))
    layers.sort(key=lambda layer: (layer.index, layer.experts_path))
    return FoundLayers(tuple(layers), tuple(others))


def _layer_number(path: str, fallback: int) -> int:
    numbers = re.findall(r"(?:^|\.)layers\.([0-9]{1,6})(?=\.|$)", path) or re.findall(r"\.([0-9]{1,6})(?=\.)", path)
    return int(numbers[-1]) if numbers else fallback


def _layer(path: str, naming: str, members: _Tensors, formats: Mapping[str, QuantFormat], index: int) -> MoeLayer:
    format_ = _format_of(members, formats)
    by_role: dict[tuple[tuple[Projection, ...], Leaf], _Tensors] = defaultdict(list)
    foreign = []
    for parsed, record in members:
        leaf = format_.leaves.get(parsed.leaf)
        if leaf is None:
            foreign.append(record.name)
        else:
            by_role[(parsed.projections, leaf)].append((parsed, record))
    _check_foreign(foreign)
    groups = tuple(
        _group(leaf, entries) for (_, leaf), entries in sorted(by_role.items(), key=lambda item: _role_order(item[0]))
    )
    gated = any(Projection.GATE in group.projections for group in groups)
    experts = _count_experts(members)
    _check_complete(groups, members, gated, experts, format_)
    dims = _dims(groups, experts)
    return MoeLayer(path, index, dims, gated, format_.name, naming, groups)


def _role_order(role: tuple[tuple[Projection, ...], Leaf]) -> tuple[int, int]:
    projections, leaf = role
    return list(Projection).index(projections[0]), list(Leaf).index(leaf)


def _format_of(members: _Tensors, formats: Mapping[str, QuantFormat]) -> QuantFormat:
    """The format whose global-scale spelling occurs; else the reason why the layer is of another kind."""
    spelled = {parsed.leaf for parsed, _ in members}
    for format_ in formats.values():
        if any(leaf is Leaf.GLOBAL_SCALE and spelling in spelled for spelling, leaf in format_.leaves.items()):
            return format_
    dtypes = {record.dtype for _, record in members if len(record.shape) >= 2}
    if dtypes and dtypes <= set(_FLOATS):
        raise _pass(_FLOATS[min(dtypes)], f"experts are {', '.join(sorted(_FLOATS[dtype] for dtype in dtypes))}")
    if dtypes & _FP8 and "U8" not in dtypes:
        raise _pass("fp8", "experts are FP8")
    if "F8_E8M0" in dtypes or dtypes == {"U8"} or any("blocks" in spelling for spelling in spelled):
        raise _pass("mxfp4", "experts are MXFP4 (e8m0 scales of 32, no global scale)")
    raise _pass("unknown", f"experts are of an unknown kind (leaves {', '.join(sorted(spelled))[:200]})")


def _check_foreign(foreign: list[str]) -> None:
    if not foreign:
        return
    some = ", ".join(sorted(foreign)[:3])
    if any("bias" in name for name in foreign):
        raise _refuse(
            "bias",
            f"experts have biases ({some})",
            "The kernel adds no bias: serve the source with another backend.",
        )
    raise _refuse(
        "unexpected tensors",
        f"{len(foreign)} expert tensors have no place in the prepared layout ({some})",
        "Serve the source as it is, or add a format (docs/adding-a-format.md).",
    )


def _group(leaf: Leaf, entries: _Tensors) -> TensorGroup:
    stacks = [entry for entry in entries if entry[0].expert is None]
    if stacks and (len(entries) > 1):
        raise _refuse("ambiguous", f"{stacks[0][1].name} stands beside per-expert tensors", "Remove one of them.")
    entries.sort(key=lambda entry: entry[0].expert or 0)
    parsed, first = entries[0]
    records = tuple(record for _, record in entries)
    odd = next((record for record in records if (record.dtype, record.shape) != (first.dtype, first.shape)), None)
    if odd is not None:
        mixed = {record.dtype for record in records}
        what = "dtypes" if len(mixed) > 1 else "shapes"
        raise _refuse(
            f"different {what}",
            f"{odd.name} is {odd.dtype} {list(odd.shape)}, {first.name} is {first.dtype} {list(first.shape)}",
            "All experts of a layer must have one shape and dtype: quantize the layer as a whole.",
        )
    if parsed.expert is None:
        head, tail = first.name, ""
    else:
        number = f".{parsed.expert}."
        cut = len(parsed.experts) if first.name.startswith(parsed.experts + number) else first.name.rindex(number)
        head, tail = first.name[: cut + 1], first.name[cut + len(number) - 1 :]
    return TensorGroup(
        head=head,
        tail=tail,
        leaf=leaf,
        projections=parsed.projections,
        dtype=first.dtype,
        shape=first.shape,
        stacked=parsed.expert is None,
        transposed=parsed.transposed and not leaf.is_scalar,
        alternating=parsed.alternating and not leaf.is_scalar,
        records=records,
    )


def _count_experts(members: _Tensors) -> int:
    numbers = {parsed.expert for parsed, _ in members if parsed.expert is not None}
    if not numbers:
        return max((record.shape[0] for _, record in members if len(record.shape) == 3), default=0)
    experts = max(numbers) + 1
    if len(numbers) != experts:
        missing = sorted(set(range(experts)) - numbers)
        raise _refuse(
            "misnumbered",
            f"experts are not numbered 0 to {experts - 1}: {', '.join(map(str, missing[:8]))}"
            f"{' …' if len(missing) > 8 else ''} missing",
            "Is the checkpoint complete?",
        )
    return experts


def _check_complete(
    groups: tuple[TensorGroup, ...], members: _Tensors, gated: bool, experts: int, format_: QuantFormat
) -> None:
    """Every projection of every expert has its four leaves."""
    wanted = (Projection.GATE, Projection.UP, Projection.DOWN) if gated else (Projection.UP, Projection.DOWN)
    have = {(projection, group.leaf): group for group in groups for projection in group.projections}
    present = {leaf for _, leaf in have}
    if Leaf.INPUT_SCALE not in present:
        raise _pass("w4a16", "experts are weight-only NVFP4 (W4A16: no input scales); the kernel quantizes activations")
    missing: list[str] = []
    for projection in wanted:
        for leaf in Leaf:
            group = have.get((projection, leaf))
            if group is None:
                missing.append(f"{projection.value} projection's {_spelling(format_, leaf)} of every expert")
            elif not group.stacked and len(group.records) != experts:
                there = {record.name for record in group.records}
                missing += [group.name(expert) for expert in range(experts) if group.name(expert) not in there]
    if missing:
        raise _refuse(
            "incomplete",
            f"{len(missing)} expert tensors are missing: {', '.join(missing[:4])}{' …' if len(missing) > 4 else ''}",
            "Complete the download, or quantize again.",
        )
    if experts < 1 or len(members) < len(groups):
        raise _refuse("incomplete", "no experts found", "Complete the download, or quantize again.")


def _spelling(format_: QuantFormat, leaf: Leaf) -> str:
    return next(spelling or "codes" for spelling, meaning in format_.leaves.items() if meaning is leaf)


def _dims(groups: tuple[TensorGroup, ...], experts: int) -> MoeDims:
    """E, I and H from the codes' shapes; every other matrix must agree."""
    sizes = {
        projection: _matrix_size(group, experts)
        for group in groups
        if group.leaf is Leaf.CODES
        for projection in group.projections
    }
    hidden, intermediate = sizes[Projection.DOWN]
    dims = MoeDims(experts, intermediate, hidden)
    for group in groups:
        if group.leaf.is_scalar:
            _check_scalar(group, experts)
            continue
        _check_dtype(group)
        size = _matrix_size(group, experts)
        want = (hidden, intermediate) if group.projections == (Projection.DOWN,) else (intermediate, hidden)
        if size != want:
            raise _refuse(
                "different shapes",
                f"{group.name(0)} {list(group.shape)} is a {size[0]} x {size[1]} matrix where the down projection's"
                f" codes ask for {want[0]} x {want[1]}",
                "Gate, up and down of one expert must fit each other.",
            )
    return dims


def _matrix_size(group: TensorGroup, experts: int) -> tuple[int, int]:
    """Rows and columns (in weights, not bytes) of one projection."""
    shape = group.shape
    if len(shape) != (3 if group.stacked else 2) or (group.stacked and shape[0] != experts):
        raise _refuse("different shapes", f"{group.name(0)} has shape {list(shape)}", "Expected one matrix an expert.")
    rows, cols = shape[:-3:-1] if group.transposed else shape[-2:]
    per_byte = BLOCK_COLS if group.leaf is Leaf.BLOCK_SCALE else 2
    if rows % len(group.projections):
        raise _refuse("different shapes", f"{group.name(0)} {list(shape)} is not gate and up", "Expected 2*I rows.")
    return rows // len(group.projections), cols * per_byte


def _check_dtype(group: TensorGroup) -> None:
    want = "F8_E4M3" if group.leaf is Leaf.BLOCK_SCALE else "U8"
    if group.dtype != want:
        raise _refuse(
            "dtype", f"{group.name(0)} is {group.dtype}, NVFP4 has {want}", "Only NVFP4 experts can be prepared."
        )


def _check_scalar(group: TensorGroup, experts: int) -> None:
    count = 1
    for size in group.shape:
        count *= size
    fits = count in ({1, experts} if group.stacked else {1})
    if group.dtype != "F32" or not fits:
        raise _refuse(
            "scalar",
            f"{group.name(0)} is {group.dtype} {list(group.shape)}",
            "Expected one float32 for each expert.",
        )
