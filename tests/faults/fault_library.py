"""The compiled fault library."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("fault_points.c")


def missing_tool() -> str | None:
    """Return why the library cannot be used here, or None."""
    if not sys.platform.startswith("linux"):
        return "fault injection needs Linux"
    if shutil.which("cc") is None:
        return "the fault library needs a C compiler: install one that is called cc (apt-get install gcc libc6-dev)"
    return None


def build_library(folder: Path) -> Path:
    """Compile the library into a folder and return its path."""
    library = folder / "fault_points.so"
    command = ["cc", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-o", str(library), str(SOURCE), "-ldl"]
    subprocess.run(command, check=True)
    return library
