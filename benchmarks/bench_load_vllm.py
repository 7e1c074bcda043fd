"""The whole load as vLLM does it: one full Kimi-K2.5 layer from a directory to kernel-ready parameters on a GPU.

    python benchmarks/run.py --only load-vllm --memory /mnt/memory

vLLM's own Python code, as vllm_load.py brings it up: once on the original checkpoint, once on the prepared one through
the same loader, and once on the prepared one with --load-format nvfp4_prep. Interleaved; the first turn is profiled,
compared byte by byte and not timed. Exit code 1 if parameters differ.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from load_data import KIMI
from measuring import spread
from vllm_checkpoints import write_directories
from vllm_load import bring_up, load, snapshot

from support.serving.vllm_on_cpu import make_vllm_config, rank_of

ORIGINAL, THROUGH_VLLM, OURS = "original, vLLM's default", "prepared, vLLM's default", "prepared, nvfp4_prep"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True, help="memory-backed, 19 GB")
    parser.add_argument("--experts", type=int, default=KIMI.experts)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--options", type=json.loads, default={}, help="LoadOptions of nvfp4_prep as JSON")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    bring_up()
    import vllm

    begun = time.perf_counter()
    dims = replace(KIMI, experts=arguments.experts)
    source, prepared = write_directories(arguments.directory, dims, torch.device("cuda"))
    print(f"vLLM {vllm.__version__}; files built in {time.perf_counter() - begun:.1f} s", flush=True)
    ours = {"load_format": "nvfp4_prep", "model_loader_extra_config": arguments.options}
    sides = {ORIGINAL: (source, {}), THROUGH_VLLM: (prepared, {}), OURS: (prepared, ours)}
    with rank_of(config_of(source, {})):
        turns, profiles, different = measure(sides, arguments.repeats)
    rows = [row_of(name, turns[name], profiles[name]) for name in sides]
    for row in rows:
        row["times_the_first"] = rows[0]["total"]["median"] / row["total"]["median"]
    show(rows)
    figures = {"experts": dims.experts, "repetitions": arguments.repeats, "rows": rows, "different": different}
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    sys.exit(any(different.values()))


def config_of(directory: Path, options: dict[str, Any]) -> Any:
    return make_vllm_config(directory, load={"use_tqdm_on_load": False, **options})


def measure(
    sides: dict[str, tuple[Path, dict[str, Any]]], repeats: int
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, dict[str, Any]], dict[str, list[str]]]:
    """The timed loads, the profile of the first, and which tensors differ from vLLM's own preparation."""
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    profiles: dict[str, dict[str, Any]] = {}
    different: dict[str, list[str]] = {}
    expected: dict[str, torch.Tensor] = {}
    for turn in range(repeats + 1):
        for name, (directory, options) in sides.items():
            experts, got = load(config_of(directory, options), profile=turn == 0)
            if turn == 0:
                profiles[name], found = got, snapshot(experts)
                expected = expected or found
                different[name] = [key for key in expected if not torch.equal(expected[key], found[key])]
                print(f"{name}: bit-equal to vLLM's own preparation: {different[name] or 'yes'}", flush=True)
            else:
                turns[name].append(got)
                print(f"  {name}: load {got['load']:.4f} s, prepare {got['prepare']:.4f} s", flush=True)
            del experts
            gc.collect()
            torch.cuda.empty_cache()
    return turns, profiles, different


def row_of(name: str, turns: list[dict[str, Any]], profile: dict[str, Any]) -> dict[str, Any]:
    total = statistics.median(turn["total"] for turn in turns)
    return {
        "side": name,
        "nbytes": turns[0]["nbytes"],
        "load": {**spread([turn["load"] for turn in turns]), "seconds": [turn["load"] for turn in turns]},
        "prepare": spread([turn["prepare"] for turn in turns]),
        "total": spread([turn["total"] for turn in turns]),
        "gb_per_s": turns[0]["nbytes"] / total / 1e9,
        "profile": profile,
        "reports": [turn["report"] for turn in turns if turn["report"] is not None],
    }


def show(rows: list[dict[str, Any]]) -> None:
    print("\n| side | load s: min median max | prepare s | total s | GB/s | against the first | extra GPU GB |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        low, middle, high = (row["load"][key] for key in ("min", "median", "max"))
        print(
            f"| {row['side']} | {low:.3f} {middle:.3f} {high:.3f} | {row['prepare']['median']:.3f}"
            f" | {row['total']['median']:.3f} | {row['gb_per_s']:.1f} | {row['times_the_first']:.1f} x"
            f" | {row['profile']['extra_device_nbytes'] / 1e9:.2f} |"
        )
    print("\nwhere the first, profiled load went:")
    for row in rows:
        print(f"- {row['side']}: {json.dumps(row['profile'])}")


if __name__ == "__main__":
    main()
