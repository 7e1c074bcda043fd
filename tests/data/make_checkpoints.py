"""Makes tests/data/checkpoints: parts of small real checkpoints, whole MoE layers with their bytes unchanged.

    python tests/data/make_checkpoints.py CHECKPOINTS

CHECKPOINTS holds directories as ModelOpt 0.41 and 0.47 and llm-compressor 0.9 and 0.14 wrote them from tiny random
models. Of each one a single MoE layer is kept (the whole checkpoint where its sharding is what matters), and the
config files as they are.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

HERE = Path(__file__).parent / "checkpoints"
WHOLE = ("modelopt-qwen3_moe-sharded",)
ONE_LAYER = {
    "llmc-qwen3_moe": "model.layers.1.mlp.",
    "llmc09-mixtral": "model.layers.0.block_sparse_moe.",
    "modelopt-gpt_oss-experts": "model.layers.0.mlp.",
    "modelopt-llama4-experts": "model.layers.1.feed_forward.",
    "modelopt-nemotron_h-experts": "backbone.layers.1.mixer.",
    "modelopt-qwen3_moe-w4a16": "model.layers.1.mlp.",
    "modelopt041-deepseek_v3-mlp": "model.layers.1.mlp.",
}
CONFIGS = ("config.json", "hf_quant_config.json")


def keep_layer(source: Path, target: Path, prefix: str) -> None:
    """Writes the tensors below ``prefix`` and the norms outside it; everything else is left out."""
    kept = {}
    for path in sorted(source.glob("*.safetensors")):
        with safe_open(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                if name.startswith(prefix) or name.endswith("norm.weight"):
                    kept[name] = opened.get_tensor(name)
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    """Makes all of them anew."""
    checkpoints = Path(sys.argv[1])
    shutil.rmtree(HERE, ignore_errors=True)
    for name in (*WHOLE, *ONE_LAYER):
        source, target = checkpoints / name, HERE / name
        target.mkdir(parents=True)
        files = [path for path in source.iterdir() if name in WHOLE or path.name in CONFIGS]
        for path in files:
            shutil.copyfile(path, target / path.name)
        if name in ONE_LAYER:
            keep_layer(source, target, ONE_LAYER[name])


if __name__ == "__main__":
    main()
