"""Plans, inspections and reports as text for people and as JSON values for programs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Any

from nvfp4_prep._util.printable import join_lines, printable
from nvfp4_prep._util.text import bounded, count, first_of, format_nbytes, spans
from nvfp4_prep.checkpoint.filenames import FileKind
from nvfp4_prep.layouts import LAYOUTS
from nvfp4_prep.moe.model_config import quantization_configs
from nvfp4_prep.options import ConvertOptions
from nvfp4_prep.pipeline.workers import default_memory_nbytes
from nvfp4_prep.planning.disk_space import SMALL_FILES_NBYTES, Room

if TYPE_CHECKING:  # these import torch, for which --help must not wait
    from nvfp4_prep.commands.inspect import InspectedLayer, Inspection
    from nvfp4_prep.commands.preflight import Outlook
    from nvfp4_prep.commands.verify_report import VerifyReport
    from nvfp4_prep.planning.plan import Plan
    from nvfp4_prep_kernels import MoeDims, MoeLayout

_COMMON_TP_SIZES = (1, 2, 4, 8)

__all__ = [
    "inspection_text",
    "inspection_value",
    "layout_text",
    "left_out_lines",
    "outlook_text",
    "outlook_value",
    "plan_text",
    "plan_value",
    "quantization_lines",
    "relative_error_text",
    "tp_lines",
    "verify_text",
]
_NUMBER = re.compile(r"(\D*)(0|[1-9]\d{0,8})(\D.*|)", re.DOTALL)
_LINE_LIMIT = 5_000
"""Characters of a line that describes a checkpoint: a config says what is in it."""


def plan_value(plan: Plan, room: Room | None = None, memory_nbytes: int | None = None) -> dict[str, Any]:
    """Return a plan for ``--json``; ``room`` is what its run takes, by default the output's size."""
    room = room or Room(plan.output_nbytes)
    return {
        "source": plan.source_label,
        "revision": plan.source_revision,
        "options": plan.options.to_dict(),
        "layers": [
            {
                "experts_path": item.experts_path,
                "experts": item.dims.experts,
                "intermediate": item.dims.intermediate,
                "hidden": item.dims.hidden,
                "padded_intermediate": item.layout.padded_intermediate(item.dims.intermediate),
                "padded_hidden": item.layout.padded_hidden(item.dims.hidden),
                "gated": item.gated,
                "format": item.format,
                "source_nbytes": item.source.source_nbytes,
                "prepared_nbytes": item.prepared_nbytes,
                "gate_up_differing": len(item.scalars.differing),
                "tp_sizes": list(item.layout.tp_sizes(item.dims)),
            }
            for item in plan.layers
        ],
        "layer_count": len(plan.layers),
        "passed_through_experts": {item.experts_path: item.reason for item in plan.others},
        "files": [{"name": file.name, "kind": file.kind.value, "nbytes": file.nbytes} for file in plan.files],
        "side_files": [file.name for file in plan.side_files],
        "left_out": list(plan.left_out),
        "left_out_reasons": dict(plan.left_out_reasons),
        "warnings": list(plan.warnings),
        "source_nbytes": plan.source_nbytes,
        "output_nbytes": plan.output_nbytes,
        "memory_nbytes": memory_nbytes or default_memory_nbytes(),
        "peak_source_shards_nbytes": plan.peak_shards_nbytes,
        "download_nbytes": room.download_nbytes,
        "small_files_nbytes": SMALL_FILES_NBYTES,
        "peak_disk_nbytes": room.needed_nbytes,
    }


def plan_text(plan: Plan, room: Room | None = None, memory_nbytes: int | None = None) -> str:
    """Return a plan for people; arguments as for :func:`plan_value`."""
    kinds = Counter(file.kind for file in plan.files)
    sizes = {kind: sum(file.nbytes for file in plan.files if file.kind is kind) for kind in kinds}
    passed = sum(len(file.copies) for file in plan.files)
    from nvfp4_prep_kernels import PreparedTensor  # needs torch

    expert_tensors = sum(len(group.records) for item in plan.layers for group in item.groups)
    gated = any(item.gated for item in plan.layers)
    lines = [
        f"source   {plan.source_label}{'@' + plan.source_revision if plan.source_revision else ''}: "
        f"{format_nbytes(plan.source_nbytes)} in {count(len(plan.index.headers), 'shard')}",
        f"layout   {layout_text(plan.options.to_dict(), gated=gated)}",
        f"layers   {count(len(plan.layers), 'MoE layer')} to prepare, {count(expert_tensors, 'expert tensor')} become"
        f" {sum(len(PreparedTensor) + len(item.layout.scale_vectors) for item in plan.layers)}",
    ]
    lines += ["         " + line for line in _layer_lines(plan)]
    lines += [f"kernel   {line}" for line in LAYOUTS[plan.options.layout].kernel_lines()]
    lines += [f"TP       {line}" for line in tp_lines((item.layout, item.dims) for item in plan.layers)]
    configs = quantization_configs(plan.index.config, plan.index.hf_quant_config)
    lines += [f"vLLM     {line}" for line in quantization_lines(configs.values())]
    lines += [f"passes   {count(passed, 'other tensor')}, {count(len(plan.side_files), 'other file')}"]
    lines += [f"         {item.experts_path}: {item.reason}" for item in plan.others]
    lines += [f"left out {line}" for line in left_out_lines(plan.left_out_reasons)]
    lines += [f"warning  {warning}" for warning in plan.warnings]
    lines += [
        f"writes   {count(kinds[kind], f'{kind.value} file')}, {format_nbytes(sizes[kind])}"
        for kind in FileKind
        if kinds[kind]
    ]
    lines += [
        f"disk     {format_nbytes(plan.output_nbytes)} for the output",
        *_room_lines(plan, room or Room(plan.output_nbytes)),
        f"memory   at most {format_nbytes(memory_nbytes or default_memory_nbytes())} of buffers for any model",
    ]
    return join_lines(lines)


def left_out_lines(reasons: Mapping[str, str]) -> Iterable[str]:
    """Return the source's files that are not part of the model: one line for each, or for a whole subfolder."""
    for folder, run in groupby(reasons, key=lambda name: name.split("/")[0] if "/" in name else ""):
        inside = list(run)
        if folder:
            yield f"{first_of(inside)} ({reasons[inside[0]]})"
        else:
            yield from (f"{name} ({reasons[name]})" for name in inside)


def _room_lines(plan: Plan, room: Room) -> Iterable[str]:
    if room.output_nbytes < plan.output_nbytes:
        here = format_nbytes(room.output_nbytes)
        yield f"         at most {here} of the output are here at once, the rest is published"
    if room.download_nbytes:
        yield (
            f"         downloads take at most {format_nbytes(room.download_nbytes)} on top; source shards needed at"
            f" once: {format_nbytes(plan.peak_shards_nbytes)}"
        )
    yield f"         {format_nbytes(SMALL_FILES_NBYTES)} are reserved for index, configs, model card and manifest"
    yield f"         peak {format_nbytes(room.needed_nbytes)}"


def outlook_value(outlook: Outlook) -> dict[str, Any]:
    """Return the outlook on a target for ``--json``."""
    return {
        "path": str(outlook.path),
        "state": outlook.state.value,
        "done_files": outlook.done,
        "needed_nbytes": outlook.needed_nbytes,
        "free_nbytes": outlook.free_nbytes,
        "refusal": None if outlook.refusal is None else outlook.refusal.to_dict(),
    }


def outlook_text(outlook: Outlook) -> str:
    """Return the outlook on a target in one line for people."""
    if outlook.refusal is not None:
        return printable(f"target   refused with exit code {outlook.refusal.exit_code}: {outlook.refusal}")
    if outlook.state == "complete":
        return printable(f"target   {outlook.path} is complete already: nothing would be written")
    there = f"{count(outlook.done, 'finished file')} {'is' if outlook.done == 1 else 'are'} there"
    what = f"continues an unfinished run: {there}" if outlook.state == "continues" else "is new"
    if outlook.state == "new" and outlook.done:
        what = f"joins parts: {there}"
    room = f"{format_nbytes(outlook.needed_nbytes)} needed, {format_nbytes(outlook.free_nbytes)} free"
    return printable(f"target   {outlook.path} {what}; {room}")


def _layer_lines(plan: Plan) -> Iterable[str]:
    def shape(position: int) -> tuple[object, ...]:
        item = plan.layers[position]
        sizes = item.layout.tp_sizes(item.dims)
        return (item.dims, item.gated, item.format, sizes)

    for _, run in groupby(range(len(plan.layers)), key=shape):
        members = [plan.layers[position] for position in run]
        first, dims = members[0], members[0].dims
        inter, hidden = first.layout.padded_intermediate(dims.intermediate), first.layout.padded_hidden(dims.hidden)
        padding = "" if (inter, hidden) == (dims.intermediate, dims.hidden) else f", padded to I {inter}, H {hidden}"
        differing = [len(item.scalars.differing) for item in members]
        yield (
            f"{_layers(item.index for item in members)}: E {dims.experts}, I {dims.intermediate},"
            f" H {dims.hidden},"
            f" {'gated' if first.gated else 'not gated'}, {first.format}{padding},"
            f" {format_nbytes(first.prepared_nbytes)} each, serves TP"
            f" {', '.join(map(str, first.layout.tp_sizes(dims)))}"
            + (f", {_gate_up_text(differing)}" if any(differing) else "")
        )


def _gate_up_text(differing: Sequence[int]) -> str:
    """Return in how many experts of each layer gate and up have different global scales."""
    low, high = min(differing), max(differing)
    if not high:
        return "gate/up scales agree"
    return f"gate/up scales differ in {count(high, 'expert') if low == high else f'{low} to {high} experts'}"


def layout_text(options: Mapping[str, Any], *, gated: bool) -> str:
    """Return conversion options in one line; what concerns gate and up only where there is a gate."""
    block = f"gate/up block {options['gate_up_block']}, " if LAYOUTS[options["layout"]].has_blocks else ""
    gate_up = f"{block}gate/up scales {options['gate_up_scales']}, " if gated else ""
    return f"{options['layout']}, {gate_up}moe-tp {options['moe_tp']}"


def tp_lines(layers: Iterable[tuple[MoeLayout, MoeDims]], command: str = "convert") -> Iterable[str]:
    """Return lines about tensor-parallel sizes: those that a file with these layers serves, those that it does not, and
    how to serve them, with this command."""
    known = list(dict.fromkeys(layers))
    served = set.intersection(*(set(layout.tp_sizes(dims)) for layout, dims in known))
    sizes = ", ".join(map(str, sorted(served))) or "none"
    experts = "and any expert parallelism" if 1 in served else "no expert parallelism: its experts are padded"
    yield f"serves tensor-parallel size{'s' * (len(served) != 1)} {sizes}, {experts}"
    never: dict[int, str] = {}
    padded = []
    for size in (size for size in _COMMON_TP_SIZES if size not in served):
        try:
            for layout, dims in known:
                layout.for_moe_tp(size).check(dims)
            padded.append(size)
        except ValueError as error:  # a LayoutError
            never[size] = str(error)
    if len(padded) == 1:
        yield f"cannot serve TP {padded[0]}: {command} with --moe-tp {padded[0]} for that"
    elif padded:
        yield f"cannot serve TP {', '.join(map(str, padded))}: {command} with --moe-tp for one of them"
    yield from (f"cannot serve TP {size}: {reason}" for size, reason in never.items())


def quantization_lines(configs: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    """Return lines about what a source's quantization configs lack before vLLM can serve source or output."""
    keys = {key for config in configs for part in (config, config.get("quantization")) for key in _mapping(part)}
    if not keys & {"quant_method", "quant_algo"}:
        yield "cannot serve: neither config.json nor hf_quant_config.json names a quantization method for vLLM"


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _layers(numbers: Iterable[int]) -> str:
    text = spans(numbers)
    return f"layer {text}" if text.isdigit() else f"layers {text}"


def inspection_value(found: Inspection) -> dict[str, Any]:
    """Return an inspection for ``--json``."""
    return {**asdict(found), "layer_count": len(found.layers)}


def inspection_text(found: Inspection) -> str:
    """Return an inspection for people."""
    quantization = ", ".join(f"{key} {value}" for key, value in found.quantization.items() if key != "producer")
    lines = [
        f"{found.path}: {'prepared' if found.prepared else 'source'} checkpoint,"
        f" {', '.join(found.architectures) or found.model_type or 'unknown model'}",
        f"{count(found.tensors, 'tensor')}, {count(found.shards, 'safetensors file')}, {format_nbytes(found.nbytes)}",
        f"quantization: {quantization or 'none in the config'}",
    ]
    if found.prepared:
        prepared = found.prepared_as
        options = prepared["options"]
        lines += [
            f"prepared by nvfp4-prep {prepared['tool_version']} from {prepared['source']}"
            + (f" at {prepared['revision']}" if prepared["revision"] else ""),
            f"layout {layout_text(options, gated=any(layer.gated for layer in found.layers))}",
            f"serves tensor-parallel sizes {', '.join(map(str, prepared['tp_sizes'])) or 'none in common'}",
        ]
    exact = found.prepared and not ConvertOptions.from_dict(found.prepared_as["options"]).gives_scales_up
    lines += _inspected_lines(found.layers, exact=exact)
    lines += [f"not part of the model: {line}" for line in left_out_lines(found.left_out_reasons)]
    lines += [f"warning: {warning}" for warning in found.warnings]
    if found.layers:
        lines += (f"vLLM {line}" for line in quantization_lines([found.quantization]))
    if not found.prepared:
        lines.append(f"convert would refuse: {found.refusal}" if found.refusal else "convert would prepare it")
    return join_lines(bounded(line, _LINE_LIMIT) for line in lines)


def _inspected_lines(layers: Iterable[InspectedLayer], *, exact: bool) -> Iterable[str]:
    """Return one line for each run of layers that differ in their number and in their gate/up scales alone."""

    def alike(layer: InspectedLayer) -> tuple[object, ...]:
        before, _, after = _parted(layer.experts_path)
        counted, compared = layer.differing is not None, "relative_error" in layer.gate_up_figures
        what = (layer.status, layer.experts, layer.intermediate, layer.hidden, layer.format, layer.gated)
        return (before, after, *what, layer.activation, layer.tp_sizes, _reason(layer, several=True), counted, compared)

    for _, run in groupby(layers, key=alike):
        members = list(run)
        several = len(members) > 1
        before, number, after = _parted(members[0].experts_path)
        if several:
            number = spans(int(_parted(layer.experts_path)[1]) for layer in members)
        each = f"{len(members)} layers, each: " if several else ""
        yield f"{before}{number}{after}: {each}{_inspected_text(members, exact=exact)}"


def _parted(path: str) -> tuple[str, str, str]:
    """Return a module path around its first number, which is the layer's."""
    found = _NUMBER.fullmatch(path)
    return (found[1], found[2], found[3]) if found else (path, "", "")


def _inspected_text(layers: Sequence[InspectedLayer], *, exact: bool) -> str:
    """Return what one layer is, or what several are that are alike."""
    first = layers[0]
    text = first.status
    if first.experts is not None:
        text += f", E {first.experts}, I {first.intermediate}, H {first.hidden}, {first.format}"
        text += f", {'gated' if first.gated else 'not gated'} {first.activation}"
        differing = [layer.differing for layer in layers if layer.differing is not None]
        if differing:
            text += f", {_gate_up_text(differing)}"
        text += f", TP {', '.join(map(str, first.tp_sizes))}"
        if exact and any(differing):
            text += ", both are stored"
        elif "relative_error" in first.gate_up_figures:
            errors = [layer.gate_up_figures["relative_error"] for layer in layers]
            worst = {policy: max(error[policy] for error in errors) for policy in errors[0]}
            text += f", {'worst ' * (len(layers) > 1)}{relative_error_text(worst)}"
    reason = _reason(first, several=len(layers) > 1)
    return text + (f" ({reason})" if reason else "")


def _reason(layer: InspectedLayer, *, several: bool) -> str:
    """Return why a layer is not prepared; of several layers with ``*`` for the number of each."""
    before, number, after = _parted(layer.experts_path)
    return layer.reason.replace(layer.experts_path, f"{before}*{after}") if several and number else layer.reason


def relative_error_text(errors: Mapping[str, float]) -> str:
    """Return the errors of the dequantized experts under the two policies that the kernel can serve."""
    return f"relative error of their weights: reconcile {errors['reconcile']:.3g}, vllm {errors['vllm']:.3g}"


def verify_text(report: VerifyReport) -> str:
    """Return a verification for people."""
    lines = [f"checked {line}" for line in report.checks]
    lines += [f"WRONG {problem}" for problem in report.problems[:50]]
    if len(report.problems) > 50:
        lines.append(f"… and {count(len(report.problems) - 50, 'more problem')}")
    state = "verified" if report.ok else f"verification FAILED: {count(len(report.problems), 'problem')}"
    lines.append(f"{report.path}: {state} ({report.depth}, {format_nbytes(report.checked_nbytes)} read)")
    return join_lines(lines)
