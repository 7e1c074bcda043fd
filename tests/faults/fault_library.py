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
    return None if shutil.which("cc") else "no C compiler (cc) to build the fault library with"


def build_library(folder: Path) -> Path:
    """Compile the library into a folder and return its path."""
    library = folder / "fault_points.so"
    command = ["cc", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-o", str(library), str(SOURCE), "-ldl"]
    subprocess.run(command, check=True)
    return library
