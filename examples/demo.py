"""The whole tool on a small Kimi-shaped checkpoint: sample, inspect, plan, convert, verify, damage, restore, compare.

python examples/demo.py [DIRECTORY]    (by default demo; made anew, a few MB)
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors import safe_open

import nvfp4_prep


def run(*arguments: str, expect: int = 0) -> None:
    """Runs the command line as a user would and shows both."""
    print(f"\n$ nvfp4-prep {' '.join(arguments)}", flush=True)
    command = [sys.executable, "-c", "from nvfp4_prep.cli import main; main()", *arguments]
    code = subprocess.run(command, check=False).returncode
    if code != expect:
        sys.exit(f"exit code {code}, expected {expect}")


def tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a checkpoint, read by the official safetensors library."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                raw = bytes(tensor.reshape(-1).view(torch.uint8).tolist())
                found[name] = (str(tensor.dtype), tuple(tensor.shape), raw)
    return found


def made_here(source: Path) -> bool:
    """Whether a source is a sample, which may go; somebody's own checkpoint may be called source, too."""
    card = source / "README.md"
    return card.is_file() and "Random weights, for tests." in card.read_text()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, nargs="?", default=Path("demo"))
    folder = parser.parse_args().directory
    source, out, back = folder / "source", folder / "prepared", folder / "restored"
    if folder.exists():
        there = {*folder.iterdir()} if folder.is_dir() else {folder}
        if there and (there - {source, out, back} or not made_here(source)):
            parser.error(f"{folder} holds something else than an earlier demo: remove it, or give another directory")
        shutil.rmtree(folder)
    model = nvfp4_prep.SampleModel(layers=3, experts=24, intermediate=256, hidden=512, shard_nbytes=6_000_000)
    nvfp4_prep.write_sample(source, model)
    run("inspect", str(source))
    run("convert", str(source), str(out), "--dry-run")
    run("convert", str(source), str(out))
    run("verify", str(out), "--source", str(source))
    run("inspect", str(out))

    print("\nOne flipped bit must be found:", flush=True)
    victim = next(out.glob("experts-layer-*.safetensors"))
    good = victim.read_bytes()
    victim.write_bytes(good[: len(good) // 2] + bytes([good[len(good) // 2] ^ 1]) + good[len(good) // 2 + 1 :])
    run("verify", str(out), "--quiet", expect=6)
    victim.write_bytes(good)

    run("restore", str(out), str(back))
    same = tensors(source) == tensors(back)
    configs = all((source / name).read_bytes() == (back / name).read_bytes() for name in ("config.json", "README.md"))
    print(f"\nrestored tensors equal the source's: {same}; configs equal: {configs}")
    print(f"expert tensors: {sum('.experts.' in name for name in tensors(source))} in the source,", end=" ")
    print(f"{sum('.routed_experts.' in name for name in tensors(out))} prepared")
    if not (same and configs):
        sys.exit(1)


if __name__ == "__main__":
    main()
