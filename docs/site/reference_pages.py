"""The two reference pages that nobody writes by hand: the Python API and the command line's help."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

GROUPS = {
    "Convert": ("convert", "plan", "inspect", "preview_conversion", "convert_part", "join_parts", "relayout"),
    "Options": ("ConvertOptions", "LayoutName", "GateUpPolicy", "SmokePolicy", "PublishOptions", "choose_progress"),
    "Verify and restore": ("verify", "verify_published", "run_smoke", "restore", "restamp"),
    "Publish": ("push", "convert_and_publish"),
    "Load": ("load_layer", "bench_load"),
    "Try": ("diagnose", "write_sample", "SampleModel", "KIMI_LAYER"),
}
"""Headings of the API page; what is in no group stands under Results."""

_INTRODUCTION = """# Python API

`import nvfp4_prep` imports neither torch nor a server; what a function needs is imported when it is called. Everything
on this page follows semantic versioning. Every failure that a caller can cause is one of the [errors](#errors).
"""


def public_names(module: Path) -> list[str]:
    """Return a module's ``__all__``, read from its source."""
    for node in ast.parse(module.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return list(ast.literal_eval(node.value))
    raise SystemExit(f"error: {module} has no __all__")


def api_page(root: Path) -> str:
    """Return the page that mkdocstrings fills from the docstrings."""
    names = [name for name in public_names(root / "converter/nvfp4_prep/__init__.py") if not name.startswith("_")]
    grouped = {name for group in GROUPS.values() for name in group}
    unknown = grouped - set(names)
    if unknown:
        raise SystemExit(f"error: docs/site/reference_pages.py groups what is not public: {sorted(unknown)}")
    parts = [_INTRODUCTION]
    for title, group in {**GROUPS, "Results": [name for name in names if name not in grouped]}.items():
        parts += [f"## {title}", *(f"::: nvfp4_prep.{name}" for name in group)]
    kinds = public_names(root / "converter/nvfp4_prep/errors.py")
    parts += ["## Errors", *(f"::: nvfp4_prep.errors.{name}" for name in kinds)]
    loading = public_names(root / "converter/nvfp4_prep/load/__init__.py")
    parts += ["## Loading, in detail", *(f"::: nvfp4_prep.load.{name}" for name in loading)]
    kernels = public_names(root / "kernels/nvfp4_prep_kernels/__init__.py")
    parts += ["## Layouts (`nvfp4_prep_kernels`)", *(f"::: nvfp4_prep_kernels.{name}" for name in kernels)]
    return "\n\n".join(parts) + "\n"


def command_line_page(root: Path) -> str:
    """Return the page with the help text of every command, as the program prints it at 80 columns."""
    text = _help(root)
    commands = re.findall(r"^  ([a-z][a-z-]+)  ", text, re.MULTILINE)
    parts = ["# Command line", f"```text\n{text}\n```"]
    for name in dict.fromkeys(commands):
        parts += [f"## {name}", f"```text\n{_help(root, name)}\n```"]
    return "\n\n".join(parts) + "\n"


def _help(root: Path, *command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(root / "converter"), "COLUMNS": "80", "NO_COLOR": "1"}
    script = "from nvfp4_prep.cli import main; import sys; sys.argv[0] = 'nvfp4-prep'; main()"
    words = [sys.executable, "-c", script, *command, "--help"]
    return subprocess.run(words, env=environment, check=True, capture_output=True, text=True).stdout.rstrip()
