"""What docs/loading.md and README.md say of loading: values for the texts in quotes/, from the results."""

from __future__ import annotations

import re
from typing import Any

from recorded import DASH, TIMES, Recorded, bold, gb, reach, spread, table

Row = dict[str, Any]
WHOLE, TP2, TP8, EP8 = "full layer", "full layer, TP2", "full layer, TP8", "EP8, one layer"


def way(recorded: Recorded, name: str) -> list[Row]:
    """Rows of the comparison that did not fail: ``original``, ``prepared``, ``ours`` or ``pinned``."""
    return [row for row in recorded["load"]["sides"] if row["way"] == name and "failed" not in row]


def ours(recorded: Recorded) -> Row:
    return way(recorded, "ours")[0]


def pinned(recorded: Recorded) -> Row:
    return way(recorded, "pinned")[0]


def best_original(recorded: Recorded) -> Row:
    return min(way(recorded, "original"), key=lambda row: row["median"])


def vllm_rows(recorded: Recorded) -> list[Row]:
    """The original, the prepared checkpoint through vLLM's default, and through this package's load format."""
    rows: list[Row] = recorded["load-vllm"]["rows"]
    return rows


def default_point(recorded: Recorded) -> Row:
    """The row of the sweep with the loader's default options on that machine."""
    options = recorded["load"]["options"]
    wanted = (options["thread_count"], options["chunk_nbytes"] / 2**20, options["buffer_count"])
    rows = recorded["load"]["sweep"]
    return next(row for row in rows if (row["threads"], row["chunk_mib"], row["buffers"]) == wanted)


def cold_rows(recorded: Recorded) -> dict[str, Row]:
    """Rows of the cold disk that did not fail: ours by kind of I/O, others by loader."""
    rows = [row for row in recorded["load"]["cold"] if "failed" not in row]
    return {row.get("direct_io") or row.get("loader") or row["way"]: row for row in rows}


def share(recorded: Recorded, side: str) -> Row:
    """One row of the other shares, by its name in the table."""
    rows: list[Row] = recorded["load"]["shares"]
    return next(row for row in rows if row["side"] == side)


def worst_ratio(recorded: Recorded) -> float:
    return max(float(row["worst_ratio"]) for row in recorded["load-host"]["rows"])


def bit_equal(recorded: Recorded) -> bool:
    return not any(recorded["load-vllm"]["different"].values())


def _vllm_name(row: Row) -> str:
    return str(row["side"]).replace("nvfp4_prep", "`--load-format nvfp4_prep`")


def _extra_memory(row: Row) -> str:
    size = gb(row["profile"]["extra_device_nbytes"])
    return size if size == "0" else f"{size} GB"


def load(recorded: Recorded) -> Row:
    rows = []
    for row in recorded["load"]["sides"]:
        figures = [f"failed: {row['failed']}", ""] if "failed" in row else [spread(row), f"{row['gb_per_s']:.1f}"]
        cells = [row["side"], *figures]
        rows.append(bold(cells) if row["way"] == "ours" else cells)
    figures = recorded["load"]
    return {
        **recorded.about("load"),
        "layers": figures["layers"],
        "experts": figures["experts"] * figures["layers"],
        "gb": gb(ours(recorded)["nbytes"]),
        "table": table(["", "s", "GB/s"], rows),
    }


def load_vllm(recorded: Recorded) -> Row:
    rows = []
    for row in vllm_rows(recorded):
        times = [spread(row["load"]), f"{row['prepare']['median']:.3f}", spread(row["total"])]
        cells = [_vllm_name(row), *times, f"{row['gb_per_s']:.1f}", _extra_memory(row)]
        rows.append(bold(cells) if row is vllm_rows(recorded)[-1] else cells)
    old, last = vllm_rows(recorded)[0]["profile"], vllm_rows(recorded)[-1]
    return {
        **recorded.about("load-vllm"),
        "experts": recorded["load-vllm"]["experts"],
        "gb": gb(last["nbytes"]),
        "old": old,
        "new": last["profile"],
        "new_queue_ms": 1e3 * last["profile"]["weight_loaders"],
        "new_iterator_ms": 1e3 * last["profile"]["iterator"],
        "times": last["times_the_first"],
        "pin_ms": 1e3 * default_point(recorded)["staging_s"],
        "tensors": vllm_rows(recorded)[1]["profile"]["tensors"],
        "equal": "bit-equal" if bit_equal(recorded) else "**not equal**",
        "table": table(["", "load s", "prepare s", "total s", "GB/s", "extra GPU memory"], rows),
    }


def load_shares(recorded: Recorded) -> Row:
    rows = recorded["load"]["shares"]
    exact = all(row["read_nbytes"] == row["parameter_nbytes"] for row in rows)
    cells = [[row["side"], f"{gb(row['nbytes'])} GB", spread(row), f"{row['gb_per_s']:.1f}"] for row in rows]
    whole = share(recorded, WHOLE)["median"]
    return {
        "tp2_times": share(recorded, TP2)["median"] / whole,
        "tp8_times": share(recorded, TP8)["median"] / whole,
        "read": "bytes read equal the share in every row" if exact else "**bytes read differ from the share**",
        "table": table(["", "share", "s", "GB/s"], cells),
    }


def load_cold(recorded: Recorded) -> Row:
    rows = cold_rows(recorded)
    automatic = rows["automatic"]
    originals = [row for row in rows.values() if row["way"] == "original"]
    return {
        "gb": gb(automatic["nbytes"]),
        "direct": spread(rows["direct I/O"]),
        "cached": spread(rows["page cache"]),
        "automatic": spread(automatic),
        "chosen": "direct I/O" if automatic["counts"]["direct_nbytes"] else "the page cache",
        "rate": automatic["gb_per_s"],
        "originals": ", ".join(f"{row['loader']} {spread(row)} s" for row in originals),
        "preparation": "with" if all(row["vllm_preparation"] for row in originals) else "without",
    }


def load_host(recorded: Recorded) -> Row:
    figures = recorded["load-host"]
    shown = {(1, 1), (1, 8), (2, 1), (2, 8), (4, 4), (8, 1), (8, 2)}
    cells = []
    for row in figures["rows"]:
        if (row["tp"], row["ep"]) in shown:
            counts = [f"{row['worst_ratio']:.4f}", f"{row['reads']}", f"{row['pages_mb']:.1f}"]
            cells.append([f"{row['tp']}", f"{row['ep']}", f"{row['share_mb']:.1f}", *counts])
    return {
        "experts": figures["experts"],
        "combinations": len(figures["rows"]),
        "most_ep": max(row["ep"] for row in figures["rows"]),
        "worst": worst_ratio(recorded),
        "pages": max(row["pages_mb"] / row["share_mb"] for row in figures["rows"]),
        "table": table(["TP", "EP", "share MB", "read / share, worst rank", "reads", "pages touched MB"], cells),
    }


def load_aims(recorded: Recorded) -> Row:
    """What is reached in all runs on file, marked where it misses its aim; the aims stand in the text."""
    runs = recorded.runs("load", "load-vllm")
    times = [vllm_rows(run)[-1]["times_the_first"] for run in runs]
    extra = [run["load"]["extra_memory"] for run in runs]
    host = [max(run["staging_nbytes"], run["host_nbytes"]) for run in extra]
    device = [max(run["torch_nbytes"], run["driver_nbytes"]) for run in extra]
    of_bus = [ours(run)["gb_per_s"] / pinned(run)["gb_per_s"] for run in runs]
    of_best = [best_original(run)["median"] / ours(run)["median"] for run in runs]
    equal = [run["load"]["bit_equal"] and bit_equal(run) for run in runs]
    inside = [share for run in runs for share in shares_of_bus_inside_vllm(run)]
    worst = worst_ratio(recorded)
    rates = f"{ours(recorded)['gb_per_s']:.1f} of {pinned(recorded)['gb_per_s']:.1f} GB/s in the newest"
    within = [a <= 2**30 and b <= 2**28 for a, b in zip(host, device, strict=True)]
    return {
        "runs": len(runs),
        "dates": ", ".join(dict.fromkeys(run.about("load-vllm")["date"] for run in runs)),
        "against_vllm": judged([value >= 13 for value in times], reach(times, f"{{:.1f}} {TIMES}")),
        "read": judged([worst <= 1.01], f"{worst:.4f}"),
        "memory": judged(
            within, f"{max(host) / 2**20:.0f} MiB (pinned staging), {max(device) / 2**20:.0f} MiB on the device"
        ),
        "equal": judged(equal, "yes" if all(equal) else "no"),
        "tp2": _judged_share(recorded, "TP2 as a server", 2, 0.9),
        "tp8": _judged_share(recorded, "TP8 mapping", 8, 0.8),
        "of_bus": judged(
            [value >= 0.9 for value in of_bus],
            f"{reach([100 * value for value in of_bus], '{:.0f} %')} ({rates}); inside vLLM's loads of a full layer"
            f" {reach([100 * value for value in inside], '{:.0f} %')}",
        ),
        "of_best": judged(
            [value >= 2 for value in of_best],
            f"{reach(of_best, f'{{:.2f}} {TIMES}')} ({best_original(recorded)['loader']})",
        ),
    }


def _judged_share(recorded: Recorded, side: str, ranks: int, aim: float) -> str:
    shares = ep_shares(recorded, side, ranks)
    return judged([share >= aim for share in shares], reach([100 * share for share in shares], "{:.0f}") + " %")


def judged(met: list[bool], figure: str) -> str:
    """A figure, and in how many runs it missed its aim."""
    if all(met):
        return figure
    missed = "missed" if not any(met) else f"missed in {met.count(False)} of {len(met)} runs"
    return f"**{missed}**: {figure}"


def shares_of_bus_inside_vllm(recorded: Recorded) -> list[float]:
    """The loader's own rates in vLLM's loads over the pinned rate of the same run."""
    texts = vllm_rows(recorded)[-1]["reports"]
    rates = [float(rate) for text in texts for rate in re.findall(r"\(([\d.]+) GB/s\)", text)]
    return [rate / pinned(recorded)["gb_per_s"] for rate in rates]


def load_why(recorded: Recorded) -> Row:
    """Where the reading threads' time goes, and what more of them would do."""
    row, sweep = ours(recorded), recorded["load"]["sweep"]
    times, all_threads = row["thread_seconds"], row["threads"] * row["last"]
    near = [each["gb_per_s"] for each in sweep if 8 <= each["threads"] <= 14 and each["chunk_mib"] == 4]
    most = max(sweep, key=lambda item: (item["threads"], item["chunk_mib"], item["buffers"]))
    return {
        "cpus": recorded.about("load")["cpus"],
        "threads": row["threads"],
        "inside": 100 * times["read"] / all_threads,
        "waiting": 100 * times["wait"] / all_threads,
        "each": row["read_nbytes"] / times["read"] / 1e9,
        "near": reach(near, "{:.0f}"),
        "most": most["threads"],
        "most_rate": most["gb_per_s"],
    }


def readme_load(recorded: Recorded) -> Row:
    rows = []
    for row in vllm_rows(recorded):
        cells = [_vllm_name(row), spread(row["total"]), _extra_memory(row)]
        rows.append(bold(cells) if row is vllm_rows(recorded)[-1] else cells)
    named = {"whole": share(recorded, WHOLE), "tp2": share(recorded, TP2)}
    named |= {"tp8": share(recorded, TP8), "ep8": share(recorded, EP8)}
    last, cold, runs = vllm_rows(recorded)[-1], cold_rows(recorded), recorded.runs("load-vllm")
    return {
        **recorded.about("load-vllm"),
        "experts": recorded["load-vllm"]["experts"],
        "gb": gb(last["nbytes"]),
        "first_s": vllm_rows(recorded)[0]["total"]["median"],
        "last_s": last["total"]["median"],
        "table": table(["", f"total s, median (min {DASH} max)", "extra GPU memory at the peak"], rows),
        "times": reach([vllm_rows(run)[-1]["times_the_first"] for run in runs], "{:.1f}"),
        "runs": len(runs),
        "rate": last["gb_per_s"],
        "bus": pinned(recorded)["gb_per_s"],
        "few": recorded["load"]["experts"] * recorded["load"]["layers"],
        "rivals": len(way(recorded, "original")),
        "best": best_original(recorded)["median"],
        "ours": ours(recorded)["median"],
        "cold": cold["automatic"]["median"],
        "cold_original": cold["safetensors"]["median"],
        "cold_gb": gb(cold["automatic"]["nbytes"]),
        "cold_rate": cold["automatic"]["gb_per_s"],
        "worst": worst_ratio(recorded),
        "combinations": len(recorded["load-host"]["rows"]),
        **{name: row["median"] for name, row in named.items()},
        **{f"{name}_gb": gb(row["nbytes"]) for name, row in named.items()},
    }


RANKS = {
    "EP{}": "EP {0}, each rank its own experts",
    "TP{} as a server": "TP {0}, as vLLM and SGLang load: w13 read from the start, columns of w2 exchanged",
    "TP{} cooperative 256 MiB": "TP {0}, `load_layer(..., group=...)`",
    "TP{} mapping": 'TP {0}, each rank alone, `gather="mmap"`',
    "TP{} rows": 'TP {0}, each rank alone, `gather="rows"`',
    "EP{} kvikio": "EP {0}, the same shares read by kvikio",
}


def load_ranks(recorded: Recorded) -> Row:
    """All ranks of a host at once, by every way, in the newest run, and their share of EP's rate in all runs."""
    newest, lines = recorded["load-ranks"]["rows"], []
    for ranks in dict.fromkeys(row["ranks"] for row in newest):
        for side, label in RANKS.items():
            for row in newest:
                if row["side"] == side.format(ranks):
                    shares = [100 * share for share in ep_shares(recorded, row["side"], ranks)]
                    figures = [spread(row), f"{row['gb_per_s']:.1f}", f"{row['read_nbytes'] / row['nbytes']:.2f}"]
                    lines.append([label.format(ranks), *figures, reach(shares, "{:.0f}") + " %"])
    head = ["", f"s, median (min {DASH} max)", "GB/s of the host", "read / file", "of EP's rate, all runs"]
    return {
        **recorded.about("load-ranks"),
        "experts": recorded["load-ranks"]["experts"],
        "gb": gb(newest[0]["nbytes"]),
        "runs": len(recorded.runs("load-ranks")),
        "table": table(head, lines),
    }


def ep_shares(recorded: Recorded, side: str, ranks: int) -> list[float]:
    """Rates of one side over expert parallelism's with as many ranks, in every run on file that has both."""
    shares = []
    for run in recorded.runs("load-ranks"):
        medians = {row["side"]: row["median"] for row in run["load-ranks"]["rows"]}
        if side in medians:
            shares.append(medians[f"EP{ranks}"] / medians[side])
    return shares


KIMI_LAYERS, KIMI_EXPERTS, KIMI_GB = 60, 384, 591


def start(recorded: Recorded) -> Row:
    """The start of a model by every loader, and what one tensor of the original costs."""
    figures = recorded["start"]
    rows = [row for row in figures["rows"] if "failed" not in row]
    first, last = rows[0], rows[-1]
    lines = []
    for row in rows:
        times = [f"{row[name]['median']:.2f}" for name in ("construct", "load", "prepare")]
        cells = [_vllm_name(row), *times, spread(row["total"], 2)]
        cells.append(f"{first['total']['median'] / row['total']['median']:.1f} {TIMES}")
        lines.append(bold(cells) if row is last else cells)
    tensors, kimi = figures["tensors"], KIMI_LAYERS * KIMI_EXPERTS * 12
    each = first["load"]["median"] / tensors["original"]
    return {
        **recorded.about("start"),
        "layers": figures["layers"],
        "experts": figures["experts"],
        "gb": gb(figures["nbytes"]),
        "expert_gb": gb(figures["expert_nbytes"]),
        "original": tensors["original"],
        "prepared": tensors["prepared"],
        "equal": "bit-equal" if not any(figures["different"].values()) else "**not equal**",
        "table": table(["", "construct s", "load s", "prepare s", "total s", "speed-up"], lines),
        "each_ms": 1e3 * each,
        "kimi_tensors": kimi,
        "kimi_s": kimi * each,
        "rate": figures["nbytes"] / last["load"]["median"] / 1e9,
        "kimi_ours_s": KIMI_GB / (figures["nbytes"] / last["load"]["median"] / 1e9),
        "kimi_gb": KIMI_GB,
        "disk_s": KIMI_GB / 10,
    }


def headline(recorded: Recorded) -> Row:
    """The start of a model: stock vLLM, the original with the best other loader, and this package's load format."""
    figures = recorded["start"]
    rows = [row for row in figures["rows"] if "failed" not in row]
    others = [row for row in rows if row["side"].startswith("original")][1:]
    best = min(others, key=lambda row: row["total"]["median"])
    return {
        **recorded.about("start"),
        "layers": figures["layers"],
        "gb": gb(figures["nbytes"], 1),
        "first_s": rows[0]["total"]["median"],
        "best_s": best["total"]["median"],
        "best": best["side"].removeprefix("original, "),
        "last_s": rows[-1]["total"]["median"],
    }


def slow_storage(recorded: Recorded) -> Row:
    """Eight ranks and one on storage with a delay: a column for each delay."""
    figures = recorded["slow-storage"]
    rows = [row for row in figures["rows"] if "before" not in row["side"]]
    delays = list(dict.fromkeys(row["delay_ms"] for row in rows))
    lines = []
    for ranks, side in dict.fromkeys((row["ranks"], row["side"]) for row in rows):
        mine = [row for row in rows if (row["ranks"], row["side"]) == (ranks, side)]
        reads = reach([row["reads"] for row in mine], "{:,}")
        read = reach([row["read_nbytes"] / figures["file_nbytes"] for row in mine], "{:.2f}")
        cells = [f"{ranks}", side, *(f"{row['median']:.2f} s" for row in mine), reads, read]
        lines.append(bold(cells) if side.endswith("together") else cells)
    together, longest = figures["ranks"], max(delays)
    slowest = {row["side"]: row["median"] for row in rows if (row["ranks"], row["delay_ms"]) == (together, longest)}
    equal = all(row["bit_equal"] for row in figures["rows"] if "bit_equal" in row)
    return {
        **recorded.about("slow-storage"),
        "experts": figures["experts"],
        "ranks": figures["ranks"],
        "mb": f"{figures['file_nbytes'] / 1e6:.0f}",
        "times": slowest["source, vLLM's default"] / slowest["prepared, the ranks together"],
        "delays": ", ".join(f"{ms:g}" for ms in delays[:-1]),
        "slowest": f"{longest:g}",
        "equal": "bit-equal" if equal else "NOT bit-equal",
        "table": table(["ranks", "", *(f"{ms:g} ms a read" for ms in delays), "reads", "read / file"], lines),
    }


VALUES = {
    "start": start,
    "slow-storage": slow_storage,
    "load-ranks": load_ranks,
    "load": load,
    "load-vllm": load_vllm,
    "load-shares": load_shares,
    "load-cold": load_cold,
    "load-host": load_host,
    "load-aims": load_aims,
    "load-why": load_why,
    "readme-headline": headline,
    "readme-load": readme_load,
}
