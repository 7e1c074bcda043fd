"""The host's side of loading, without a GPU: bytes and system calls of one rank, and processor seconds.

    python benchmarks/bench_load_host.py [--directory DIR] [--experts 16] [--json host.json]

One layer with the matrices of Kimi-K2.5 and fewer experts (random bytes, 24.8 MB an expert) is loaded into CPU tensors
for every tensor- and expert-parallel size that it can serve. Bytes are counted where the system calls return them.
Seconds depend on the machine and are no test.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from load_data import KIMI, LayerFiles, write_layer

from nvfp4_prep.load import DirectIO, ExpertLoader, LoadOptions, LoadReport, RankShare
from nvfp4_prep_kernels import MoeDims, MoeLayout, PreparedTensor, rank_slice

LAYOUT = MoeLayout.cutedsl(gated=True)


def load_share(files: LayerFiles, share: RankShare, loader: ExpertLoader) -> LoadReport:
    """One rank's four tensors into new CPU tensors."""
    experts = share.experts or tuple(range(files.dims.experts))
    for tensor in PreparedTensor:
        part = rank_slice(LAYOUT, tensor, files.dims, share.tp_rank, share.tp_size)
        parameter = torch.empty((len(experts), *part.shape), dtype=torch.uint8)
        loader.submit(files.prepared, files.records[tensor.value], part, experts, parameter)
    return loader.finish()


def measure(files: LayerFiles, tp: int, ep: int, loader: ExpertLoader) -> dict[str, Any]:
    """All ranks of one combination, one after the other."""
    reports, process = [], time.process_time()
    for tp_rank in range(tp):
        for ep_rank in range(ep):
            share = RankShare.of(files.dims.experts, (tp_rank, tp), (ep_rank, ep))
            reports.append(load_share(files, share, loader))
    return {
        "tp": tp,
        "ep": ep,
        "share_mb": max(report.nbytes for report in reports) / 1e6,
        "worst_ratio": max(report.counts.nbytes / report.nbytes for report in reports),
        "reads": max(report.counts.reads for report in reports),
        "gathered_mb": max(report.counts.gathered_nbytes for report in reports) / 1e6,
        "pages_mb": max(report.counts.read_nbytes + report.counts.mapped_nbytes for report in reports) / 1e6,
        "cpu_s_per_gb": (time.process_time() - process) / sum(report.nbytes for report in reports) * 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, help="where the file is made (and removed); default: temporary")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--direct", action="store_true", help="direct I/O instead of the page cache")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    base = Path(tempfile.mkdtemp(dir=arguments.directory, prefix="nvfp4-prep-load-"))
    try:
        dims = MoeDims(arguments.experts, KIMI.intermediate, KIMI.hidden)
        files = write_layer(base, 1, dims, range(dims.experts), torch.device("cpu"), batch=1)
        mode = DirectIO.ALWAYS if arguments.direct else DirectIO.NEVER
        rows = []
        print("| TP | EP | share MB | read / share, worst rank | reads | gathered MB | pages touched MB | CPU s/GB |")
        print("|---|---|---|---|---|---|---|---|")
        with ExpertLoader("cpu", LoadOptions(direct_io=mode)) as loader:
            for tp in LAYOUT.tp_sizes(dims, limit=8):
                for ep in (size for size in (1, 2, 4, 8, 16) if size <= dims.experts):
                    row = measure(files, tp, ep, loader)
                    rows.append(row)
                    print(
                        f"| {tp} | {ep} | {row['share_mb']:.1f} | {row['worst_ratio']:.4f} | {row['reads']}"
                        f" | {row['gathered_mb']:.1f} | {row['pages_mb']:.1f} | {row['cpu_s_per_gb']:.2f} |",
                        flush=True,
                    )
        if arguments.json is not None:
            arguments.json.write_text(
                json.dumps({"repetitions": 1, "experts": arguments.experts, "rows": rows}, indent=1) + "\n"
            )
    finally:
        shutil.rmtree(base)


if __name__ == "__main__":
    main()
