"""FlashInfer's own kernels compiled for sm_100a from prepared layers: bytes of machine code. No card needed.

    python benchmarks/bench_compile_flashinfer.py [--json FILE]

Runs tests/support/compile_flashinfer.py, which says what is replaced.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parents[1] / "tests" / "support" / "compile_flashinfer.py"
LIBRARIES = ("flashinfer-python", "nvidia-cutlass-dsl", "torch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    done = subprocess.run([sys.executable, str(PROGRAM)], stdout=subprocess.PIPE, text=True, check=True)
    print(done.stdout, end="")
    rows = []
    for line in done.stdout.splitlines():
        names, _, sizes = line.partition(" cubin")
        case, *kernels = names.split()
        rows.append({"case": case, "kernels": kernels, "new_cubin_nbytes": [int(size) for size in sizes.split()]})
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"repetitions": 1, "versions": versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
