"""What the pages say of kernels, smoke runs and conversions: values for the texts in quotes/, from the results."""

from __future__ import annotations

from typing import Any

from recorded import Recorded, bold, gb, percent, short, spread, table

Row = dict[str, Any]
LABELS = {
    "copy of the size of w13_weight": "device-to-device copy",
    "prepare w13_weight": "prepare w13 codes",
    "prepare w13_weight from one tensor an expert": "prepare w13 codes, one source tensor an expert",
    "prepare w13_weight_scale": "prepare w13 scales",
    "prepare w2_weight": "prepare w2 codes (only where they are not in place)",
    "prepare w2_weight_scale": "prepare w2 scales",
    "inverse w13_weight": "inverse w13 codes",
    "inverse w13_weight_scale": "inverse w13 scales",
    "inverse w2_weight": "inverse w2 codes",
    "inverse w2_weight_scale": "inverse w2 scales",
    "prepare: what has to move": "everything that has to move (w13 codes, both scales)",
    "vLLM's preparation": "vLLM's preparation of the same tensors",
}
OURS, THEIRS = "prepare: what has to move", "vLLM's preparation"


def prepare_kernels(recorded: Recorded) -> Row:
    few, whole = recorded["prepare-kernels"], recorded["prepare-kernels-layer"]
    mine, theirs = (few["memory"][name] for name in (OURS, THEIRS))
    scales = [
        row["share_of_copy"]
        for name, row in whole["rows"].items()
        if name.endswith("_scale") and not name.startswith("copy")
    ]
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
        "least_scales": percent(min(scales), 1),
        "most_scales": percent(max(scales), 1),
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
        times, own = " / ".join(f"{value:.3f}" for value in row["ms"]), row["share_of_copy_of_this_size"]
        shares = [percent(row["share_of_copy"], 1), "" if own is None else percent(own, 1)]
        cells = [label, gb(row["nbytes"]), times, f"{row['tb_per_s']:.2f}", *shares]
        lines.append(bold(cells) if name == OURS else cells)
    head = ["", "GB to move", "min / median / max ms", "TB/s", "of the copy rate", "of a copy of its size"]
    return table(head, lines)


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
        figures = [short(row["worst"]), short(row["relative"]), f"{row['cosine']:.5f}"]
        wrong = f"{row['wrong_experts']} of {row['dims']['experts']}"
        lines.append([row["mutation"], _caught(row), *figures, wrong, _caught(other), short(other["worst"])])
    name = recorded.about("smoke")["card"]
    head = ["mutation", f"caught on the {name} by", "worst", "relative error", "cosine", "experts wrong"]
    return {
        "card": name,
        "card_sizes": _sizes(card),
        "host_sizes": _sizes(host),
        "clean": "passes" if not any(row["caught"] for row in clean) else "**does not pass**",
        "count": len(found),
        "table": table([*head, "caught on the CPU by", "worst"], lines),
    }


def _caught(row: Row) -> str:
    return ", ".join(row["by"]) if row["caught"] else "**not caught**"


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


def measured_with(recorded: Recorded) -> Row:
    parts = ("prepare-kernels", "prepare-kernels-layer", "smoke", "smoke-host", "compile-flashinfer")
    rows = []
    for part in parts:
        about = recorded.about(part)
        rows.append([part, f"`{about['command']}`", about["where"], about["commit"]])
    return {"table": table(["part", "command", "where and when", "commit"], rows)}


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
    "measured-with": measured_with,
    "readme-prepare": prepare_kernels,
    "convert": convert,
    "trtllm-kernels": trtllm_kernels,
}
