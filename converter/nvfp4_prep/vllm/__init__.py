"""The vLLM plugin: serves a prepared checkpoint with no flag and prepares nothing at load time.

``register`` is the entry point of the group ``vllm.general_plugins``; vLLM calls it in every process. What it changes
in vLLM is listed, line by line, in docs/serving-vllm.md.
"""

from __future__ import annotations

__all__ = ["register"]


def register() -> None:
    """Teach this vLLM process quantization method and load format ``nvfp4_prep``. Safe to call more than once.

    In a vLLM that the plugin refuses nothing of vLLM is replaced; only opening a prepared checkpoint then fails, with
    the reason. That is one older than the tested versions, or a newer one whose interface is not the expected one.
    """
    problem = _problem()
    if problem is None:
        from nvfp4_prep.vllm.config import register_configs
        from nvfp4_prep.vllm.load_format import register_load_format

        register_configs()
        register_load_format()
    else:
        from nvfp4_prep.vllm.refusal import register_refusal

        register_refusal(problem)


def _problem() -> str | None:
    """Return why the installed vLLM is refused, or ``None``."""
    from nvfp4_prep.vllm.versions import Support, installed_version, support, untested_problem, version_problem

    version = installed_version()
    problem = version_problem(version)
    if problem is not None or support(version) is Support.TESTED:
        return problem
    from nvfp4_prep.vllm.interface import interface_problems

    return untested_problem(version, list(interface_problems()))
