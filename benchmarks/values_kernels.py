"""What the pages say of kernels, smoke runs and conversions: values for the texts in quotes/, from the results."""

from __future__ import annotations

from typing import Any

from recorded import Recorded, bold, gb, percent, short, spread, table

Row = dict[str, Any]
LABELS = {
    "copy of the size of w13_weight": "device-to-device copy",
    "prepare w13_weight": "prepare w13 codes",
    "prepare w13_weight_scale": "prepare w13 scales",
    "prepare w2_weight_scale": "prepare w2 scales",
    "prepare: what has to move": "everything that has to move (w13 codes, both scales)",
    "vLLM's preparation": "vLLM's preparation of the same tensors",
}
OURS, THEIRS = "prepare: what has to move", "vLLM's preparation"


def prepare_kernels(recorded: Recorded) -> Row:
    few, whole = recorded["prepare-kernels"], recorded["prepare-kernels-layer"]
    mine, theirs = (few["memory"][name] for name in (OURS, THEIRS))
    return {
        **recorded.about("prepare-kernels"),
        "experts": few["experts"],
        "table": _kernel_table(few["rows"]),
        "times": few["rows"][THEIRS]["ms"][1] / few["rows"][OURS]["ms"][1],
        "our_peak": gb(mine["peak_nbytes"], 3),
        "our_result": gb(mine["result_nbytes"], 3),
        "their_peak": gb(theirs["peak_nbytes"], 3),
        "their_result": gb(theirs["result_nbytes"], 3),
        "layer": whole["experts"],
        "layer_gb": gb(whole["rows"][OURS]["nbytes"], 1),
        "layer_ms": whole["rows"][OURS]["ms"][1],
        "layer_share": percent(whole["rows"][OURS]["share_of_copy"], 1),
        "layer_times": whole["rows"][THEIRS]["ms"][1] / whole["rows"][OURS]["ms"][1],
        "theirs_ms": few["rows"][THEIRS]["ms"][1],
        "ours_ms": few["rows"][OURS]["ms"][1],
    }


def trtllm_kernels(recorded: Recorded) -> Row:
    """TRTLLM-gen's layout: preparation, conversion in place, and a load that ends with it."""
    rows, load = recorded["trtllm-kernels"]["rows"], recorded["relayout-load"]
    ours, theirs = rows["prepare: all four tensors"], rows["vLLM's preparation"]
    moved = rows["relayout in place: all four tensors"]
    same, other = load["rows"]
    return {
        **recorded.about("trtllm-kernels"),
        "experts": recorded["trtllm-kernels"]["experts"],
        "ours_ms": ours["ms"][1],
        "ours_share": percent(ours["share_of_copy_of_this_size"], 1),
        "theirs_ms": theirs["ms"][1],
        "times": theirs["ms"][1] / ours["ms"][1],
        "moved_share": percent(moved["share_of_copy_of_this_size"], 1),
        "layer": load["experts"],
        "layer_gb": gb(same["nbytes"], 1),
        "same": spread(same),
        "other": spread(other),
        "ratio": load["other_over_same"],
        "load_repetitions": load["repetitions"],
    }


def _kernel_table(rows: dict[str, Row]) -> str:
    lines = []
    for name, label in LABELS.items():
        row = rows[name]
        cells = [label, gb(row["nbytes"]), f"{row['ms'][1]:.3f}", percent(row["share_of_copy"], 1)]
        lines.append(bold(cells) if name == OURS else cells)
    return table(["", "GB to move", "ms, median", "of the copy rate"], lines)


def smoke(recorded: Recorded) -> Row:
    layer = recorded["smoke"]["layer"]
    alone, *routed = layer["cases"]
    return {
        **recorded.about("smoke"),
        "backend": recorded["smoke"]["backend"],
        "layer": layer,
        "percent_off": 100 * layer["largest_relative"],
        "passed": "passed" if layer["passed"] else "**failed**",
        "fastest": min(layer["seconds"]),
        "slowest": max(layer["seconds"]),
        "runs": len(layer["seconds"]),
        "held": gb(layer["held_nbytes"]),
        "peak": gb(layer["peak_nbytes"]),
        "worst": max(layer["worst_element"], layer["worst_routed"]),
        "millions": layer["intermediate_values"] / 1e6,
        "top_k": routed[0]["top_k"],
        "each": alone["busiest"],
        "alone": alone["tokens"],
        "routed": " and ".join(f"{case['tokens']} tokens ({case['name']})" for case in routed),
    }


def mutations(recorded: Recorded) -> Row:
    card, host = recorded["smoke"]["mutations"], recorded["smoke-host"]["mutations"]
    clean = [row for row in (*card, *host) if row["mutation"] is None]
    found = [row for row in card if row["mutation"] is not None]
    by_name = {row["mutation"]: row for row in host}
    lines = []
    for row in found:
        other = by_name[row["mutation"]]
        lines.append([row["mutation"], _error(row), _error(other)])
    name = recorded.about("smoke")["card"]
    return {
        "card": name,
        "card_sizes": _sizes(card),
        "host_sizes": _sizes(host),
        "clean": "passes" if not any(row["caught"] for row in clean) else "**does not pass**",
        "count": len(found),
        "table": table(["mutation", f"{name}, Triton", "CPU, torch"], lines),
    }


def _error(row: Row) -> str:
    """The largest error in units of its tolerance, or what noticed the mutation otherwise."""
    if not row["caught"]:
        return "**not caught**"
    return short(row["worst"]) if row["worst"] > 1 else ", ".join(row["by"])


def _sizes(rows: list[Row]) -> str:
    plain, padded = (row["dims"] for row in rows if row["mutation"] is None)
    return (
        f"{plain['experts']} experts of I {plain['intermediate']}, H {plain['hidden']};"
        f" with padding I {padded['intermediate']}, H {padded['hidden']}"
    )


def compile_flashinfer(recorded: Recorded) -> Row:
    figures = recorded["compile-flashinfer"]
    cases = []
    for row in figures["rows"]:
        sizes = " and ".join(f"{size:,}" for size in row["new_cubin_nbytes"])
        cases.append(f"{row['case']} {sizes}" if sizes else f"{row['case']} none (the gated kernels)")
    return {**recorded.about("compile-flashinfer"), "versions": figures["versions"], "cases": ", ".join(cases)}


def convert(recorded: Recorded) -> Row:
    figures = recorded["convert"]
    return {
        **recorded.about("convert"),
        "gb": gb(figures["nbytes"]),
        "convert": figures["convert"]["median"],
        "copy": figures["copy"]["median"],
        "peak": gb(figures["peak_nbytes"]),
    }


VALUES = {
    "prepare-kernels": prepare_kernels,
    "smoke": smoke,
    "mutations": mutations,
    "compile-flashinfer": compile_flashinfer,
    "readme-prepare": prepare_kernels,
    "convert": convert,
    "trtllm-kernels": trtllm_kernels,
}
