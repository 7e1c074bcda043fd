"""The model card (README.md) of a prepared checkpoint. A function of the manifest alone, so that it reproduces."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

import yaml  # a dependency of huggingface-hub, which reads the front matter with it too

from nvfp4_prep._util.text import count, format_nbytes, spans
from nvfp4_prep.checkpoint.filenames import README
from nvfp4_prep.layouts import LAYOUTS
from nvfp4_prep.prepared.card_serving import check_section, parallel_sizes, serve_section
from nvfp4_prep.prepared.front_matter import FrontMatter, read_front_matter
from nvfp4_prep.prepared.manifest import LayerRecord, Manifest
from nvfp4_prep.prepared.markdown import code_span, plain_text

__all__ = ["front_matter", "is_model_card", "make_model_card"]

_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_NOT_CARRIED = (
    "base_model",
    "base_model_relation",
    "library_name",
    "model-index",
    "new_version",
    "widget",
    "inference",
)
"""Keys of the source's card that would be wrong here: they describe the source, its results or how to load it."""
_STORED = ", stored offline in the layout of the kernel, so that a server reads them instead of preparing them at"
"""Words of every card of ours."""
_TAGS = ("nvfp4", "moe", "nvfp4-prep", "flashinfer", "vllm")
_LINE = 20
_WIDE = 10_000


def make_model_card(manifest: Manifest) -> bytes:
    """Return the card: front matter for the Hub, what was prepared from what, what was verified, how to use it."""
    text = yaml.safe_dump(front_matter(manifest), sort_keys=False, allow_unicode=True, width=_WIDE)
    card = f"---\n{text}---\n\n{chr(10).join(_body(manifest))}\n"
    return card.encode(errors="replace")  # a directory's name may be no text


def is_model_card(raw: bytes) -> bool:
    """Return whether a text looks like one of :func:`make_model_card`."""
    return _STORED.encode() in raw


def front_matter(manifest: Manifest) -> dict[str, Any]:
    """Return the card's metadata: the source's (licence, languages, tags …) with its place in the family tree.

    A source that came from a directory has no address: then the source's own ``base_model`` stays.
    """
    source = _source_metadata(manifest).values
    found = {key: value for key, value in source.items() if key not in _NOT_CARRIED}
    tags = source.get("tags")
    carried = [str(tag) for tag in tags if isinstance(tag, str | int | float)] if isinstance(tags, list) else []
    found["tags"] = list(dict.fromkeys([*carried, *_TAGS]))
    found["library_name"] = "vllm"
    if _is_hub_id(manifest):
        found["base_model"] = [manifest.source]
        found["base_model_relation"] = "quantized"
    elif _is_base_model(source.get("base_model")):
        found["base_model"] = source["base_model"]
        found["base_model_relation"] = "quantized"
    return found


def _is_base_model(value: object) -> bool:
    """Return whether this names models: one, or a list."""
    items = value if isinstance(value, list) else [value]
    return bool(items) and all(isinstance(item, str) for item in items)


def _is_hub_id(manifest: Manifest) -> bool:
    return manifest.revision is not None and _REPOSITORY.fullmatch(manifest.source) is not None


def _source_metadata(manifest: Manifest) -> FrontMatter:
    return read_front_matter(manifest.texts.get(README, b""))


def _body(manifest: Manifest) -> Iterator[str]:
    yield from _head(manifest)
    yield from _what(manifest)
    yield from _scales(manifest)
    yield from _verified(manifest)
    yield from serve_section(manifest)
    yield from check_section()


def _head(manifest: Manifest) -> Iterator[str]:
    source = plain_text(manifest.source)
    name = f"[{source}](https://huggingface.co/{manifest.source})" if _is_hub_id(manifest) else source
    yield f"# {source}, prepared for {LAYOUTS[manifest.options.layout].runs}"
    yield ""
    yield (
        f"The NVFP4 expert weights of {name}{_STORED} every start. Quantized values are unchanged, all other tensors"
        " and files are copied as they are, and the source can be restored bit for bit."
    )
    yield ""


def _what(manifest: Manifest) -> Iterator[str]:
    options, layouts = manifest.options, {layer.layout for layer in manifest.layers}
    alignment = sorted({(layout.hidden_alignment, layout.intermediate_alignment) for layout in layouts})
    blocks = LAYOUTS[options.layout].has_blocks and any(layer.gated for layer in manifest.layers)
    gate_up = f"gate/up block {options.gate_up_block}, " if blocks else ""
    rows = [
        (
            "source",
            plain_text(manifest.source) + (f" at commit {code_span(manifest.revision)}" if manifest.revision else ""),
        ),
        ("made by", f"nvfp4-prep {plain_text(manifest.tool_version)}"),
        ("layout", f"`{options.layout.value}`, {gate_up}block scales in tiles of 128x4"),
        (
            "padding",
            "; ".join(f"hidden to multiples of {hidden}, intermediate of {inter}" for hidden, inter in alignment),
        ),
        ("tensor-parallel sizes", parallel_sizes(manifest)),
        *(("layers", text) for text in _layers(manifest.layers)),
    ]
    yield "## What was prepared"
    yield ""
    yield "| property | value |"
    yield "|---|---|"
    for key, value in rows:
        yield f"| {key} | {value} |"
    yield ""
    note = _source_metadata(manifest).note
    if note is not None:
        yield f"The front matter of the source's card was not taken over: {note}."
        yield ""
    passed = list(manifest.passed.items())
    if passed:
        yield "Experts that were passed through unchanged:"
        yield ""
        yield from (f"- {code_span(path)}: {plain_text(reason)}" for path, reason in passed[:_LINE])
        if len(passed) > _LINE:
            yield f"- and {len(passed) - _LINE} more, listed in `nvfp4_prep.json`"
        yield ""


def _layers(layers: tuple[LayerRecord, ...]) -> Iterator[str]:
    def shape(record: LayerRecord) -> tuple[object, ...]:
        return (record.dims, record.gated, record.activation.spelled)

    for (_, gated, activation), members in groupby(layers, key=shape):
        run = list(members)
        dims, numbers = run[0].dims, spans(record.index for record in run)
        yield (
            f"{count(len(run), 'layer')} ({numbers}): {dims.experts} {'gated' if gated else 'non-gated'} experts,"
            f" intermediate {dims.intermediate}, hidden {dims.hidden}, {plain_text(activation)}"
        )


def _scales(manifest: Manifest) -> Iterator[str]:
    differing = sum(layer.gate_up.differing for layer in manifest.layers)
    if not differing:
        return
    worst = max(layer.gate_up.worst_ratio for layer in manifest.layers)
    reconciled = sum(len(layer.gate_up.reconciled) for layer in manifest.layers)
    yield "## Gate and up scales"
    yield ""
    head = (
        f"In {count(differing, 'expert')} the gate and up projections have different global scales (up to a factor of"
        f" {worst:.6g}), and the kernel takes"
    )
    if not manifest.options.gives_scales_up:
        yield f"{head} both: both are stored, and nothing was rescaled. The weights are exactly the source's."
        yield ""
        return
    both = any(layer.layout.takes_two_w13_scales for layer in manifest.layers)
    yield (
        f"{head} {'both' if both else 'one'}. Policy `{manifest.options.gate_up_scales.value}`: "
        + (
            f"the block scales of one side were rescaled in {count(reconciled, 'expert')}; the originals are kept for"
            " restore."
            if reconciled
            else "gate's is used for both, as vLLM does."
        )
    )
    yield ""
    figures = [figure for layer in manifest.layers if (figure := layer.gate_up.figures)]
    worst_relative = [float(figure["worst_relative"]) for figure in figures if "worst_relative" in figure]
    if worst_relative:
        rounded = sum(int(figure.get("rounded", 0)) for figure in figures)
        underflowed = sum(int(figure.get("underflowed", 0)) for figure in figures)
        yield (
            f"{rounded:,} block {'scale' if rounded == 1 else 'scales'} had to be rounded, {underflowed:,} of them to"
            f" zero, the others by at most {max(worst_relative):.3g} of their value."
        )
        yield ""


def _verified(manifest: Manifest) -> Iterator[str]:
    yield "## What was verified"
    yield ""
    for check in manifest.verified[:_LINE]:
        figures = _figures(check)
        head = f"- {plain_text(check.get('check'))}: {plain_text(check.get('result'))}"
        yield head + (f" ({figures})" if figures else "")
    rescaled = any(layer.gate_up.reconciled for layer in manifest.layers)
    but = ", but for the rescaled block scales above" if rescaled else ""
    yield (
        "- not recorded here: the smoke test, whose figures depend on the machine. `nvfp4-prep verify prepared --smoke`"
        " runs it on yours."
    )
    yield f"- not measured here: the model's quality. The weights are the source's{but}; see the source's card."
    yield ""


def _figures(check: Mapping[str, Any]) -> str:
    parts = []
    for key, value in list(check.items())[:_LINE]:
        if key in ("check", "result") or isinstance(value, Mapping | list):
            continue
        size = key == "nbytes" and isinstance(value, int)
        number = f"{value:,}" if type(value) is int else plain_text(value)
        parts.append(format_nbytes(value) if size else f"{plain_text(key)} {number}")
    return ", ".join(parts)
