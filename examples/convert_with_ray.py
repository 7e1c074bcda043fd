"""One conversion by a Ray cluster: a task for each group of layers, then the join.

    pip install '.[ray]'                  # in a clone, on every node
    python examples/convert_with_ray.py SOURCE OUT [--layers-per-task 1] [--cpus-per-task 4] [--address auto]

Source and target must be on a file system that all nodes see. Ray runs a task again whose node died; the task then
continues its own part. Run the script again after anything else: finished parts are recognised.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import nvfp4_prep
from nvfp4_prep.errors import NvfpPrepError


def prepare(source: str, target: str, layers: str, threads: int) -> dict[str, Any]:
    """One task: a part of the conversion."""
    import ray

    begin = time.perf_counter()
    part = nvfp4_prep.convert_part(source, target, layers, threads=threads)
    return {
        "layers": layers,
        "node": ray.util.get_node_ip_address(),
        "nbytes": part.written_nbytes,
        "seconds": time.perf_counter() - begin,
    }


def number(text: str) -> int:
    """A count from 1."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="directory of the source, seen by all nodes")
    parser.add_argument("target", help="directory to write, seen by all nodes")
    parser.add_argument("--layers-per-task", type=number, default=1)
    parser.add_argument("--cpus-per-task", type=number, default=4)
    parser.add_argument("--address", help="of the cluster; without it a local one is started")
    args = parser.parse_args()
    try:
        convert(args)
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error}. Run in a clone: pip install '.[ray]'")
    except NvfpPrepError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def convert(args: argparse.Namespace) -> None:
    """Plans, starts the tasks, joins and checks."""
    import ray

    ray.init(address=args.address)
    plan = nvfp4_prep.plan(args.source)
    numbers = sorted({item.index for item in plan.layers})
    groups = [numbers[i : i + args.layers_per_task] for i in range(0, len(numbers), args.layers_per_task)]
    task = ray.remote(num_cpus=args.cpus_per_task, max_retries=3)(prepare)
    running = [task.remote(args.source, args.target, ",".join(map(str, group)), args.cpus_per_task) for group in groups]
    while running:
        done, running = ray.wait(running)
        for result in ray.get(done):
            rate = result["nbytes"] / result["seconds"] / 1e9
            print(
                f"layers {result['layers']} on {result['node']}: {result['seconds']:.1f} s, {rate:.2f} GB/s", flush=True
            )
    joined = nvfp4_prep.join_parts(args.source, args.target)
    print(f"{joined.path}: {len(joined.manifest.layers)} MoE layers in {len(groups)} parts", flush=True)
    report = nvfp4_prep.verify(joined.path, source=args.source)
    report.raise_for_problems()
    print(f"verified ({report.depth})", flush=True)
    ray.shutdown()


if __name__ == "__main__":
    main()
