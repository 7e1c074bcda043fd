"""What the pages say of scaling with cores: one table for each data set, from the results."""

from __future__ import annotations

from typing import Any

from recorded import Recorded, table

Row = dict[str, Any]
ONE_FILE = (
    "One layer is one file of experts, and one core computes its SHA-256 from front to back: more cores do not help."
    " Several layers are several files, whose digests run side by side."
)
LABELS = {"nothing shared": "independent processes", "eight cp": "eight `cp` at once", "cp -r": "`cp -r`"}
AWAITED = "No run is on file yet; `python benchmarks/run.py --only scaling` makes one."


def scaling(recorded: Recorded) -> Row:
    if "scaling" not in recorded:
        return {"text": AWAITED}
    figures, about = recorded["scaling"], recorded.about("scaling")
    rates = figures["rates"]
    lines = [
        f"Seconds after start-up and GB/s, files in memory, without the smoke test ({about['where']},"
        f" `{about['command']}`, {_repetitions(figures['repetitions'])}). One core computes"
        f" {rates['sha256_per_s'] / 1e9:.1f} GB/s of SHA-256 and copies {rates['memcpy_per_s'] / 1e9:.1f} GB/s."
        f" Peak is the largest resident memory.{_limit(figures)}{_unfinished(figures)}"
    ]
    for known in figures["sets"]:
        lines += [_about(known), _table(figures, known["name"])]
        if known["name"] == "layer":
            lines.append(ONE_FILE)
    return {"text": "\n\n".join(lines)}


def _repetitions(count: int) -> str:
    return "one repetition" if count == 1 else f"median of {count} interleaved repetitions"


def _limit(figures: Row) -> str:
    if all(row["side"] != "limit" for row in figures["rows"]):
        return ""
    return (
        " *Independent processes* is the machine's limit: one process a core does a conversion's work on w13, the"
        " costliest tensor, and shares nothing with the others."
    )


def _unfinished(figures: Row) -> str:
    return "" if figures["complete"] else " The time was over before everything was measured."


def _about(known: Row) -> str:
    sized = f"{known['nbytes'] / 1e9:.2f} GB, {known['expert_tensors']:,} tensors of experts"
    return f"{known['about'][0].upper()}{known['about'][1:]} ({sized}):"


def _table(figures: Row, data_set: str) -> str:
    rows = [row for row in figures["rows"] if row["set"] == data_set and row["side"] != "before"]
    cores = [count for count in figures["cores"] if any(row["cores"] == count for row in rows)]
    lines = []
    for command in dict.fromkeys(row["command"] for row in rows):
        mine = {row["cores"]: row for row in rows if row["command"] == command}
        peaks = [row["peak_nbytes"] for row in mine.values() if row.get("peak_nbytes")]
        peak = f"{max(peaks) / 1e9:.1f}" if peaks else ""
        label = LABELS.get(command, command)
        lines.append([label, *(_cell(mine.get(count)) for count in cores), peak])
    return table(["", *(f"{count} cores" for count in cores), "peak GB"], lines)


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if "seconds" not in row:
        return "failed"
    rate = "" if row["command"] == "plan" or row["gb_per_s"] < 0.05 else f", {row['gb_per_s']:.1f}"
    return f"{row['seconds']['median']:.2f} s{rate}"


VALUES = {"scaling": scaling}
