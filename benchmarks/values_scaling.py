"""What the pages say of scaling with cores: one table for each data set, from the results."""

from __future__ import annotations

from typing import Any

from recorded import Recorded, table

Row = dict[str, Any]
ONE_FILE = (
    "One layer is one file of experts, and its sha256 is taken in order: that one core is the limit, whatever there are"
    " more. Several layers are several files, whose digests run side by side."
)
AWAITED = "No run is on file yet; `python benchmarks/run.py --only scaling` makes one."


def scaling(recorded: Recorded) -> Row:
    if "scaling" not in recorded:
        return {"text": AWAITED}
    figures, about = recorded["scaling"], recorded.about("scaling")
    rates = figures["rates"]
    lines = [
        f"Seconds after start-up and GB/s, files in memory, without the smoke test ({about['where']},"
        f" `{about['command']}`, {figures['repetitions']} interleaved repetitions, median). One core does"
        f" {rates['sha256_per_s'] / 1e9:.1f} GB/s of sha256 and copies {rates['memcpy_per_s'] / 1e9:.1f} GB/s."
        f" Peak is the largest resident memory.{_before(figures)}{_limit(figures)}{_unfinished(figures)}"
    ]
    for known in figures["sets"]:
        lines += [_about(known), _table(figures, known["name"])]
        if known["name"] == "layer":
            lines.append(ONE_FILE)
    return {"text": "\n\n".join(lines)}


def _before(figures: Row) -> str:
    return f" *Before* is {figures['before'][:12]}." if figures["before"] else ""


def _limit(figures: Row) -> str:
    if all(row["side"] != "limit" for row in figures["rows"]):
        return ""
    return (
        " *Nothing shared* is what the machine can do: as many processes as cores do a conversion's work on w13, the"
        " costliest tensor, each for itself. Half of it is two sha256; the digests, the check of every byte and the"
        " write are passes that remain."
    )


def _unfinished(figures: Row) -> str:
    return "" if figures["complete"] else " The time was over before everything was measured."


def _about(known: Row) -> str:
    sized = f"{known['nbytes'] / 1e9:.2f} GB, {known['expert_tensors']:,} tensors of experts"
    return f"{known['about'][0].upper()}{known['about'][1:]} ({sized}):"


def _table(figures: Row, data_set: str) -> str:
    rows = [row for row in figures["rows"] if row["set"] == data_set]
    cores = [count for count in figures["cores"] if any(row["cores"] == count for row in rows)]
    names = list(dict.fromkeys((row["command"], row["side"]) for row in rows))
    lines = []
    for command, side in sorted(names, key=lambda name: [row["command"] for row in rows].index(name[0])):
        mine = {row["cores"]: row for row in rows if (row["command"], row["side"]) == (command, side)}
        peaks = [row["peak_nbytes"] for row in mine.values() if row.get("peak_nbytes")]
        peak = f"{max(peaks) / 1e9:.1f}" if peaks else ""
        label = f"{command}, before" if side == "before" else command
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
