"""Checks that a group of expert tensors is an NVFP4 layer that the layout can hold.

Each check raises :class:`NotPrepared` with what was found and what would work; :mod:`nvfp4_prep.moe.discovery` turns it
into a finding.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from nvfp4_prep._util.text import count, first_of
from nvfp4_prep.formats import Leaf, QuantFormat
from nvfp4_prep.moe.layers import TensorGroup
from nvfp4_prep_kernels import BLOCK_COLS, MoeDims, PreparedTensor, Projection

__all__ = [
    "NotPrepared",
    "check_complete",
    "check_foreign",
    "check_numbers",
    "check_spelled_once",
    "find_dims",
    "is_transposed",
    "pass_through",
    "quark",
    "refuse",
]


class NotPrepared(Exception):
    """The reason why a layer is not prepared; see :class:`~nvfp4_prep.moe.discovery.LayerFinding`."""

    def __init__(self, kind: str, reason: str, instead: str, *, refused: bool) -> None:
        super().__init__(reason)
        self.kind, self.reason, self.instead, self.refused = kind, reason, instead, refused


def refuse(kind: str, reason: str, instead: str) -> NotPrepared:
    """Return the refusal of a layer that must not be converted, nor its checkpoint."""
    return NotPrepared(kind, reason, instead, refused=True)


def pass_through(kind: str, reason: str, instead: str) -> NotPrepared:
    """Return the finding of a layer of another kind, which passes through unchanged."""
    return NotPrepared(kind, reason, instead, refused=False)


def check_foreign(foreign: Collection[tuple[str, str]]) -> None:
    """Refuse tensors (leaf, name) that the prepared layout has no place for."""
    if not foreign:
        return
    names = sorted(name for _, name in foreign)
    some = first_of(names)
    leaves = {leaf for leaf, _ in foreign}
    if any(leaf == "bias" or leaf.endswith(("_bias", ".bias")) for leaf in leaves):
        raise refuse(
            "bias",
            f"experts have biases ({some}), which the kernel does not add",
            "vLLM has no NVFP4 path for such experts (gpt-oss): serve the model's MXFP4 checkpoint.",
        )
    if "input_scale_2" in leaves:
        raise quark(names[0])
    raise refuse(
        "unexpected tensors",
        f"{count(len(foreign), 'expert tensor')} {'has' if len(foreign) == 1 else 'have'} no place"
        f" in the prepared layout ({some})",
        "Serve the source as it is, or add a format (docs/adding-a-format.md).",
    )


def quark(found: str) -> NotPrepared:
    """Refuse AMD Quark's NVFP4: vLLM 0.33 computes nothing with this kernel that a prepared file could be equal to.

    Its QuarkNvfp4MoEMethod never lets the CuteDSL experts multiply the activation scales into their alphas (they would
    look for ``w13_input_scale``; Quark's layers have ``w13_input_scale_2``), and its loader keeps whichever of gate's
    and up's input scale comes last for both.
    """
    return refuse(
        "quark",
        f"experts are AMD Quark NVFP4 ({found}), which cannot be prepared: vLLM 0.33 leaves Quark's activation scales"
        " out of this kernel's alphas",
        "Serve the source as it is with another MoE backend, or quantize with ModelOpt or llm-compressor"
        " (docs/supported-models.md).",
    )


def check_spelled_once(groups: Sequence[TensorGroup]) -> None:
    """Refuse a leaf of a projection that stands in two groups of tensors: alone, and fused with another projection."""
    have: dict[tuple[Projection, Leaf], TensorGroup] = {}
    for group in groups:
        for projection in group.projections:
            first = have.setdefault((projection, group.leaf), group)
            if first is not group:
                raise refuse(
                    "ambiguous",
                    f"{projection.value} is in both {first.records[0].name} and {group.records[0].name}",
                    "All experts of a layer must be named alike, each tensor once.",
                )


def check_numbers(group: TensorGroup, experts: list[int | None]) -> None:
    """Refuse names that :meth:`TensorGroup.name` would not give back: two spellings in one layer, a tensor twice."""
    if group.stacked:
        return
    for expert, record in zip(experts, group.records, strict=True):
        if expert is None or record.name != group.name(expert):
            raise refuse(
                "ambiguous",
                f"{record.name} is spelled differently from {group.records[0].name}",
                "All experts of a layer must be named alike, each tensor once.",
            )


def check_complete(groups: Sequence[TensorGroup], gated: bool, experts: int, format_: QuantFormat) -> None:
    """Check that every projection of every expert has its four leaves, and name those that are missing.

    A layer without any input scale is not damaged: it is weight-only NVFP4 and passes through.
    """
    wanted = (Projection.GATE, Projection.UP, Projection.DOWN) if gated else (Projection.UP, Projection.DOWN)
    have = {(projection, group.leaf): group for group in groups for projection in group.projections}
    if all(leaf is not Leaf.INPUT_SCALE for _, leaf in have):
        raise pass_through(
            "w4a16",
            "experts are weight-only NVFP4 (W4A16: no input scales), but the kernel quantizes activations too",
            "Serve the source as it is, or quantize the model again with activations (W4A4).",
        )
    missing: list[str] = []
    lacking: set[Leaf] = set()
    for projection in wanted:
        for leaf in Leaf:
            group = have.get((projection, leaf))
            before = len(missing)
            if group is None:
                spelling = next(spelling for spelling, meaning in format_.leaves.items() if meaning is leaf)
                missing.append(f"{projection.value} projection's {spelling} of every expert")
            elif not group.stacked and len(group.records) != experts:
                there = {record.name for record in group.records}
                missing += [group.name(expert) for expert in range(experts) if group.name(expert) not in there]
            if len(missing) > before:
                lacking.add(leaf)
    if missing:
        # A quantizer writes no input scale for an expert that it saw no tokens for.
        calibrate = "calibrate with more tokens and " if lacking == {Leaf.INPUT_SCALE} else ""
        raise refuse(
            "incomplete",
            f"{count(len(missing), 'expert tensor')} {'is' if len(missing) == 1 else 'are'} missing: "
            + first_of(missing, 4),
            f"Complete the download, or {calibrate}quantize again.",
        )


def is_transposed(group: TensorGroup, groups: Sequence[TensorGroup]) -> bool:
    """Return whether a stack holds ``[E, in, out]`` instead of ``[E, out, in]``, from its codes and block scales.

    One block scale serves 16 weights, 8 bytes of codes, along the input dimension; the output dimension is the same.
    """
    if group.leaf.is_scalar or not group.stacked:
        return False
    shapes = [
        next(other.shape for other in groups if other.leaf is leaf and other.projections == group.projections)
        for leaf in (Leaf.CODES, Leaf.BLOCK_SCALE)
        if any(other.leaf is leaf and other.projections == group.projections for other in groups)
    ]
    if len(shapes) == 2 and len(shapes[0]) == len(shapes[1]) == 3:
        (_, *codes), (_, *scales) = shapes
        if codes[0] == 8 * scales[0] and codes[1] == scales[1]:
            return True
        if codes[0] == scales[0] and codes[1] == 8 * scales[1]:
            return False
    raise refuse(
        "different shapes",
        f"{group.name(0)} {list(group.shape)}: codes and block scales do not fit each other",
        "Expected one block scale for 16 weights along the input dimension.",
    )


def find_dims(groups: Sequence[TensorGroup], experts: int) -> MoeDims:
    """Return E, I and H from the codes' shapes; every other matrix must agree."""
    hidden, intermediate = next(
        _matrix_size(group, experts)
        for group in groups
        if group.leaf is Leaf.CODES and group.projections == (Projection.DOWN,)
    )
    for group in groups:
        if group.leaf.is_scalar:
            _check_scalar(group, experts)
            continue
        _check_dtype(group)
        size = _matrix_size(group, experts)
        want = (hidden, intermediate) if group.projections == (Projection.DOWN,) else (intermediate, hidden)
        if size != want:
            raise refuse(
                "different shapes",
                f"{group.name(0)} {list(group.shape)} is a {size[0]} x {size[1]} matrix where the down projection's"
                f" codes ask for {want[0]} x {want[1]}",
                "Gate, up and down of one expert must fit each other.",
            )
    return MoeDims(experts, intermediate, hidden)


def _matrix_size(group: TensorGroup, experts: int) -> tuple[int, int]:
    """Return the rows and columns (in weights, not bytes) of one projection."""
    shape = group.shape
    if len(shape) != (3 if group.stacked else 2) or (group.stacked and shape[0] != experts):
        raise refuse("different shapes", f"{group.name(0)} has shape {list(shape)}", "Expected one matrix an expert.")
    rows, cols = shape[:-3:-1] if group.transposed else shape[-2:]
    per_byte = BLOCK_COLS if group.leaf is Leaf.BLOCK_SCALE else 2
    if rows % len(group.projections):
        raise refuse("different shapes", f"{group.name(0)} {list(shape)} is not gate and up", "Expected 2*I rows.")
    return rows // len(group.projections), cols * per_byte


def _check_dtype(group: TensorGroup) -> None:
    is_scale = group.leaf is Leaf.BLOCK_SCALE
    want = next(tensor.dtype for tensor in PreparedTensor if tensor.is_scale == is_scale)  # bytes keep their meaning
    if group.dtype != want:
        raise refuse(
            "dtype", f"{group.name(0)} is {group.dtype}, NVFP4 has {want}", "Only NVFP4 experts can be prepared."
        )


def _check_scalar(group: TensorGroup, experts: int) -> None:
    fits = {1, experts} if group.stacked else {1, len(group.projections)}
    if group.dtype != "F32" or math.prod(group.shape) not in fits:
        raise refuse(
            "scalar",
            f"{group.name(0)} is {group.dtype} {list(group.shape)}",
            "Expected one float32 for each expert.",
        )
