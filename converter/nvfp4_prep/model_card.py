"""The model card (README.md) of a prepared checkpoint."""

from __future__ import annotations

import re

from nvfp4_prep.manifest import Manifest

__all__ = ["make_model_card"]

_FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)\r?\n---\r?\n", re.DOTALL)
_REPLACED = re.compile(r"^(base_model|base_model_relation)\s*:.*\n(?:[ \t-].*\n)*", re.MULTILINE)


def make_model_card(manifest: Manifest) -> bytes:
    """Front matter of the source's card with ``base_model``, then what was prepared and how to use it."""
    source_card = manifest.texts.get("README.md", b"").decode("utf-8", "replace")
    match = _FRONT_MATTER.match(source_card)
    kept = _REPLACED.sub("", match[1] + "\n").strip("\n") if match else ""
    lines = ["---", *([kept] if kept else [])]
    if "/" in manifest.source:
        lines += [f"base_model: {manifest.source}", "base_model_relation: quantized"]
    lines += ["---", "", *_body(manifest)]
    return ("\n".join(lines) + "\n").encode()


def _body(manifest: Manifest) -> list[str]:
    revision = f" at commit `{manifest.revision}`" if manifest.revision else ""
    experts = sum(layer.layer.dims.experts for layer in manifest.layers)
    options = manifest.options
    return [
        f"# {manifest.source}, prepared for FlashInfer's CuteDSL fused MoE",
        "",
        f"The NVFP4 expert weights of **{manifest.source}**{revision}, with scales swizzled and gate/up rows"
        f" interleaved by nvfp4-prep {manifest.tool_version}, so that a server does not have to do it at every start."
        " Everything else is unchanged, and `nvfp4-prep restore` gives the source back bit for bit.",
        "",
        f"- {len(manifest.layers)} MoE layers, {experts} experts, layout `{options.layout.value}`,"
        f" gate/up block {options.gate_up_block}, gate/up scales `{options.gate_up_scales.value}`",
        f"- tensor-parallel sizes that it serves: {', '.join(map(str, manifest.tp_sizes)) or 'none in common'}",
        *(f"- passed through unchanged: `{path}` ({reason})" for path, reason in list(manifest.passed.items())[:20]),
        "",
        "## Verified",
        "",
        *(f"- {check.get('check')}: {check.get('result')}" for check in manifest.verified),
        "",
        "## Use",
        "",
        "    pip install nvfp4-prep   # beside vLLM: the plugin that reads these files",
        "    vllm serve <this checkpoint>",
        "    nvfp4-prep verify <this checkpoint>",
        "    nvfp4-prep restore <this checkpoint> <directory>",
        "",
    ]
