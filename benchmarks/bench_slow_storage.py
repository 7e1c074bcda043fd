"""Tensor-parallel ranks of one host on storage whose every read costs milliseconds: reads counted, seconds compared.

    python benchmarks/run.py --only slow-storage      # in vLLM's environment, as root; needs no GPU

One layer at Kimi-K2.5's dimensions with few experts lies in memory and is mounted once more with FUSE, every read of
data delayed (slow_storage.c). Eight processes load it as eight ranks into host memory, the file taken out of the page
cache before every turn; then one of them alone. Sides are interleaved: vLLM's default loader on the source, as it reads
local disks and FUSE (``lazy``) and as it reads NFS and Lustre (``prefetch``); this project at an older commit, taken
from git; and its load format inside vLLM now, with the ranks together and each alone. Reads and bytes are those that
reached the storage.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from load_data import KIMI
from machine import facts
from measuring import spread
from page_cache import drop
from slow_storage import SlowStorage, refusal
from vllm_checkpoints import write_directories

from nvfp4_prep.checkpoint.safetensors_header import read_header
from nvfp4_prep_kernels import MoeDims

HERE = Path(__file__).parent
ROOT = HERE.parent
BEFORE = "c64e05e"
SMALL = {"intermediate": 1024, "hidden": 512}
OURS = {"load_format": "nvfp4_prep"}
READ_TIMEOUT_S = 240


@dataclass(frozen=True)
class Side:
    """One way to load.

    Attributes:
        name: of the row.
        group: of processes that can do it.
        told: what they are told: a directory and LoadConfig fields for vLLM, a file otherwise.
        alone: whether one rank can do it without the others.
    """

    name: str
    group: str
    told: dict[str, Any]
    alone: bool = True


class Ranks:
    """The processes of one group, which stay."""

    def __init__(self, way: str, ranks: int, tree: Path, told: dict[str, Any]) -> None:
        self._processes, self._answers = [], []
        paths = [tree / "converter", tree / "kernels", ROOT / "tests"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "VLLM_LOGGING_LEVEL": "ERROR"}
        for rank in range(ranks):
            mine, theirs = os.pipe()
            process = subprocess.Popen(
                [sys.executable, HERE / "slow_storage_rank.py", way, str(rank), str(ranks), str(theirs)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                env=environment,
                pass_fds=(theirs,),
                text=True,
            )
            os.close(theirs)
            self._processes.append(process)
            self._answers.append(os.fdopen(mine))
        self._tell(json.dumps(told), ranks)
        self._hear(ranks)

    def load(self, told: dict[str, Any], ranks: int, ready: Any) -> list[dict[str, Any]]:
        """One turn of the first so many ranks; ``ready`` is called when all wait to begin."""
        self._tell(json.dumps(told), ranks)
        self._hear(ranks)
        ready()
        self._tell("go", ranks)
        return [json.loads(line) for line in self._hear(ranks)]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    def _tell(self, line: str, ranks: int) -> None:
        for process in self._processes[:ranks]:
            print(line, file=process.stdin, flush=True)

    def _hear(self, ranks: int) -> list[str]:
        lines = [answers.readline() for answers in self._answers[:ranks]]
        if not all(lines):
            raise RuntimeError("a rank ended: its messages are above")
        return lines


def main() -> None:
    arguments = parse()
    if reason := refusal():
        raise SystemExit(reason)
    base = Path(tempfile.mkdtemp(dir=arguments.directory, prefix="nvfp4-prep-slow-"))
    dims = replace(KIMI, experts=arguments.experts, **(SMALL if arguments.small else {}))
    groups: dict[str, Ranks] = {}
    try:
        (base / "work").mkdir()
        write_directories(base / "files", dims, torch.device("cpu"))
        give_heads(base / "files", arguments.ranks)
        before = older_tree(arguments.before, base)
        with SlowStorage(base / "files", base / "work") as storage:
            sides = sides_of(storage.root, dims)
            for group, tree in (("vllm", ROOT), ("plain", before)):
                first = next(side.told for side in sides if side.group == group)
                told = {**first, "meeting": str(base / "meeting")}
                groups[group] = Ranks(group, arguments.ranks, tree, told)
            rows = [
                row
                for ms in arguments.delay_ms
                for row in measure(sides, groups, storage, ms, arguments.ranks, arguments.repeats)
            ]
    finally:
        for group in groups.values():
            group.close()
        shutil.rmtree(base, ignore_errors=True)
    show(rows)
    figures = {"machine": facts(), "repetitions": arguments.repeats, "experts": dims.experts, "ranks": arguments.ranks}
    figures |= {"before": arguments.before, "file_nbytes": experts_nbytes(dims), "rows": rows}
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


def experts_nbytes(dims: MoeDims) -> int:
    """Codes and block scales of the layer."""
    return dims.experts * 3 * dims.intermediate * dims.hidden * 9 // 16


def give_heads(files: Path, ranks: int) -> None:
    """Let vLLM divide the model's attention, of which nothing is loaded, by the ranks too."""
    for path in files.glob("*/config.json"):
        config = json.loads(path.read_text())
        path.write_text(json.dumps({**config, "num_attention_heads": 8 * ranks, "num_key_value_heads": 8 * ranks}))


def sides_of(root: Path, dims: MoeDims) -> list[Side]:
    file = root / "prepared" / "experts-layer-00000.safetensors"
    records = {record.name.rsplit(".", 1)[1]: asdict(record) for record in read_header(file).tensors}
    source, prepared = ({"directory": str(root / name)} for name in ("source", "prepared"))
    quiet = {"use_tqdm_on_load": False}
    options = {"threads": 3}
    alone = {**options, "cooperative": False}
    return [
        Side("source, vLLM's default", "vllm", {**source, "load": quiet}),
        Side("source, vLLM's prefetch", "vllm", {**source, "load": {**quiet, "safetensors_load_strategy": "prefetch"}}),
        Side("prepared, before", "plain", {"file": str(file), "records": records, "dims": asdict(dims)}),
        Side(
            "prepared, each rank alone",
            "vllm",
            {**prepared, "load": {**quiet, **OURS, "model_loader_extra_config": alone}},
        ),
        Side(
            "prepared, the ranks together",
            "vllm",
            {**prepared, "load": {**quiet, **OURS, "model_loader_extra_config": options}},
            alone=False,
        ),
    ]


def older_tree(commit: str, base: Path) -> Path:
    """The sources of an older commit, out of this checkout's git."""
    tree = base / "before"
    tree.mkdir()
    packed = subprocess.run(
        ["git", "-C", ROOT, "archive", commit, "converter", "kernels"], check=True, capture_output=True
    )
    subprocess.run(["tar", "-x", "-C", tree], input=packed.stdout, check=True)
    return tree


def measure(
    sides: list[Side], groups: dict[str, Ranks], storage: SlowStorage, ms: float, ranks: int, repeats: int
) -> list[dict[str, Any]]:
    """All sides in turns, by all ranks and by one; the first turn is not counted."""
    cases = [(side, count) for count in (ranks, 1) for side in sides if count > 1 or side.alone]
    turns: dict[tuple[str, int], list[dict[str, Any]]] = {(side.name, count): [] for side, count in cases}

    def ready() -> None:
        drop(storage.root.rglob("*.safetensors"))
        storage.set_delay(ms)

    for turn in range(repeats + 1):
        for side, count in cases:
            found = groups[side.group].load(side.told, count, ready)
            reads, nbytes = storage.counts
            seconds = max(each["ended"] for each in found) - min(each["begun"] for each in found)
            digests = [each["sha256"] for each in found]
            if turn:
                turns[side.name, count].append({"seconds": seconds, "reads": reads, "nbytes": nbytes, "sha": digests})
            print(f"{ms:g} ms, {side.name}, {count} ranks: {seconds:.2f} s, {reads} reads, {nbytes / 1e6:.0f} MB")
            sys.stdout.flush()
    return [row(side, count, ms, turns[side.name, count], turns) for side, count in cases]


def row(
    side: Side, count: int, ms: float, done: list[dict[str, Any]], turns: dict[tuple[str, int], list[dict[str, Any]]]
) -> dict[str, Any]:
    seconds = [turn["seconds"] for turn in done]
    made: dict[str, Any] = {"side": side.name, "ranks": count, "delay_ms": ms, "seconds": seconds, **spread(seconds)}
    made |= {"reads": done[-1]["reads"], "read_nbytes": done[-1]["nbytes"]}
    if side.name.startswith("prepared"):
        expected = turns["prepared, before", count][-1]["sha"]
        made["bit_equal"] = all(turn["sha"] == expected for turn in done)
    return made


def show(rows: list[dict[str, Any]]) -> None:
    print("\n| ms a read | ranks | side | min s | median s | max s | reads | MB | equal |")
    print("|---|---|---|---|---|---|---|---|---|")
    for made in rows:
        print(
            f"| {made['delay_ms']:g} | {made['ranks']} | {made['side']} | {made['min']:.2f} | {made['median']:.2f}"
            f" | {made['max']:.2f} | {made['reads']} | {made['read_nbytes'] / 1e6:.0f} | {made.get('bit_equal', '')} |"
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("/dev/shm"), help="where the files are made and removed")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--delay-ms", type=float, nargs="+", default=[1.0, 5.0, 10.0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--before", default=BEFORE, help="an older commit of this checkout")
    parser.add_argument("--small", action="store_true", help="small matrices, to see that it runs")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
