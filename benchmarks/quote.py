"""Writes the figures of the documentation from benchmarks/results: no figure of a benchmark is typed by hand.

    make figures                          # or: python benchmarks/quote.py
    python benchmarks/quote.py --check    # exit code 1 if a page would change

What stands in a page between ``<!-- figures: NAME -->`` and ``<!-- /figures -->`` is benchmarks/quotes/NAME.md with the
values that values_loading.py, values_kernels.py or values_scaling.py takes from the results. docs/pictures/loading.svg
is drawn from them.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import values_kernels
import values_loading
import values_scaling
from recorded import RESULTS, Recorded

ROOT = Path(__file__).parents[1]
TEXTS = Path(__file__).parent / "quotes"
PAGES = (
    "README.md",
    "docs/loading.md",
    "docs/loading-notes.md",
    "docs/start-of-a-server.md",
    "docs/gpu-proof.md",
    "docs/gpu-proof-notes.md",
    "docs/performance.md",
    "docs/which-kernel.md",
)
PICTURE = "docs/pictures/loading.svg"
VALUES = values_loading.VALUES | values_kernels.VALUES | values_scaling.VALUES
_MARKED = re.compile(r"(<!-- figures: ([a-z-]+) -->\n)(.*?)(<!-- /figures -->)", re.DOTALL)


def quote(name: str, recorded: Recorded) -> str:
    """One text with its figures.

    Raises:
        KeyError: for a name that has no values.
    """
    values = VALUES[name](recorded)
    return (TEXTS / f"{name}.md").read_text(encoding="utf-8").strip("\n").format(**values)


def quoted(page: str, recorded: Recorded) -> str:
    """A page with its figures as the results have them, wrapped as all pages are."""
    text = _MARKED.sub(lambda found: f"{found[1]}\n{quote(found[2], recorded)}\n\n{found[4]}", page)
    return str(_loaded("site/wrap_prose.py").wrapped(text))


def picture(recorded: Recorded) -> str:
    """The picture of the load times."""
    return str(_loaded("pictures/draw.py").draw_loading(recorded["load-vllm"], recorded["load"]))


def _loaded(script: str) -> Any:
    """A script of docs/ as a module."""
    spec: Any = importlib.util.spec_from_file_location(Path(script).stem, ROOT / "docs" / script)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_pages(*, check: bool = False, results: Path = RESULTS) -> list[str]:
    """Brings all pages up to date, or with ``check`` only says which are not; returns their names."""
    recorded, changed = Recorded(results), []
    for name in (*PAGES, PICTURE):
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        new = picture(recorded) if name == PICTURE else quoted(text, recorded)
        if new != text:
            changed.append(name)
            if not check:
                path.write_text(new, encoding="utf-8")
    return changed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    changed = write_pages(check=options.check)
    print("\n".join(changed) if changed else "pages and results agree")
    sys.exit(bool(changed) and options.check)


if __name__ == "__main__":
    main()
