"""Choice of the implementation that runs, and the reason why it is not a better one."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from nvfp4_prep.errors import UsageError
from nvfp4_prep.layouts import LAYOUTS, LayoutFacts, LayoutName, facts_of
from nvfp4_prep.smoke.backend_names import BACKENDS
from nvfp4_prep.smoke.report import BackendFacts
from nvfp4_prep_kernels import MoeLayout
from nvfp4_prep_kernels.flashinfer_moe import FlashInferMoe, FlashInferUnavailableError
from nvfp4_prep_kernels.moe_types import MoeBackend
from nvfp4_prep_kernels.torch_moe import TorchMoe
from nvfp4_prep_kernels.triton_moe import TritonMoe

__all__ = ["ChosenBackend", "choose_backend"]

_LIBRARIES = ("torch", "triton", "flashinfer-python", "nvidia-cutlass-dsl")
_AMPERE = (8, 0)


@dataclass(frozen=True)
class ChosenBackend:
    """A backend, the device it runs on and what a report says about it."""

    backend: MoeBackend
    device: torch.device
    facts: BackendFacts


def choose_backend(wanted: str = "auto", layouts: Iterable[MoeLayout] = ()) -> ChosenBackend:
    """Return the wanted backend, or with ``auto`` the best that this machine can run.

    Args:
        wanted: one of :data:`BACKENDS`.
        layouts: of the layers that it will be given.

    Raises:
        UsageError: if the wanted one cannot run here; the message says why and what to do.
    """
    if wanted not in BACKENDS:
        raise UsageError("no such backend", expected=" or ".join(BACKENDS), actual=wanted)
    facts = next(map(facts_of, layouts), LAYOUTS[LayoutName.CUTEDSL])  # all layers of a checkpoint have one kernel's
    kernel, no_flashinfer = facts.kernel, _why_not_flashinfer(facts)
    no_triton = _why_not_triton()
    if wanted == "flashinfer" and no_flashinfer:
        raise UsageError(f"the flashinfer backend cannot run here: {no_flashinfer}", next_step="Use --backend auto.")
    if wanted == "triton" and no_triton:
        raise UsageError(f"the triton backend cannot run here: {no_triton}", next_step="Use --backend auto.")
    if wanted == "flashinfer" or (wanted == "auto" and not no_flashinfer):
        return _chosen(FlashInferMoe(), "cuda", "", kernel)
    reason = f"flashinfer: {no_flashinfer}" if no_flashinfer else "flashinfer could run, but another was asked for"
    if wanted == "triton" or (wanted == "auto" and not no_triton):
        return _chosen(TritonMoe(), "cuda", reason, kernel)
    reason += f"; triton: {no_triton}" if no_triton else "; triton could run, but torch was asked for"
    return _chosen(TorchMoe(), "cpu", reason, kernel)


def _why_not_flashinfer(facts: LayoutFacts) -> str:
    """Empty if the real kernel can run here and is the one that the smoke run calls."""
    if not torch.cuda.is_available():
        return "no CUDA GPU"
    if not facts.single_call:
        return f"the smoke test does not call the {facts.kernel} kernels"
    major, minor = torch.cuda.get_device_capability()
    if major != 10:
        name = torch.cuda.get_device_name()
        return f"{name} has compute capability {major}.{minor}, the {facts.kernel} kernel needs 10.x"
    try:
        FlashInferMoe.check()
    except FlashInferUnavailableError as error:
        return str(error)
    return ""


def _why_not_triton() -> str:
    if not torch.cuda.is_available():
        return "no CUDA GPU"
    if torch.cuda.get_device_capability() < _AMPERE:
        return f"{torch.cuda.get_device_name()} is older than Ampere (compute capability 8.0)"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    return ""


def _chosen(backend: MoeBackend, device: str, reason: str, kernel: str) -> ChosenBackend:
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    facts = BackendFacts(
        name=backend.name,
        real_kernel=isinstance(backend, FlashInferMoe),
        reason=reason,
        device=name if device == "cuda" else f"CPU ({name})",
        versions={"python": platform.python_version()}
        | {name: found for name in _LIBRARIES if (found := _version(name))},
        kernel=kernel,
    )
    return ChosenBackend(backend, torch.device(device), facts)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""
