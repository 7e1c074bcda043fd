"""The start of a whole model: from vLLM's construction of it to parameters that its kernels read.

    python benchmarks/bench_start.py --directory /dev/shm --layers 8 --experts 96

A DeepSeek-V3 of Kimi-K2.5's sizes with fewer layers and experts: a dense layer, then MoE layers with their attention,
router and shared experts in bfloat16, random bytes. vLLM's own Python code, as vllm_load.py brings it up, on one GPU:
the original and the prepared checkpoint, each through vLLM's default loader, fastsafetensors and InstantTensor where
they are installed, and the prepared one with ``--load-format nvfp4_prep``. Interleaved; the first turn is compared byte
by byte and not timed. Exit code 1 if parameters differ.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import importlib.util
import json
import shutil
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from load_data import KIMI
from measuring import spread
from vllm_checkpoints import write_model
from vllm_load import BIG, answer_as_a_gpu, bring_up, build_model, experts_of, load_model, snapshot

from support.serving.vllm_on_cpu import make_vllm_config, rank_of

LOADERS = {"auto": "vLLM's default", "fastsafetensors": "fastsafetensors", "instanttensor": "InstantTensor"}


@dataclass
class Start:
    """One way to start. Seconds of each turn: of construction, loading, preparation, and all three."""

    checkpoint: str
    directory: Path
    load_format: str
    construct: list[float] = field(default_factory=list)
    load: list[float] = field(default_factory=list)
    prepare: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)
    failed: str = ""

    @property
    def name(self) -> str:
        loader = LOADERS.get(self.load_format, self.load_format)
        version = _version(self.load_format)
        return f"{self.checkpoint}, {loader}{f' {version}' if version else ''}"

    def config(self) -> Any:
        return make_vllm_config(self.directory, load={"use_tqdm_on_load": False, "load_format": self.load_format})

    def once(self) -> list[Any]:
        """Build, load and prepare; return the experts' modules."""
        begun = time.perf_counter()
        config = self.config()
        loader, model = build_model(config)
        torch.cuda.synchronize()
        built = time.perf_counter()
        load_model(config, loader, model)
        loaded = time.perf_counter()
        experts = experts_of(model)
        for module in experts:
            module.quant_method.process_weights_after_loading(module)
        torch.cuda.synchronize()
        done = time.perf_counter()
        for into, seconds in (
            (self.construct, built - begun),
            (self.load, loaded - built),
            (self.prepare, done - loaded),
            (self.total, done - begun),
        ):
            into.append(seconds)
        return experts

    def row(self) -> dict[str, Any]:
        known = {"side": self.name, "checkpoint": self.checkpoint, "load_format": self.load_format}
        if self.failed:
            return {**known, "failed": self.failed}
        times = {name: spread(getattr(self, name)) for name in ("construct", "load", "prepare", "total")}
        return {**known, **times, "seconds": self.total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True, help="memory-backed: 5.5 GB for 96 experts a layer")
    parser.add_argument("--layers", type=int, default=8, help="MoE layers")
    parser.add_argument("--experts", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    bring_up()
    answer_as_a_gpu()
    dims = replace(KIMI, experts=arguments.experts)
    base = Path(tempfile.mkdtemp(prefix="start-", dir=arguments.directory))
    try:
        begun = time.perf_counter()
        source, prepared = write_model(base, dims, arguments.layers, torch.device("cuda"))
        print(f"files built in {time.perf_counter() - begun:.1f} s", flush=True)
        found = [name for name in LOADERS if name == "auto" or importlib.util.find_spec(name) is not None]
        sides = [Start("original", source, name) for name in found]
        sides += [Start("prepared", prepared, name) for name in [*found, "nvfp4_prep"]]
        with rank_of(sides[0].config()):
            different, expert_nbytes = measure(sides, arguments.repeats)
        nbytes = sum(path.stat().st_size for path in prepared.glob("*.safetensors"))
        tensors = {side.checkpoint: _tensors(side.directory) for side in sides}
    finally:
        shutil.rmtree(base)
    rows = [side.row() for side in sides]
    figures = {
        "layers": arguments.layers,
        "experts": arguments.experts,
        "nbytes": nbytes,
        "expert_nbytes": expert_nbytes,
        "tensors": tensors,
        "repetitions": arguments.repeats,
        "rows": rows,
        "different": different,
    }
    show(rows)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    sys.exit(any(different.values()))


def measure(sides: list[Start], repeats: int) -> tuple[dict[str, list[str]], int]:
    """Take turns; return what differs from vLLM's own load of the original, and the bytes of the experts."""
    different: dict[str, list[str]] = {}
    expected: list[dict[str, torch.Tensor]] = []
    nbytes = 0
    for turn in range(repeats + 1):
        for side in sides:
            if side.failed:
                continue
            try:
                experts = side.once()
            except Exception as error:
                side.failed = f"{type(error).__name__}: {error}"[:300]
                traceback.print_exc()
                continue
            print(f"  {side.name}: {side.total[-1]:.3f} s (load {side.load[-1]:.3f})", flush=True)
            if turn == 0:
                for times in (side.construct, side.load, side.prepare, side.total):
                    times.clear()
                expected = expected or [snapshot(module) for module in experts]
                different[side.name] = [
                    f"layer {number}: {name}"
                    for number, (module, right) in enumerate(zip(experts, expected, strict=True))
                    for name, found in snapshot(module).items()
                    if not torch.equal(found, right[name])
                ]
                nbytes = sum(getattr(module, name).numel() for module in experts for name in BIG)
                print(f"  {side.name}: bit-equal: {different[side.name] or 'yes'}", flush=True)
            del experts
            gc.collect()
            torch.cuda.empty_cache()
    return different, nbytes


def show(rows: list[dict[str, Any]]) -> None:
    first = rows[0]["total"]["median"]
    print("\n| | construct s | load s | prepare s | total s: min median max | times the first |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        if "failed" in row:
            print(f"| {row['side']} | failed: {row['failed']} | | | | |")
            continue
        construct, load, prepare = (row[name]["median"] for name in ("construct", "load", "prepare"))
        total = " ".join(f"{row['total'][name]:.3f}" for name in ("min", "median", "max"))
        ratio = first / row["total"]["median"]
        print(f"| {row['side']} | {construct:.3f} | {load:.3f} | {prepare:.3f} | {total} | {ratio:.1f} |")


def _tensors(directory: Path) -> int:
    return len(json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"])


def _version(load_format: str) -> str:
    try:
        return importlib.metadata.version(load_format)
    except importlib.metadata.PackageNotFoundError:
        return ""


if __name__ == "__main__":
    main()
