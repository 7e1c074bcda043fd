"""Runs the cells of notebook.ipynb in order, without Jupyter, and stores their outputs in it.

    python examples/run_notebook.py           run, and write outputs that differ from the stored ones into the notebook
    python examples/run_notebook.py --check   run, write nothing, and fail if outputs differ in more than numbers

A cell that raises an exception ends the run, and nothing is written.

An output is what a notebook would show: what a cell prints, and the value of its last expression as SVG, HTML or text.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).resolve().with_name("notebook.ipynb")
_KINDS = {"text/html": "_repr_html_", "image/svg+xml": "_repr_svg_"}


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the stored outputs and write nothing")
    check = parser.parse_args(arguments).check
    stored = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    made = run_notebook(stored)
    print(f"{NOTEBOOK.name}: ran {sum(cell['cell_type'] == 'code' for cell in made['cells'])} code cells")
    if check:
        if different := different_cells(stored, made):
            sys.exit(f"error: the outputs of these cells differ from the stored ones: {', '.join(different)}")
        print("the outputs are as stored")
    elif made == stored:
        print("the outputs are as stored; nothing was written")
    else:
        NOTEBOOK.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        changed = [new["id"] for old, new in zip(stored["cells"], made["cells"], strict=True) if old != new]
        print(f"wrote new outputs into {NOTEBOOK}, of the cells {', '.join(changed)}")


def run_notebook(notebook: dict[str, Any]) -> dict[str, Any]:
    """Return the notebook with the outputs of a run in a folder of its own."""
    names: dict[str, Any] = {"__name__": "__main__"}
    cells, count = [], 0
    before, path = Path.cwd(), list(sys.path)
    with tempfile.TemporaryDirectory() as work:
        sys.path.insert(0, str(NOTEBOOK.parent))
        os.chdir(work)
        try:
            for cell in notebook["cells"]:
                if cell["cell_type"] == "code":
                    count += 1
                    try:
                        outputs = run_cell("".join(cell["source"]), names, count)
                    except BaseException as error:
                        error.add_note(f"in cell {cell['id']} of {NOTEBOOK.name}; nothing was written")
                        raise
                    cell = {**cell, "execution_count": count, "outputs": outputs}
                cells.append(cell)
        finally:
            os.chdir(before)
            sys.path[:] = path
    return {**notebook, "cells": cells}


def run_cell(source: str, names: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """Execute one cell and return its outputs, in Jupyter's format."""
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, f"cell {count}", "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), f"cell {count}", "eval"), names)
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": lines(printed.getvalue())})
    if value is not None:
        data = {kind: lines(getattr(value, method)()) for kind, method in _KINDS.items() if hasattr(value, method)}
        data["text/plain"] = lines(re.sub(r" at 0x[0-9a-f]+", "", repr(value)))
        outputs.append({"output_type": "execute_result", "execution_count": count, "metadata": {}, "data": data})
    return outputs


def lines(text: str) -> list[str]:
    """Return a text as notebooks store it."""
    return text.splitlines(keepends=True)


def different_cells(stored: dict[str, Any], made: dict[str, Any]) -> list[str]:
    """Return the code cells whose outputs differ in more than the numbers of their text."""
    pairs = zip(stored["cells"], made["cells"], strict=True)
    return [old["id"] for old, new in pairs if _comparable(old) != _comparable(new)]


def _comparable(cell: dict[str, Any]) -> list[Any]:
    """Digests, numbers of bytes and versions change from one release to the next; pictures are compared as they are."""
    found = []
    for output in cell.get("outputs", []):
        for kind, text in {"text": output.get("text", []), **output.get("data", {})}.items():
            joined = "".join(text)
            found.append((kind, joined if kind == "image/svg+xml" else re.sub(r"[0-9a-f]{16,}|\d[\d,.]*", "0", joined)))
    return found


if __name__ == "__main__":
    main()
