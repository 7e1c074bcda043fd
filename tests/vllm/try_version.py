"""Try the installed vLLM, tested or not, and print what broke: ``make try-vllm VLLM=0.34.0``.

Three steps, from cheap to dear: the functions that the plugin calls and overrides; the layout that this vLLM prepares;
and the tests of models, loading, updates and forward passes. The last line says what to do next. The plugin refuses an
older vLLM than the tested ones: for the tests that is lifted, or each of them would fail for that one reason.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from nvfp4_prep.vllm.versions import Support, installed_version, support

HERE = Path(__file__).parent
VERSIONS = "test_versions.py"
TESTS = (
    VERSIONS,
    "test_models.py",
    "test_loading.py",
    "test_updates.py",
    "test_load_format.py",
    "test_forward.py",
    "test_other_kernel.py",
    "test_stock.py",
)


def main() -> int:
    """Run the steps; the exit status is 0 if nothing broke."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from support.serving.vllm_on_cpu import LIFT_REFUSAL, bring_up

    version = installed_version()
    treated = support(version)
    print(f"vLLM {version}: {treated.value}", flush=True)
    tests = TESTS
    if treated is Support.OLDER:
        tests = tuple(name for name in TESTS if name != VERSIONS)
        os.environ[LIFT_REFUSAL] = "1"
        print(f"refused as it is; tried as if it were a tested version, without {VERSIONS}", flush=True)
    try:
        bring_up()
    except Exception as error:  # a version that cannot be imported is a finding
        print(f"the test harness does not come up: {type(error).__name__}: {error}")
        return 1
    broken = _interface() + _layout()
    failures = _tests(tests)
    for reason, count in Counter(failures).most_common():
        print(f"  {count} x {reason}")
    print(_verdict(treated, broke=bool(broken or failures)))
    return int(bool(broken or failures))


def _verdict(treated: Support, *, broke: bool) -> str:
    """Return what to do next."""
    if treated is Support.TESTED:
        return "A tested version: mend what broke." if broke else "Nothing broke: a tested version."
    if broke:
        return "Not served as it is: mend the differences in vllm/compat.py, then add the version to TESTED."
    if treated is Support.OLDER:
        return "Nothing broke. It stays refused unless it is added to TESTED in vllm/versions.py and to the tables."
    return "Nothing broke: add the version to TESTED in vllm/versions.py, the Makefile and the tables."


def _interface() -> int:
    from nvfp4_prep.vllm.interface import interface_problems

    problems = list(interface_problems())
    print(f"interface: {len(problems)} of the functions that the plugin stands on differ")
    for problem in problems:
        print(f"  {problem}")
    return len(problems)


def _layout() -> int:
    from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import NvFp4MoeBackend

    from nvfp4_prep.vllm.layout_check import installed_layout

    broken = 0
    kernels = (NvFp4MoeBackend.FLASHINFER_CUTEDSL, NvFp4MoeBackend.FLASHINFER_TRTLLM)
    for kernel, gated in itertools.product(kernels, (True, False)):
        what = f"layout, {kernel.value}, gated {gated}"
        try:
            found = installed_layout(kernel, gated=gated)
        except Exception as error:  # whatever an unknown version raises is the finding
            print(f"{what}: {type(error).__name__}: {error}")
            broken += 1
            continue
        known = found.layout is not None and found.pads is not None
        broken += not known
        print(f"{what}: {found if known else 'another than any that this version knows'}")
    return broken


def _tests(names: Sequence[str]) -> list[str]:
    """Return the last line of each failure's reason."""
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore::DeprecationWarning", "--tb=line"]
    done = subprocess.run(
        [*command, *(str(HERE / name) for name in names)], capture_output=True, text=True, check=False
    )
    lines = done.stdout.splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    summary = next((line for line in reversed(lines) if re.search(r"\d+ (passed|failed|error)", line)), "no test ran")
    print(f"tests: {summary}")
    for line in failed:
        print(f"  {line}")
    if not failed and done.returncode:
        return [f"pytest ended with {done.returncode}: {(done.stdout + done.stderr).strip()[-500:]}"]
    reasons = [line.split(": ", 2)[-1][:200] for line in lines if re.match(r"(/|E ).*(Error|Exception|assert)", line)]
    return reasons or failed


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))
    sys.exit(main())
