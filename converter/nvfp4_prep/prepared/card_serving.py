"""The parts of a model card to type from: installation, both servers' commands, checks and the way back."""

from __future__ import annotations

from collections.abc import Iterator

from nvfp4_prep.checkpoint.filenames import CONFIG
from nvfp4_prep.layouts import LAYOUTS, LayoutName
from nvfp4_prep.prepared.manifest import Manifest
from nvfp4_prep.prepared.sglang_rules import COMPRESSED, takes_padding, takes_share

__all__ = ["check_section", "parallel_sizes", "serve_section"]

_FIRST_SIZES = (8, 4, 2, 1)
"""Of these GPUs of one host as many as the file serves are in the commands: what one tries first."""


def parallel_sizes(manifest: Manifest) -> str:
    """Return the sizes that the file serves, in words."""
    sizes = ", ".join(map(str, manifest.tp_sizes)) or "no size that all layers serve"
    return f"{sizes}; {'any' if 1 in manifest.tp_sizes else 'no'} expert parallelism"


def serve_section(manifest: Manifest) -> Iterator[str]:
    """Yield the lines about serving."""
    for_vllm, for_sglang = _server_options(manifest)
    yield from (
        "## Serve",
        "",
        f"Needs GPUs that run {LAYOUTS[manifest.options.layout].runs} (Blackwell, compute capability 10.x), and the"
        " package nvfp4-prep, whose plugins are for vLLM and SGLang. A server without it refuses these files. The"
        " package is not on PyPI. In a clone of it, in the server's environment:",
        "",
        "```sh",
        "pip install --no-deps .    # the server has what it depends on",
        "nvfp4-prep doctor          # does this version of the server fit?",
        "```",
        "",
        "Then, with vLLM or SGLang:",
        "",
        "```sh",
        f"vllm serve <this repository> {for_vllm}",
        *_sglang_lines(for_sglang),
        "```",
        "",
        *_kernel_lines(manifest.options.layout, for_sglang=bool(for_sglang)),
        f"Tensor-parallel sizes: {parallel_sizes(manifest)}. With `--load-format nvfp4_prep` each rank reads its own"
        " bytes only.",
        "",
    )
    if b'"auto_map"' in manifest.texts.get(CONFIG, b""):
        yield from (
            "`config.json` names Python code of this repository (`auto_map`). If the server asks for"
            " `--trust-remote-code`, read that code, then add the option.",
            "",
        )


def check_section() -> Iterator[str]:
    """Yield the lines about checks of one's own, and the way back."""
    yield from (
        "## Check and restore",
        "",
        "```sh",
        "nvfp4-prep verify <this repository>         # sizes and hashes, no download",
        "hf download <this repository> --local-dir prepared",
        "nvfp4-prep verify prepared                  # every byte",
        "nvfp4-prep verify prepared --smoke          # and random tokens on your GPU",
        "nvfp4-prep restore prepared source          # the source, bit for bit",
        "```",
    )


def _kernel_lines(layout: LayoutName, *, for_sglang: bool) -> tuple[str, ...]:
    """Return which kernel the file runs, and which one servers run with the original checkpoint."""
    facts, usual = LAYOUTS[layout], LAYOUTS[LayoutName.TRTLLM]
    if facts.behind_deepep:
        return ()
    text = f"This file is for the kernel `{facts.vllm_backend}`. A B200 server without flags runs "
    if facts is usual:
        return text + "the same kernel with the original checkpoint.", ""
    flags = f"`--moe-backend {usual.flag}`"
    if for_sglang:
        flags += f" (vLLM) or `--moe-runner-backend {usual.flag}` (SGLang)"
    return (
        f"{text}`{usual.vllm_backend}` with the original checkpoint. To stay on that kernel, add {flags}: the weights"
        " are then rearranged at every start.",
        "",
    )


def _sglang_lines(options: str) -> tuple[str, ...]:
    if not options:
        return ("# SGLang does not serve this checkpoint: it pads these sizes differently, or has no such kernel",)
    return (f"python -m sglang.launch_server --model-path <this repository> {options}",)


def _server_options(manifest: Manifest) -> tuple[str, str]:
    """Return the options of vLLM and of SGLang with which the file's own kernel runs on the GPUs of one host.

    The batched kernel runs behind DeepEP's all-to-all alone: without it both servers would refuse the file. SGLang's
    are those of its other kernel where it does not pad for the file's own, and empty where its plugin refuses the file
    whatever the options.
    """
    size = _first(manifest.tp_sizes) or 1
    sglang_size, more = _first(_sglang_sizes(manifest)), ""
    facts = LAYOUTS[manifest.options.layout]
    if facts.behind_deepep:
        for_vllm = f"--data-parallel-size {size} --enable-expert-parallel --all2all-backend deepep_low_latency"
        more = " --moe-a2a-backend deepep"
    else:
        for_vllm = f"--tensor-parallel-size {size}"
        if not all(takes_padding(layer.layout, layer.dims, trtllm=facts.sglang_pads) for layer in manifest.layers):
            more = f" --moe-runner-backend {LAYOUTS[LayoutName.TRTLLM].flag}"
    return for_vllm, f"--tp {sglang_size}{more}" if sglang_size else ""


def _first(sizes: tuple[int, ...]) -> int:
    """Return the size to try first: GPUs that a host has, if the file serves one of these; 0 if it serves none."""
    return next((size for size in _FIRST_SIZES if size in sizes), min(sizes, default=0))


def _sglang_sizes(manifest: Manifest) -> tuple[int, ...]:
    """Return the tensor-parallel sizes of SGLang's, none if it serves none. As docs/serving-sglang.md has it."""
    sizes = manifest.tp_sizes
    for layer in manifest.layers:
        compressed = layer.source.format == COMPRESSED
        if not takes_padding(layer.layout, layer.dims, trtllm=not compressed):
            return ()
        if compressed and LAYOUTS[manifest.options.layout].behind_deepep:
            return ()  # SGLang has no such kernel
        if compressed:
            sizes = tuple(size for size in sizes if takes_share(layer.dims.intermediate, size))
    return sizes
