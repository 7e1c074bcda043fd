"""The vLLM plugin: serves a prepared checkpoint with no flag and prepares nothing at load time.

``register`` is the entry point of the group ``vllm.general_plugins``; vLLM calls it in every process. What it changes
in vLLM is listed, line by line, in docs/serving-vllm.md.
"""

from __future__ import annotations

__all__ = ["register"]


def register() -> None:
    """Teaches this vLLM process quantization method and load format ``nvfp4_prep``. Safe to call more than once.

    In a vLLM outside the tested range nothing of vLLM is replaced; only opening a prepared checkpoint then fails, with
    the reason.
    """
    from nvfp4_prep.vllm.versions import version_problem

    problem = version_problem()
    if problem is None:
        from nvfp4_prep.vllm.config import register_configs
        from nvfp4_prep.vllm.load_format import register_load_format

        register_configs()
        register_load_format()
    else:
        from nvfp4_prep.vllm.refusal import register_refusal

        register_refusal(problem)
