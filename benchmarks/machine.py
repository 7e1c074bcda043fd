"""What a result was measured on: processors, card, versions, state of the sources."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "triton", "vllm", "flashinfer-python", "safetensors")


def facts() -> dict[str, Any]:
    """The machine, for people and for comparing results."""
    card = torch.cuda.is_available()
    return {
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "processor": _processor(),
        "system": f"{platform.system()} {platform.release()}",
        "gpu": torch.cuda.get_device_name() if card else None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if card else None,
        "python": platform.python_version(),
        **{name.removesuffix("-python"): _version(name) for name in PACKAGES},
    }


def commit() -> str:
    """The commit of the sources, with ``+`` if they were changed since; empty where there is no git."""
    head = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    sources = ("converter", "kernels", "benchmarks", ":!benchmarks/results")
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--", *sources)
    return f"{head}+" if head and changed else head


def sources_sha256() -> str:
    """Of all Python files that take part, so that a commit which git could not say can be checked."""
    digest = hashlib.sha256()
    for folder in ("benchmarks", "converter", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            digest.update(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().split("\n")[0] if done.returncode == 0 else ""
