"""One prepared layer straight into FlashInfer's CuteDSL fused MoE, without any server.

    python examples/flashinfer_direct.py PREPARED --layer 1 --tokens 64

Loads the layer (or a rank's share: --tp 0/8, --ep 0/8), quantizes random tokens as the kernel wants them, prints the
call's arguments and computes the output with the torch reference, which reads the same bytes. On a GPU of compute
capability 10.x it also calls FlashInfer and prints how far the two are apart; elsewhere it says that it did not. It has
not been run on such a GPU yet.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

import nvfp4_prep
from nvfp4_prep.errors import NvfpPrepError, UsageError
from nvfp4_prep_kernels import MoeDims
from nvfp4_prep_kernels.flashinfer_moe import FlashInferUnavailableError, find_entry_point
from nvfp4_prep_kernels.moe_types import MoeTokens, PreparedExperts
from nvfp4_prep_kernels.nvfp4 import encode_codes, quantize
from nvfp4_prep_kernels.torch_moe import TorchMoe


def rank(text: str) -> tuple[int, int]:
    """ "1/8" to (1, 8)."""
    number, _, size = text.partition("/")
    return int(number), int(size)


def number(text: str) -> int:
    """A count from 1."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def make_tokens(ready: nvfp4_prep.ReadyLayer, count: int, top_k: int, device: torch.device) -> dict[str, Any]:
    """Random tokens, routed to this rank's experts and quantized with the layer's input scale (linear scales)."""
    dims, layout = ready.loaded.record.dims, ready.loaded.record.layout
    random = torch.Generator().manual_seed(0)
    x = torch.randn(count, dims.hidden, generator=random)
    x = torch.nn.functional.pad(x, (0, layout.padded_hidden(dims.hidden) - dims.hidden))
    codes, scales = quantize(x, float(ready.x_global_scale))
    local, first = ready.arguments["num_local_experts"], ready.arguments["local_expert_offset"]
    chosen = torch.rand(count, local, generator=random).topk(top_k).indices + first
    weights = torch.softmax(torch.randn(count, top_k, generator=random), dim=-1)
    out = torch.empty(count, x.shape[1], dtype=torch.bfloat16, device=device)
    return {
        "x": encode_codes(codes).to(device),
        "x_sf": scales.to(torch.float8_e4m3fn).to(device).unsqueeze(-1),
        "token_selected_experts": chosen.to(torch.int32).to(device),
        "token_final_scales": weights.to(device),
        "top_k": top_k,
        "moe_output": out,
    }


def reference(ready: nvfp4_prep.ReadyLayer, tokens: Mapping[str, Any]) -> torch.Tensor:
    """What the kernel should give, ``float32 [tokens, Hp]`` on the CPU."""
    record, share = ready.loaded.record, ready.loaded.share
    dims, first = record.dims, ready.arguments["local_expert_offset"]
    stored = {name: tensor.cpu() for name, tensor in ready.tensors.items()}
    raw = {name: tensor.view(torch.uint8) if tensor.ndim == 3 else tensor for name, tensor in stored.items()}
    local = MoeDims(ready.arguments["num_local_experts"], dims.intermediate // share.tp_size, dims.hidden)
    routed = MoeTokens(
        tokens["x"].cpu(),
        tokens["x_sf"].squeeze(-1).view(torch.uint8).cpu(),
        tokens["token_selected_experts"].cpu() - first,
        tokens["token_final_scales"].cpu(),
    )
    layout = record.layout.for_moe_tp(1)
    out = torch.empty(tokens["x"].shape[0], layout.padded_hidden(dims.hidden))
    TorchMoe()(PreparedExperts(layout, local, **raw), routed, ready.activation, out)
    return out


def call_kernel(version: str, function: Callable[..., Any], call: Mapping[str, Any]) -> None:
    """Calls FlashInfer; an argument that the installed one does not know is an error, never left out."""
    missing = sorted(set(call) - set(inspect.signature(function).parameters))
    if missing:
        raise FlashInferUnavailableError(
            f"FlashInfer {version} cannot compute this layer (no parameter {', '.join(missing)}); run:"
            " pip install 'flashinfer-python>=0.7.2'"
        )
    function(**call)


def show(arguments: Mapping[str, Any]) -> None:
    """One line for each argument."""
    for name, value in arguments.items():
        text = f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
        print(f"  {name:24} {text}")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="directory that nvfp4-prep convert wrote")
    parser.add_argument("--layer", type=int, required=True, help="its number; nvfp4-prep inspect lists them")
    parser.add_argument("--tokens", type=number, default=64)
    parser.add_argument("--top-k", type=number, default=2, help="experts of each token")
    parser.add_argument("--tp", type=rank, default=(0, 1), metavar="RANK/SIZE")
    parser.add_argument("--ep", type=rank, default=(0, 1), metavar="RANK/SIZE")
    args = parser.parse_args()
    try:
        return run(args)
    except (NvfpPrepError, FlashInferUnavailableError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code if isinstance(error, NvfpPrepError) else 1


def run(args: argparse.Namespace) -> int:
    """Loads, shows, computes, and calls the kernel where there is one."""
    able = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 10
    device = torch.device("cuda" if able else "cpu")
    ready = nvfp4_prep.load_layer(args.checkpoint, args.layer, tp=args.tp, ep=args.ep, device=device)
    if args.top_k > ready.arguments["num_local_experts"]:
        raise UsageError(f"--top-k {args.top_k} is more than the rank's experts")
    tokens = make_tokens(ready, args.tokens, args.top_k, device)
    call = {**ready.arguments, **tokens}
    show(call)
    expected = reference(ready, tokens)
    print(f"torch reference: output {list(expected.shape)}, norm {expected.norm():.4g}")
    if not able:
        print("FlashInfer was not called: its kernel needs a GPU of compute capability 10.x")
        return 0
    version, function = find_entry_point()
    call_kernel(version, function, call)
    output = call["moe_output"].float().cpu()
    error = (output - expected).norm() / expected.norm()
    print(f"FlashInfer {version}: norm {output.norm():.4g}, relative distance to the reference {error:.3g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
