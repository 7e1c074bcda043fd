"""Records the parameters of FlashInfer's CuteDSL fused-MoE entry points in several of its versions.

    python tests/data/make_flashinfer_signatures.py --output tests/data/flashinfer_signatures.json

pip downloads each version's wheel, about 60 MB; nothing is installed or run: the functions are found in the source.
"""

from __future__ import annotations

import argparse
import ast
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

VERSIONS = ("0.6.4", "0.6.7", "0.6.15", "0.6.18", "0.7.0", "0.7.2.post1")
FUNCTIONS = ("cute_dsl_fused_moe", "cute_dsl_fused_moe_nvfp4")

Signature = dict[str, list[str] | int]


def signature(function: ast.FunctionDef) -> Signature:
    """Names of the parameters, how many of the positional ones have defaults, which keyword-only ones have none."""
    arguments = function.args
    return {
        "positional": [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)],
        "defaults": len(arguments.defaults),
        "keyword_only": [argument.arg for argument in arguments.kwonlyargs],
        "kw_required": [
            argument.arg
            for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
            if default is None
        ],
    }


def signatures(wheel: Path) -> dict[str, Signature]:
    """Of the entry points at the top level of a module, by name.

    Raises:
        ValueError: if none is found, or one stands twice with different parameters.
    """
    found: dict[str, Signature] = {}
    with zipfile.ZipFile(wheel) as files:
        for name in sorted(files.namelist()):
            if not name.startswith("flashinfer/fused_moe/") or not name.endswith(".py"):
                continue
            for node in ast.parse(files.read(name)).body:
                if isinstance(node, ast.FunctionDef) and node.name in FUNCTIONS:
                    made = signature(node)
                    if found.setdefault(node.name, made) != made:
                        raise ValueError(f"{wheel.name}: {node.name} occurs twice")
    if not found:
        raise ValueError(f"{wheel.name}: no entry point found")
    return found


def main() -> None:
    """Writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--versions", nargs="+", default=VERSIONS)
    args = parser.parse_args()
    made: dict[str, dict[str, Signature]] = {}
    for version in args.versions:
        with tempfile.TemporaryDirectory() as folder:
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder]
            subprocess.run([*pip, f"flashinfer-python=={version}"], check=True)
            made[version] = signatures(next(Path(folder).glob("*.whl")))
    args.output.write_text(json.dumps(made, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
