"""The prepared layouts: one row each, with every name that a layout and its kernel have elsewhere.

What is said of vLLM and SGLang was read in the code of vLLM 0.33 and SGLang 0.5.23; docs/which-kernel.md has the
whole story. A new layout is a constructor of ``MoeLayout`` that :meth:`MoeLayout.named` knows, and a row here. This
module does not import torch: ``convert --help`` needs the names only.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nvfp4_prep_kernels import MoeLayout

__all__ = [
    "GATE_UP_BLOCKS",
    "LAYOUTS",
    "SERVER_FLAGS",
    "SGLANG_FLAGS",
    "LayoutFacts",
    "LayoutName",
    "facts_of",
    "layout_of_backend",
]

GATE_UP_BLOCKS = (64, 32, 16)
"""Heights of gate/up blocks, in rows; the first one is the default."""


class LayoutName(enum.StrEnum):
    """Prepared layouts by the name that the command line uses."""

    CUTEDSL = "cutedsl"
    CUTEDSL_BATCHED = "cutedsl-batched"
    TRTLLM = "trtllm"


@dataclass(frozen=True)
class LayoutFacts:
    """One layout for people, in the stamp, and in the servers.

    Attributes:
        kernel: FlashInfer's name of the kernel that reads it.
        stamp_name: its name in the stamp: that of vLLM's MoE backend, in small letters.
        flag: value of vLLM's ``--moe-backend`` and SGLang's ``--moe-runner-backend`` that runs the kernel.
        sglang_flags: other values of ``--moe-runner-backend`` that run it.
        choice: when servers choose the kernel, and how to choose another; one line each.
        has_blocks: whether gate and up alternate in blocks whose height can be chosen.
        plain_silu_only: whether the kernel computes SiLU without a clamp, and nothing else.
        behind_deepep: whether servers run the kernel behind DeepEP's low-latency all-to-all alone.
        single_call: whether one function of FlashInfer, ``cute_dsl_fused_moe``, runs a whole layer.
        sglang_pads: whether SGLang pads the intermediate size of gated experts as the file does.
    """

    kernel: str
    stamp_name: str
    flag: str
    choice: tuple[str, ...]
    sglang_flags: tuple[str, ...] = ()
    has_blocks: bool = False
    plain_silu_only: bool = False
    behind_deepep: bool = False
    single_call: bool = False
    sglang_pads: bool = False

    @property
    def vllm_backend(self) -> str:
        """Value of vLLM's ``NvFp4MoeBackend``."""
        return self.stamp_name.upper()

    @property
    def runs(self) -> str:
        """The kernel's full name."""
        return f"FlashInfer's {self.kernel} fused MoE"

    def kernel_lines(self, command: str = "convert") -> list[str]:
        """Return which kernel a file in this layout runs, what servers would run, and how to choose by a command."""
        first, *more = (line.format(command=command) for line in self.choice)
        return [f"runs {self.runs} (vLLM's {self.vllm_backend}) on compute capability 10.x{first}", *more]


LAYOUTS = {
    LayoutName.CUTEDSL: LayoutFacts(
        kernel="CuteDSL",
        stamp_name="flashinfer_cutedsl",
        flag="flashinfer_cutedsl",
        choice=(
            "",
            "a B200 server without flags runs the source on FLASHINFER_TRTLLM; to stay on that kernel:",
            "{command} with --layout trtllm, or serve with --moe-backend flashinfer_trtllm (docs/which-kernel.md)",
        ),
        has_blocks=True,
        single_call=True,
    ),
    LayoutName.CUTEDSL_BATCHED: LayoutFacts(
        kernel="batched CuteDSL",
        stamp_name="flashinfer_cutedsl_batched",
        flag="flashinfer_cutedsl",
        choice=(", with DeepEP low latency",),
        plain_silu_only=True,
        behind_deepep=True,
    ),
    LayoutName.TRTLLM: LayoutFacts(
        kernel="TRTLLM-gen",
        stamp_name="flashinfer_trtllm",
        flag="flashinfer_trtllm",
        choice=("", "that is the kernel of a B200 server without flags"),
        sglang_flags=("flashinfer_trtllm_routed",),
        sglang_pads=True,
    ),
}
SERVER_FLAGS = tuple(dict.fromkeys(facts.flag for facts in LAYOUTS.values()))
"""Values of vLLM's ``--moe-backend`` whose kernels read a prepared layout."""
SGLANG_FLAGS = {
    flag: name
    for name, facts in LAYOUTS.items()
    if not facts.behind_deepep
    for flag in (facts.flag, *facts.sglang_flags)
}
"""Values of SGLang's ``--moe-runner-backend``, and the layout that each reads without DeepEP."""


def facts_of(layout: MoeLayout) -> LayoutFacts:
    """Return what is known of a layout."""
    return LAYOUTS[LayoutName(layout.name)]


def layout_of_backend(backend: str) -> LayoutName | None:
    """Return the layout that a backend of vLLM's reads, by the value of ``NvFp4MoeBackend`` or the stamp's name."""
    return next((name for name, facts in LAYOUTS.items() if facts.stamp_name == backend.lower()), None)
