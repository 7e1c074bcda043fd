"""The library without the command line: sample, plan, convert, verify, read, restore.

python examples/python_api.py [WORK]    (by default work, which must not hold an earlier run)
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import nvfp4_prep
from nvfp4_prep.errors import NvfpPrepError
from nvfp4_prep_kernels import MoeLayout, PreparedTensor


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, nargs="?", default=Path("work"), help="directory to write")
    try:
        run(parser.parse_args().work)
    except NvfpPrepError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def run(work: Path) -> None:
    """The library's functions, one after the other."""
    source, out, back = work / "source", work / "out", work / "back"
    nvfp4_prep.write_sample(source, nvfp4_prep.SampleModel(experts=4, differing=0.5))

    # What is it, and what would be done? Neither writes anything.
    print([layer.status for layer in nvfp4_prep.inspect(source).layers])
    plan = nvfp4_prep.plan(source)
    print(f"{len(plan.layers)} MoE layers, {plan.output_nbytes} bytes, plan {plan.fingerprint[:12]}")

    # Convert. Options are values; errors are typed and say what to do next.
    options = nvfp4_prep.ConvertOptions(gate_up_scales=nvfp4_prep.GateUpPolicy.RECONCILE)
    result = nvfp4_prep.convert(source, out, options, threads=2)
    for layer in result.manifest.layers:
        print(f"{layer.experts_path}: TP {layer.tp_sizes}, {layer.gate_up.differing} experts reconciled")
    try:
        nvfp4_prep.convert(source, source / "inside")
    except NvfpPrepError as error:
        print(f"{type(error).__name__}, exit code {error.exit_code}: {error.next_step}")

    # Verify against the source, and once more after restoring.
    nvfp4_prep.verify(out, source=source).raise_for_problems()
    restored = nvfp4_prep.restore(out, back)
    print(f"{restored.tensors} tensors restored")

    # The layout is a value of its own and needs torch alone.
    layout, dims = MoeLayout.cutedsl(gated=True), plan.layers[0].dims
    for tensor in PreparedTensor:
        print(f"{tensor.value}: [{dims.experts}, {', '.join(map(str, layout.expert_shape(tensor, dims)))}]")


if __name__ == "__main__":
    main()
