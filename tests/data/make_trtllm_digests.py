"""Records what vLLM's and SGLang's own functions make of NVFP4 expert layers for TRTLLM-gen: sha256 of each tensor.

    .venv-vllm/bin/python tests/data/make_trtllm_digests.py --sglang FOLDER --output tests/data/trtllm_digests.json

``FOLDER`` holds an unpacked wheel of SGLang (``pip download --no-deps sglang==0.5.23``); vLLM and FlashInfer are
installed. For each layer of `synthetic_layers.py`, whole and as shares of tensor-parallel ranks:

- ``vllm``: its real ``prepare_nvfp4_moe_layer_for_fi_or_cutlass`` for FLASHINFER_TRTLLM: row order, padding and
  ``prepare_static_weights_for_trtllm_fp4_moe``, from [gate; up] as its loader leaves them.
- ``sglang``: its real ``prepare_static_weights_for_trtllm_fp4_moe``, from [up; gate] as its loader leaves them, where
  nothing needs padding: SGLang pads neither H nor gated I, so its bytes of other layers are of other sizes.

FlashInfer's index functions are the real ones, on the CPU. ``nvfp4_block_scale_interleave`` is CUDA code: replaced by
the swizzle written out below. SGLang's function is executed from its source text; its package needs a GPU to import.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parents[1])]

from data.synthetic_layers import LAYERS, SyntheticLayer  # noqa: E402
from data.synthetic_torch import to_torch  # noqa: E402
from support.serving.vllm_on_cpu import bring_up  # noqa: E402

BIG = ("w13_weight", "w13_weight_scale", "w2_weight", "w2_weight_scale")
TP_SLICES = ((1, 0), (2, 0), (2, 1), (4, 3))
Prepare = Callable[..., tuple[torch.Tensor, ...]]


def swizzle(scales: torch.Tensor) -> torch.Tensor:
    """The 128x4 swizzle of one matrix, flat: FlashInfer's ``nvfp4_block_scale_interleave``."""
    rows, cols = scales.shape
    m, k = torch.arange(rows)[:, None], torch.arange(cols)[None, :]
    offset = m // 128 * (cols // 4 * 512) + k // 4 * 512 + m % 32 * 16 + m % 128 // 32 * 4 + k % 4
    out = torch.full((rows * cols,), 0xA5, dtype=torch.uint8)
    out[offset.flatten()] = scales.reshape(-1).view(torch.uint8)
    return out


def source(layer: SyntheticLayer, projections: tuple[str, ...], leaf: str, tp: tuple[int, int]) -> torch.Tensor:
    """A rank's share of some projections of all experts, one below the other."""
    axis = 1 if projections == ("down_proj",) else 0
    experts = []
    for expert in range(layer.experts):
        parts = [to_torch(layer.tensor(expert, name, leaf)).view(torch.uint8) for name in projections]
        experts.append(torch.cat([part.chunk(tp[0], dim=axis)[tp[1]] for part in parts]))
    stacked = torch.stack(experts).contiguous()
    return stacked.view(torch.float8_e4m3fn) if leaf == "weight_scale" else stacked


def vllm_tensors(layer: SyntheticLayer, tp: tuple[int, int]) -> dict[str, torch.Tensor]:
    """What vLLM makes of a rank's share."""
    from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import NvFp4MoeBackend
    from vllm.model_executor.layers.quantization.utils.flashinfer_fp4_moe import (
        prepare_nvfp4_moe_layer_for_fi_or_cutlass,
    )

    w13 = ("gate_proj", "up_proj") if layer.gated else ("up_proj",)
    w13_weight, w13_scale = (source(layer, w13, leaf, tp) for leaf in ("weight", "weight_scale"))
    w2_weight, w2_scale = (source(layer, ("down_proj",), leaf, tp) for leaf in ("weight", "weight_scale"))
    config = types.SimpleNamespace(
        moe_parallel_config=types.SimpleNamespace(enable_eplb=False),
        intermediate_size_per_partition=layer.intermediate // tp[0],
        hidden_dim=layer.hidden,
        hidden_dim_unpadded=None,
    )
    activation = types.SimpleNamespace(is_gated=layer.gated)
    ones = torch.ones(layer.experts)
    made = prepare_nvfp4_moe_layer_for_fi_or_cutlass(
        NvFp4MoeBackend.FLASHINFER_TRTLLM,
        types.SimpleNamespace(moe_config=config, activation=activation),
        w13_weight,
        w13_scale,
        ones,
        ones,
        w2_weight,
        w2_scale,
        ones,
        ones,
        is_act_and_mul=layer.gated,
    )
    return dict(zip(BIG, (made[0], made[1], made[4], made[5]), strict=True))


def sglang_function(folder: Path) -> Prepare:
    """SGLang's function, alone."""
    path = folder / "sglang/srt/layers/quantization/utils.py"
    name = "prepare_static_weights_for_trtllm_fp4_moe"
    node = next(
        node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef) and node.name == name
    )
    names: dict[str, Any] = {"torch": torch}
    exec(compile(ast.Module([node], []), str(path), "exec"), names)
    function: Prepare = names[name]
    return function


def sglang_tensors(layer: SyntheticLayer, tp: tuple[int, int], prepare: Prepare) -> dict[str, torch.Tensor]:
    """What SGLang makes of a rank's share that needs no padding."""
    w13 = ("up_proj", "gate_proj") if layer.gated else ("up_proj",)
    w13_weight, w13_scale = (source(layer, w13, leaf, tp) for leaf in ("weight", "weight_scale"))
    w2_weight, w2_scale = (source(layer, ("down_proj",), leaf, tp) for leaf in ("weight", "weight_scale"))
    inter = layer.intermediate // tp[0]
    made = prepare(w13_weight, w2_weight, w13_scale, w2_scale, layer.hidden, inter, layer.experts, layer.gated)
    return dict(zip(BIG, made, strict=True))


def describe(tensor: torch.Tensor) -> dict[str, Any]:
    """Shape and digest of one tensor."""
    data = tensor.contiguous().view(torch.uint8).reshape(-1).numpy().tobytes()
    return {"shape": list(tensor.shape), "sha256": hashlib.sha256(data).hexdigest()}


def entries(sglang: Prepare) -> Iterator[tuple[str, dict[str, Any]]]:
    """All entries: ``<server>/<layer>/tp<size>-rank<rank>`` to its four tensors."""
    for layer in LAYERS:
        for size, rank in TP_SLICES:
            if layer.intermediate % (16 * size):
                continue
            key, share = f"{layer.name}/tp{size}-rank{rank}", layer.intermediate // size
            made = {"vllm": vllm_tensors(layer, (size, rank))}
            if share % (64 if layer.gated else 128) == 0 and layer.hidden % 256 == 0:
                made["sglang"] = sglang_tensors(layer, (size, rank), sglang)
            for server, tensors in made.items():
                yield f"{server}/{key}", {name: describe(tensors[name]) for name in BIG}


def main() -> None:
    """Writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sglang", type=Path, required=True, help="folder of an unpacked wheel")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    bring_up()
    import flashinfer

    import vllm

    flashinfer.nvfp4_block_scale_interleave = swizzle
    metadata = next(args.sglang.glob("sglang-*.dist-info"))
    made_by = {
        "command": "python tests/data/make_trtllm_digests.py --sglang FOLDER --output tests/data/trtllm_digests.json",
        "vllm": vllm.__version__,
        "sglang": metadata.name.removeprefix("sglang-").removesuffix(".dist-info"),
        "flashinfer": flashinfer.__version__,
        "what": "real preparation functions on the CPU, nvfp4_block_scale_interleave replaced; see the docstring",
    }
    layers = dict(entries(sglang_function(args.sglang)))
    args.output.write_text(json.dumps({"made_by": made_by, "layers": layers}, indent=1) + "\n")
    print(f"{len(layers)} layers written to {args.output}", file=sys.stderr)


if __name__ == "__main__":
    main()
