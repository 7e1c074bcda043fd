"""The table of models by version of vLLM, docs/vllm-models.md: written from results, and read by its test.

Each version's results are what its tests write, in an environment of ``make test-vllm VLLM=…``; run as a program with
one file a version, named by it (0.33.json), this module writes the page:

    NVFP4_PREP_VLLM_RESULTS=0.33.json … -m pytest tests/vllm/test_models.py -k 'equals_source or real_quantizers'
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

PAGE = Path(__file__).parents[3] / "docs" / "vllm-models.md"
_INTRODUCTION = """\
# Models and parallel configurations, by version of vLLM

What `make test-vllm VLLM=…` found, written by `tests/support/serving/table_by_version.py`;
`tests/vllm/test_models.py` fails where the installed version no longer does what its column says.

**bit-equal**: every parameter, scale view, alpha, activation scale and size of every rank, prepared against vLLM on the
source ([how](serving-vllm.md#how-it-was-tested)). The models are small, with random weights.

"""


def documented(page: Path = PAGE) -> dict[tuple[str, str], dict[str, str]]:
    """Return the result of each minor version, by model and parallel configuration."""
    lines = [line.strip("| ").split(" | ") for line in page.read_text().splitlines() if line.startswith("| ")]
    head, *rows = lines
    return {(row[0], row[1]): dict(zip(head[2:], row[2:], strict=True)) for row in rows}


def page_of(results: dict[str, list[dict[str, str]]]) -> str:
    """Return the page.

    Args:
        results: rows by minor version, in the order of the columns.
    """
    found: dict[tuple[str, str], dict[str, str]] = {}
    for minor, rows in results.items():
        for row in rows:
            found.setdefault((row["model"], row["configuration"]), {})[minor] = row["result"]
    lines = [["model", "parallel", *results], ["---"] * (2 + len(results))]
    lines += [[*key, *(by_version.get(minor, "not run") for minor in results)] for key, by_version in found.items()]
    texts = [f"| {' | '.join(line)} |" if line[0] != "---" else f"|{'|'.join(line)}|" for line in lines]
    return _INTRODUCTION + "\n".join(texts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page_of({Path(name).stem: json.loads(Path(name).read_text())["table"] for name in sys.argv[1:]}))
