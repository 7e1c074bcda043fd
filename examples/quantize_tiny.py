"""Fresh checkpoints from the public quantizers, through convert, verify and restore.

    python examples/quantize_tiny.py WORK

Makes two throwaway environments under WORK (about 3 GB each, CPU builds), builds tiny mixture-of-experts models with
random weights, quantizes them to NVFP4 with NVIDIA ModelOpt and with llm-compressor exactly as their documentation
shows, and runs each checkpoint through the command line of this project, which must be installed in the environment
that runs this script. A restored checkpoint must equal the quantizer's in every tensor. Takes five to ten minutes
after the downloads.

WORK/envs/modelopt and WORK/envs/llm-compressor are used as they are where they exist.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

PACKAGES = {
    "modelopt": ["torch==2.13.0", "nvidia-modelopt==0.47.0", "transformers==5.14.1", "accelerate", "requests"],
    "llm-compressor": ["torch==2.13.0", "llmcompressor==0.14.0.1"],
}
MODELS = {
    # quantizer: family -> shard size that spreads experts over shards
    "modelopt": {
        "qwen3_moe": "300KB",
        "deepseek_v3": "5GB",
        "mixtral": "5GB",
        "minimax_m2": "5GB",
        "glm4_moe": "5GB",
        "llama4_text": "5GB",
    },
    "llm-compressor": {"qwen3_moe": "5GB", "mixtral": "5GB", "minimax_m2": "5GB"},
}
SIZES = {
    "hidden_size": 256,
    "vocab_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
    "num_experts_per_tok": 2,
}
FAMILIES = {
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 192, "intermediate_size": 256, "head_dim": 64},
    "mixtral": {"num_local_experts": 8, "intermediate_size": 128},
    "minimax_m2": {"num_local_experts": 8, "intermediate_size": 128, "head_dim": 64},
    "glm4_moe": {
        "n_routed_experts": 8,
        "moe_intermediate_size": 128,
        "intermediate_size": 256,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "head_dim": 64,
    },
    "llama4_text": {
        "num_local_experts": 8,
        "intermediate_size": 128,
        "intermediate_size_mlp": 256,
        "num_experts_per_tok": 1,
        "head_dim": 64,
    },
    "deepseek_v3": {
        "n_routed_experts": 8,
        "moe_intermediate_size": 128,
        "intermediate_size": 256,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 2,
        "num_key_value_heads": 4,
        "q_lora_rank": 64,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32,
        "v_head_dim": 32,
    },
}


def build(family: str, seed: int):  # type: ignore[no-untyped-def]
    """A tiny model with random weights; runs in a quantizer's environment."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family]})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.config.architectures = [type(model).__name__]  # as in a checkpoint that was loaded from disk
    return model


def calibration(seed: int):  # type: ignore[no-untyped-def]
    """Random tokens, enough for every expert to be routed to."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, SIZES["vocab_size"], (1, 256), generator=generator) for _ in range(16)]


def make_with_modelopt(family: str, out: Path, shard: str) -> None:
    """Post-training quantization and the unified Hugging Face export."""
    import modelopt.torch.quantization as mtq
    import torch
    from modelopt.torch.export import export_hf_checkpoint

    model, batches = build(family, seed=1), calibration(2)

    def forward(model) -> None:  # type: ignore[no-untyped-def]
        with torch.no_grad():
            for batch in batches:
                model(batch)

    mtq.quantize(model, mtq.NVFP4_DEFAULT_CFG, forward)
    export_hf_checkpoint(model, export_dir=str(out), max_shard_size=shard)


def tokenizer():  # type: ignore[no-untyped-def]
    """One word for each token; llm-compressor wants a tokenizer even for token ids."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {f"t{number}": number for number in range(SIZES["vocab_size"])}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="t0")), pad_token="t0")


def make_with_llm_compressor(family: str, out: Path, shard: str) -> None:
    """One-shot NVFP4 (W4A4) with calibration of all experts."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    with tempfile.TemporaryDirectory() as saved:
        build(family, seed=3).save_pretrained(saved)
        tokenizer().save_pretrained(saved)
        rows = [batch[0].tolist() for batch in calibration(4)]
        data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
        ignore = ["lm_head", "re:.*mlp.gate$", "re:.*moe.gate$"]
        recipe = QuantizationModifier(targets="Linear", scheme="NVFP4", ignore=ignore)
        model = oneshot(model=saved, dataset=data, recipe=recipe, max_seq_length=256, num_calibration_samples=len(rows))
        model.save_pretrained(str(out), save_compressed=True, max_shard_size=shard)


def environment(folder: Path, packages: list[str]) -> Path:
    """The Python of a throwaway environment, made if it does not exist."""
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"making {folder}", flush=True)
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
    return python


def tool(*arguments: str | Path) -> str:
    """Runs ``nvfp4-prep`` of this environment; returns its output."""
    command = [sys.executable, "-c", "from nvfp4_prep.cli import main; main()", *map(str, arguments), "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"nvfp4-prep {' '.join(map(str, arguments))} failed:\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


def contents(folder: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Every tensor of a checkpoint by name, read with the official library."""
    from safetensors import deserialize

    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in deserialize(path.read_bytes()):
            found[name] = (tensor["dtype"], tensor["shape"], bytes(tensor["data"]))
    return found


def round_trip(source: Path, work: Path) -> None:
    """Convert, verify against the source, restore, compare."""
    print(tool("inspect", source))
    prepared, restored = work / f"{source.name}-prepared", work / f"{source.name}-restored"
    print(tool("convert", source, prepared))
    print(tool("verify", prepared, "--source", source).splitlines()[-1])
    print(tool("restore", prepared, restored))
    want, have = contents(source), contents(restored)
    if want != have:
        names = [name for name in {*want, *have} if want.get(name) != have.get(name)]
        raise SystemExit(f"{source}: {len(names)} tensors are not restored, e.g. {sorted(names)[:3]}")
    for name in ("config.json", "hf_quant_config.json"):
        if (source / name).exists() and (source / name).read_bytes() != (restored / name).read_bytes():
            raise SystemExit(f"{source}: {name} is not restored")
    print(f"{source.name}: {len(want)} tensors equal in name, dtype, shape and bytes\n", flush=True)


def main() -> None:
    """Makes what is missing and runs everything through the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="directory for environments, checkpoints and logs")
    parser.add_argument("--make", nargs=3, metavar=("QUANTIZER", "FAMILY", "SHARD"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        quantizer, family, shard = args.make
        (make_with_modelopt if quantizer == "modelopt" else make_with_llm_compressor)(family, args.work, shard)
        return
    args.work.mkdir(parents=True, exist_ok=True)
    versions = {}
    for quantizer, families in MODELS.items():
        python = environment(args.work / "envs" / quantizer, PACKAGES[quantizer])
        listed = subprocess.run([python, "-m", "pip", "list", "--format", "json"], capture_output=True, check=True)
        versions[quantizer] = {item["name"]: item["version"] for item in json.loads(listed.stdout)}
        for family, shard in families.items():
            source = args.work / f"{quantizer}-{family}"
            for folder in (source, *(args.work / f"{source.name}-{end}" for end in ("prepared", "restored"))):
                shutil.rmtree(folder, ignore_errors=True)
            log = args.work / f"{source.name}.log"
            with log.open("w") as stream:
                command = [python, __file__, source, "--make", quantizer, family, shard]
                offline = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
                done = subprocess.run(command, stdout=stream, stderr=stream, env=offline, check=False)
            if done.returncode:
                raise SystemExit(f"{quantizer} could not quantize {family}: see {log}")
            round_trip(source, args.work)
    kept = ("nvidia-modelopt", "llmcompressor", "compressed-tensors", "transformers", "torch")
    for quantizer, found in versions.items():
        print(f"{quantizer}: " + ", ".join(f"{name} {found[name]}" for name in kept if name in found))


if __name__ == "__main__":
    main()
