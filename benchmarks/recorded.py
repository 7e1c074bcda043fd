"""The results on file, and how figures are written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
DASH, TIMES = "\N{EN DASH}", "\N{MULTIPLICATION SIGN}"


class Recorded:
    """Files of results by part name, read once."""

    def __init__(self, folder: Path = RESULTS) -> None:
        self._folder = folder
        self._known: dict[str, dict[str, Any]] = {}

    def result(self, part: str) -> dict[str, Any]:
        """The whole file: figures, command, date, machine."""
        if part not in self._known:
            self._known[part] = json.loads((self._folder / f"{part}.json").read_text(encoding="utf-8"))
        return self._known[part]

    def __contains__(self, part: str) -> bool:
        return (self._folder / f"{part}.json").is_file()

    def __getitem__(self, part: str) -> dict[str, Any]:
        """The figures of a part."""
        figures: dict[str, Any] = self.result(part)["figures"]
        return figures

    def runs(self, *parts: str) -> list[Recorded]:
        """This and the earlier runs on file, newest first: folders of ``earlier`` that hold all of these parts."""
        earlier = sorted(self._folder.glob("earlier/*/"), reverse=True)
        return [self, *(Recorded(folder) for folder in earlier if all((folder / f"{x}.json").is_file() for x in parts))]

    def about(self, part: str) -> dict[str, Any]:
        """What every text may say of a part's run: ``card``, ``cpus``, ``date``, ``commit``, ``where`` and so on."""
        result = self.result(part)
        machine = result["machine"]
        names = (("torch", "torch"), ("triton", "Triton"), ("vllm", "vLLM"), ("python", "Python"))
        versions = [f"{label} {machine[name]}" for name, label in names if machine.get(name)]
        driver = [f"driver {machine['driver']}"] if machine.get("driver") else []
        card = [machine["gpu"], *driver] if machine.get("gpu") else []
        return {
            "card": str(machine.get("gpu")).removeprefix("NVIDIA "),
            "cpus": machine["cpus"],
            "vllm": machine.get("vllm"),
            "date": result["date"],
            "commit": result["commit"][:12] + "+" * result["commit"].endswith("+"),
            "command": result["command"],
            "repetitions": result["repetitions"],
            "run_s": result["seconds"],
            "where": ", ".join([*card, f"{machine['cpus']} processors", *versions, result["date"]]),
        }


def spread(row: dict[str, float], digits: int = 3) -> str:
    """Median, and minimum and maximum behind it."""
    return f"{row['median']:.{digits}f} ({row['min']:.{digits}f} {DASH} {row['max']:.{digits}f})"


def gb(nbytes: float, digits: int = 2) -> str:
    """In 10^9 bytes, without unit; a plain 0 where nothing is left of it."""
    return f"{nbytes / 1e9:.{digits}f}" if nbytes / 1e9 >= 0.5 * 10**-digits else "0"


def reach(values: list[float], form: str) -> str:
    """One value, or the least and the largest of several."""
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"


def percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"


def short(value: float) -> str:
    """Three significant digits, or two and a power of ten: 0.00354, 27, 8.4e4."""
    if value >= 1000:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:.3g}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    lines.insert(1, "|" + "---|" * len(head))
    return "\n".join(lines).replace("|  |", "| |").replace("|  |", "| |")


def bold(cells: list[str]) -> list[str]:
    return [f"**{cell}**" if cell else cell for cell in cells]
