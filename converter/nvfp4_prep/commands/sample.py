"""Sample checkpoints: random NVFP4 MoE checkpoints in ModelOpt's format, of any size, in DeepSeek's tensor names.

Codes and block scales are random bytes, never zeros, and no two experts are alike, so that a mistake anywhere shows.
Written with realistic sharding: shards of bounded size, filled in the order of the layers, so that layers and even
experts are spread over shards.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

import torch

from nvfp4_prep._util.arguments import PATH, check_fields, checked, instance, integer, optional
from nvfp4_prep._util.buffers import byte_view
from nvfp4_prep.checkpoint.filenames import CONFIG, HF_QUANT_CONFIG, INDEX, README, numbered_shard
from nvfp4_prep.checkpoint.safetensors_header import encode_header
from nvfp4_prep.checkpoint.tensors import TensorSpec
from nvfp4_prep.errors import ConversionInterrupted, TargetError, UsageError
from nvfp4_prep.output.atomic_file import translate_os_error
from nvfp4_prep.output.target_root import TargetRoot

__all__ = ["KIMI_LAYER", "SampleModel", "write_sample"]


@dataclass(frozen=True)
class SampleModel:
    """Dimensions of a sample.

    Attributes:
        layers: decoder layers; the first one is dense, the others are MoE layers.
        experts: E.
        intermediate: I of an expert.
        hidden: H.
        vocabulary: rows of the embeddings.
        shard_nbytes: largest size of a shard.
        differing: share of experts whose gate and up global scales differ (0 to 1).
        seed: same seed, same bytes.
    """

    layers: int = 3
    experts: int = 8
    intermediate: int = 128
    hidden: int = 256
    vocabulary: int = 256
    shard_nbytes: int = 5_000_000_000
    differing: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = ("layers", "experts", "intermediate", "hidden", "vocabulary", "shard_nbytes")
        check_fields(self, **dict.fromkeys(sizes, integer(1, 2**62)), seed=integer(0, 2**63 - 1))
        if type(self.differing) not in (int, float) or not 0 <= self.differing <= 1:
            raise UsageError(
                "option differing is wrong", expected="a share from 0 to 1", actual=repr(self.differing)[:80]
            )
        if self.layers < 2 or self.experts < 1:
            raise UsageError("a sample needs a dense layer, an MoE layer and an expert")
        if self.hidden % 16 or self.intermediate % 16:
            raise UsageError("hidden and intermediate sizes must be multiples of 16, the NVFP4 block")


KIMI_LAYER = SampleModel(layers=2, experts=384, intermediate=2048, hidden=7168, vocabulary=1024)
"""One MoE layer at the full dimensions of Kimi-K2.5: 9.5 GB."""


@checked(path=PATH, model=optional(instance(SampleModel)))
def write_sample(path: str | Path, model: SampleModel | None = None) -> int:
    """Write a sample checkpoint into a new or empty directory.

    Args:
        path: the directory.
        model: dimensions.

    Returns:
        Bytes of all shards.

    Raises:
        TargetError: if the directory is not empty or cannot be written.
        NoSpaceError: if the disk is full. In no case anything is left behind that was written.
        ConversionInterrupted: on Ctrl-C.
    """
    folder = Path(path)
    if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise TargetError("exists and is not empty", where=str(folder), next_step="Give another directory.")
    try:
        with TargetRoot.open(folder, make=True) as root, _NewFiles(root) as files:
            return _write(files, model or SampleModel())
    except FileExistsError as error:
        raise TargetError(
            "appeared while the sample was written; what the sample had there was removed",
            where=str(folder / str(error.filename)),
            next_step="Give a directory that no other process writes to.",
        ) from error
    except OSError as error:
        failure = translate_os_error(error, folder)
        failure.next_step = "Check its permissions and the free disk space; the sample's files were removed."
        raise failure from error
    except KeyboardInterrupt as error:
        raise ConversionInterrupted(
            "interrupted", where=str(folder), next_step="The sample's files were removed."
        ) from error


class _NewFiles:
    """Files that were not there before, removed again if the work on them fails; nobody else's are touched."""

    def __init__(self, root: TargetRoot) -> None:
        self._root = root
        self._made: dict[str, os.stat_result] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for name, made in self._made.items() if kind is not None else ():
            now = self._root.status(name)
            if now is not None and os.path.samestat(now, made):
                self._root.unlink(name)

    def create(self, name: str) -> BinaryIO:
        """Open a new file for writing; raises ``FileExistsError`` if there is an entry of that name."""
        descriptor = self._root.open_file(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        self._made[name] = os.fstat(descriptor)
        return os.fdopen(descriptor, "wb")

    def write_text(self, name: str, text: str) -> None:
        """Write a new small file."""
        with self.create(name) as stream:
            stream.write(text.encode())


def _write(files: _NewFiles, model: SampleModel) -> int:
    bundles = _shards(model)
    generator = torch.Generator().manual_seed(model.seed)
    scales = random.Random(model.seed)
    weight_map: dict[str, str] = {}
    total = 0
    for number, specs in enumerate(bundles, 1):
        name = numbered_shard(number, len(bundles))
        header, _ = encode_header(name, specs, {"format": "pt"})
        with files.create(name) as stream:
            stream.write(header)
            for spec in specs:
                tensor = _random_tensor(spec, model, generator, scales)
                stream.write(byte_view(tensor))
                weight_map[spec.name] = name
                total += spec.nbytes
            total += len(header)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    files.write_text(INDEX, json.dumps(index, indent=2) + "\n")
    files.write_text(CONFIG, json.dumps(_config(model), indent=2) + "\n")
    files.write_text(HF_QUANT_CONFIG, json.dumps(_hf_quant_config(model), indent=2) + "\n")
    files.write_text(README, "---\nlicense: apache-2.0\n---\n\nRandom weights, for tests.\n")
    return total


def _shards(model: SampleModel) -> list[list[TensorSpec]]:
    bundles: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in _specs(model):
        if bundles[-1] and size + spec.nbytes > model.shard_nbytes:
            bundles.append([])
            size = 0
        bundles[-1].append(spec)
        size += spec.nbytes
    return bundles


def _specs(model: SampleModel) -> Iterator[TensorSpec]:
    hidden = model.hidden
    yield TensorSpec("model.embed_tokens.weight", "BF16", (model.vocabulary, hidden))
    for layer in range(model.layers):
        prefix = f"model.layers.{layer}"
        yield TensorSpec(f"{prefix}.input_layernorm.weight", "BF16", (hidden,))
        yield TensorSpec(f"{prefix}.self_attn.o_proj.weight", "BF16", (hidden, hidden))
        if layer == 0:
            yield from _linears(f"{prefix}.mlp", hidden, 2 * model.intermediate)
            continue
        yield TensorSpec(f"{prefix}.mlp.gate.weight", "BF16", (model.experts, hidden))
        yield from _linears(f"{prefix}.mlp.shared_experts", hidden, model.intermediate)
        for expert in range(model.experts):
            yield from _linears(f"{prefix}.mlp.experts.{expert}", hidden, model.intermediate)
    yield TensorSpec("model.norm.weight", "BF16", (hidden,))
    yield TensorSpec("lm_head.weight", "BF16", (model.vocabulary, hidden))


def _linears(prefix: str, hidden: int, intermediate: int) -> Iterator[TensorSpec]:
    for name, rows, cols in (
        ("gate_proj", intermediate, hidden),
        ("up_proj", intermediate, hidden),
        ("down_proj", hidden, intermediate),
    ):
        yield TensorSpec(f"{prefix}.{name}.weight", "U8", (rows, cols // 2))
        yield TensorSpec(f"{prefix}.{name}.weight_scale", "F8_E4M3", (rows, cols // 16))
        yield TensorSpec(f"{prefix}.{name}.weight_scale_2", "F32", ())
        yield TensorSpec(f"{prefix}.{name}.input_scale", "F32", ())


def _random_tensor(
    spec: TensorSpec, model: SampleModel, generator: torch.Generator, scales: random.Random
) -> torch.Tensor:
    if spec.dtype == "U8":
        words = torch.empty(-(-spec.nbytes // 8), dtype=torch.int64).random_(generator=generator)
        # random_ leaves the sign bit 0, which would make every 16th code non-negative: shift it in from another draw.
        return (words ^ (words << 1)).view(torch.uint8)[: spec.nbytes].contiguous()
    if spec.dtype == "F8_E4M3":
        # e4m3 bytes 0x30 to 0x7e: 0.5 to 448, positive and finite.
        return torch.randint(0x30, 0x7F, (spec.nbytes,), dtype=torch.uint8, generator=generator)
    if spec.dtype == "F32":
        return torch.tensor([_random_scale(spec.name, model, scales)], dtype=torch.float32)
    return (torch.randn(spec.nbytes // 2, generator=generator) * 0.02).to(torch.bfloat16)


def _random_scale(name: str, model: SampleModel, scales: random.Random) -> float:
    value = scales.uniform(2e-5, 9e-5) if name.endswith("weight_scale_2") else scales.uniform(1e-3, 9e-3)
    module, projection, leaf = name.rsplit(".", 2)
    if leaf == "weight_scale_2" and projection in ("gate_proj", "up_proj"):
        # ModelOpt gives gate and up one global scale: derive it from the expert's name, then let some differ.
        shared = random.Random(f"{model.seed}:{module}")
        value = shared.uniform(2e-5, 9e-5)
        if projection == "up_proj" and shared.random() < model.differing:
            value *= shared.uniform(0.3, 3.0)
    return value


def _config(model: SampleModel) -> dict[str, Any]:
    group = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "first_k_dense_replace": 1,
        "hidden_act": "silu",
        "hidden_size": model.hidden,
        "intermediate_size": 2 * model.intermediate,
        "moe_intermediate_size": model.intermediate,
        "n_routed_experts": model.experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": min(8, model.experts),
        "num_hidden_layers": model.layers,
        "vocab_size": model.vocabulary,
        "quantization_config": {
            "config_groups": {"group_0": {"input_activations": group, "weights": group, "targets": ["Linear"]}},
            "ignore": ["lm_head", "model.embed_tokens", "*self_attn*", "*mlp.gate"],
            "quant_algo": "NVFP4",
            "producer": {"name": "modelopt", "version": "0.41.0"},
            "quant_method": "modelopt",
        },
    }


def _hf_quant_config(model: SampleModel) -> dict[str, Any]:
    config = _config(model)["quantization_config"]
    return {
        "producer": config["producer"],
        "quantization": {
            "quant_algo": "NVFP4",
            "kv_cache_quant_algo": None,
            "group_size": 16,
            "exclude_modules": config["ignore"],
        },
    }
