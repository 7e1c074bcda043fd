"""Kinds of experts that are not NVFP4 as a known format has it, told by dtypes and shapes, never by names alone.

A wrong name is wrong advice: NVFP4 under names that nobody told us of must not be called MXFP8, and an FP8 projection
beside NVFP4 ones not a missing tensor.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

from nvfp4_prep.checkpoint.tensors import TensorRecord
from nvfp4_prep.formats import ExpertTensorName, Leaf, QuantFormat
from nvfp4_prep.moe.validation import NotPrepared, pass_through, refuse
from nvfp4_prep_kernels import BLOCK_COLS, Projection

__all__ = ["check_one_kind", "other_kind", "unknown_nvfp4", "unknown_paths"]

_FLOATS = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}
_FP8 = frozenset({"F8_E4M3", "F8_E5M2"})
_MX_SCALES = frozenset({"U8", "F8_E8M0"})
_PACKED = frozenset({"U8", "I8"})
_CODES = _PACKED | {"F4"}
_SCALES_PER_BYTE = BLOCK_COLS // 2  # bytes of NVFP4 codes for one block scale
_MXFP4_BYTES, _MXFP8_BYTES = 16, 32
_SERVE = "Serve the source as it is."
_ADD = "Add the names with a small plugin (docs/adding-a-format.md), or serve the source as it is."
_NO_INPUT_SCALES = (
    "Serve the source as it is: without input scales it is weight-only NVFP4, and the kernel quantizes activations too."
    " If they have another name, add the names with a small plugin (docs/adding-a-format.md)."
)
_EXPERT_WORD = re.compile(r".*?experts?", re.IGNORECASE)
_NUMBERED = re.compile(r"[._/-]?[0-9]+[._/-]|.*\.[0-9]+\.")
"""What follows the word where experts are numbered: at once after any separator, or as a component of its own."""


def other_kind(leaves: Collection[str], records: Collection[TensorRecord]) -> NotPrepared:
    """Return why a layer without the leaves of a known format is not prepared.

    Args:
        leaves: spellings of its leaves.
        records: its tensors.
    """
    if _is_nvfp4(records):
        return unknown_nvfp4(records)
    kind = _kind(leaves, records)
    if kind is None:
        spelled = ", ".join(sorted(leaves))[:200]
        return pass_through("unknown", f"experts are of an unknown kind (leaves {spelled})", _SERVE)
    return pass_through(*kind, _SERVE)


def unknown_nvfp4(records: Collection[TensorRecord]) -> NotPrepared:
    """Refuse NVFP4 experts that no naming or no format knows.

    They must not pass through: the server would expect prepared experts in their place.
    """
    matrices = [record for record in records if len(record.shape) >= 2]
    codes = min(record.name for record in matrices if record.dtype in _CODES)
    scales = min((record.name for record in matrices if record.dtype == "F8_E4M3"), default="")
    some = ", ".join(filter(None, [codes, scales])) + (" …" if len(matrices) > 2 else "")
    text = f"NVFP4 experts under unknown names: packed 4-bit codes with e4m3 scales of {BLOCK_COLS} ({some})"
    if not any("input" in record.name.rpartition("experts")[2] for record in records):
        return refuse("unknown names", f"{text}, and no tensor of theirs is named as an input scale", _NO_INPUT_SCALES)
    return refuse("unknown names", text, _ADD)


def unknown_paths(records: Iterable[TensorRecord]) -> dict[str, list[TensorRecord]]:
    """Return the NVFP4 experts among tensors that no naming understands, by the path that ends in "experts".

    Only what has a number after that word or stacks matrices is a routed expert; shared experts are ordinary linear
    layers, which pass through.
    """
    by_path: dict[str, list[TensorRecord]] = defaultdict(list)
    for record in records:
        path = _experts_path(record.name)
        if path and (len(record.shape) > 2 or _NUMBERED.match(record.name, len(path))):
            by_path[path].append(record)
    return {path: found for path, found in by_path.items() if _is_nvfp4(found)}


def _experts_path(name: str) -> str | None:
    parts = name.split(".")
    named = [position for position, part in enumerate(parts) if "expert" in part.lower()]
    if not named or any("share" in parts[at].lower() or parts[at] == "routed_experts" for at in named):
        return None
    word = _EXPERT_WORD.match(parts[named[-1]])
    return ".".join([*parts[: named[-1]], word[0] if word else ""])


def check_one_kind(
    members: Sequence[tuple[ExpertTensorName, TensorRecord]], format_: QuantFormat, formats: Mapping[str, QuantFormat]
) -> None:
    """Refuse an NVFP4 layer in which some experts or projections are of another kind.

    Raises:
        NotPrepared: if the layer mixes kinds; the kernel has one format for the whole layer, and so has the server.
    """
    units: dict[tuple[int | None, tuple[Projection, ...]], list[tuple[str, TensorRecord]]] = defaultdict(list)
    for parsed, record in members:
        units[(parsed.expert, parsed.projections)].append((parsed.leaf, record))
    others: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for tensors in units.values():
        kind = _kind_beside(tensors, format_, formats)
        if kind is not None:
            others[kind] += 1
            largest = max((record for _, record in tensors), key=lambda record: record.nbytes)
            examples.setdefault(kind, largest.name)
    if others:
        found = "; ".join(
            f"{kind} in {others[kind]} of {len(units)} projections ({examples[kind]})" for kind in sorted(others)
        )
        raise refuse(
            "mixed",
            f"experts of one layer mix NVFP4 and other kinds: {found}",
            "The kernel computes a whole layer in one format: quantize all its experts alike, or serve the source as it"
            " is.",
        )


def _kind_beside(
    tensors: Sequence[tuple[str, TensorRecord]], format_: QuantFormat, formats: Mapping[str, QuantFormat]
) -> str | None:
    """Return the kind of an expert's projection that is not of the layer's format; ``None`` if it is, or is damaged."""
    spelled = {leaf for leaf, _ in tensors}
    if _spelling(format_, Leaf.GLOBAL_SCALE) in spelled:
        return None
    other = next((name for name, kind in formats.items() if _spelling(kind, Leaf.GLOBAL_SCALE) in spelled), None)
    if other is not None:
        return f"NVFP4 as {other} stores it"
    scale = _spelling(format_, Leaf.BLOCK_SCALE)
    weights = {record.dtype for leaf, record in tensors if leaf != scale and len(record.shape) >= 2}
    matrices = [record for _, record in tensors if len(record.shape) >= 2]
    if not weights or _is_nvfp4(matrices) or (weights <= _PACKED and len(matrices) == 1):
        return None  # damaged NVFP4
    kind = _kind(spelled, matrices)
    return kind[1].removeprefix("experts are ") if kind is not None else None


def _spelling(format_: QuantFormat, leaf: Leaf) -> str:
    return next(spelling for spelling, meaning in format_.leaves.items() if meaning is leaf)


def _kind(leaves: Collection[str], records: Collection[TensorRecord]) -> tuple[str, str] | None:
    """Return short class and sentence of experts that are not NVFP4, if they are of a known kind."""
    shapes = _shapes(records)
    dtypes = set(shapes)
    if dtypes and dtypes <= set(_FLOATS):
        kinds = sorted(_FLOATS[kind] for kind in dtypes)
        return kinds[0], f"experts are {', '.join(kinds)}"
    if any("absmax" in leaf or "quant_state" in leaf for leaf in leaves):
        return "bitsandbytes", "experts are quantized by bitsandbytes"
    if dtypes & _FP8:
        if _have_scales(shapes, _FP8, _MX_SCALES, _MXFP8_BYTES):
            return "mxfp8", "experts are MXFP8"
        return None if dtypes & _PACKED else ("fp8", "experts are FP8")
    mxfp4 = _have_scales(shapes, _PACKED, _MX_SCALES, _MXFP4_BYTES) or any("blocks" in leaf for leaf in leaves)
    if mxfp4 or "F8_E8M0" in dtypes or dtypes == {"U8"}:
        return "mxfp4", "experts are MXFP4 (e8m0 scales of 32, no global scale)"
    if dtypes & {"I32", "I8"}:
        return "integer", "experts are quantized to integers"
    return None


def _is_nvfp4(records: Collection[TensorRecord]) -> bool:
    """Return whether there are byte matrices with a scale for each 16 weights; such scales are e4m3, or its bytes."""
    shapes = _shapes(records)
    in_bytes = _have_scales(shapes, _PACKED, {"F8_E4M3", "U8"}, _SCALES_PER_BYTE)
    return in_bytes or _have_scales(shapes, {"F4"}, {"F8_E4M3", "U8"}, BLOCK_COLS)


def _shapes(records: Collection[TensorRecord]) -> dict[str, set[tuple[int, ...]]]:
    """Return the distinct shapes of the matrices and stacks, by dtype: few, however many experts there are."""
    found: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    for record in records:
        if len(record.shape) >= 2:
            found[record.dtype].add(record.shape)
    return found


def _have_scales(
    shapes: Mapping[str, set[tuple[int, ...]]], weights: Collection[str], scales: Collection[str], ratio: int
) -> bool:
    """Return whether a scale has the shape of a weight whose rows or columns (transposed) are divided by ``ratio``."""
    wanted = set()
    for dtype in weights:
        for *experts, rows, cols in shapes.get(dtype, ()):
            wanted |= {(*experts, rows, cols / ratio), (*experts, rows / ratio, cols)}
    return any(shape in wanted for dtype in scales for shape in shapes.get(dtype, ()))
