"""The SGLang plugin: serves a prepared checkpoint with no flag and prepares nothing at load time.

``register`` is the entry point of the group ``sglang.srt.plugins``; SGLang calls it in every process. What it changes
in SGLang is listed in docs/serving-sglang.md.
"""

from __future__ import annotations

__all__ = ["register"]


def register() -> None:
    """Register the hooks in this SGLang process. Safe to call more than once.

    In an SGLang outside the supported range nothing of SGLang is replaced; only opening a prepared checkpoint then
    fails, with the reason.
    """
    from nvfp4_prep.sglang.hooks import register_hooks
    from nvfp4_prep.sglang.versions import version_problem

    register_hooks(version_problem())
