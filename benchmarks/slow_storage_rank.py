"""One tensor-parallel rank of bench_slow_storage.py: loads when it is told to, and says when it began and ended.

    python slow_storage_rank.py WAY RANK RANKS FD   # told by lines of JSON on stdin, answers on the descriptor

``plain`` is the loader alone, in whatever version of this project is on the path. ``vllm`` is the real vLLM on the CPU:
its own loaders, or this project's load format inside it.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

THREADS = 3
"""Reading threads a rank: what eight ranks have on 32 cores."""
Load = Callable[[], None]
Digest = Callable[[], str]


def digest_of(tensors: list[torch.Tensor]) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().contiguous().view(torch.uint8).numpy())
    return found.hexdigest()


class Plain:
    """The loader alone."""

    def __init__(self, rank: int, ranks: int) -> None:
        from nvfp4_prep.load import ExpertLoader, LoadOptions

        self.rank, self.ranks = rank, ranks
        self.loader = ExpertLoader("cpu", LoadOptions(threads=THREADS))

    def prepare(self, told: dict[str, Any]) -> tuple[Load, Digest]:
        from nvfp4_prep.load import loader
        from nvfp4_prep_kernels import MoeDims, MoeLayout, PreparedTensor, rank_slice

        dims, layout = MoeDims(**told["dims"]), MoeLayout.cutedsl(gated=True)
        experts, submitted = tuple(range(dims.experts)), []
        for tensor in PreparedTensor:
            record = told["records"][tensor.value]
            record = loader.TensorRecord(**{**record, "shape": tuple(record["shape"])})  # type: ignore[attr-defined]
            part = rank_slice(layout, tensor, dims, self.rank, self.ranks)
            data = torch.zeros((dims.experts, *part.shape), dtype=torch.uint8)
            submitted.append((Path(told["file"]), record, part, experts, data))

        def load() -> None:
            for each in submitted:
                self.loader.submit(*each)
            self.loader.finish()

        return load, lambda: digest_of([each[-1] for each in submitted])


class InVllm:
    """vLLM's own load, from its loader's ``load_weights`` on."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks
        from support.serving.vllm_on_cpu import bring_up

        bring_up()
        from nvfp4_prep.vllm import register

        register()

    def config(self, told: dict[str, Any]) -> Any:
        from support.serving.vllm_on_cpu import make_vllm_config

        parallel = {"tensor_parallel_size": self.ranks}
        return make_vllm_config(Path(told["directory"]), load=told["load"], parallel=parallel)

    def prepare(self, told: dict[str, Any]) -> tuple[Load, Digest]:
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader import get_model_loader
        from vllm.utils.torch_utils import set_default_torch_dtype

        from support.serving.vllm_on_cpu import routed_experts

        config = self.config(told)
        with set_current_vllm_config(config), set_default_torch_dtype(torch.bfloat16):
            loader = get_model_loader(config.load_config)
            model = loader.create_model(vllm_config=config, model_config=config.model_config)
        (experts,) = routed_experts(model).values()

        def load() -> None:
            with set_current_vllm_config(config), set_default_torch_dtype(torch.bfloat16):
                loader.load_weights(model, config.model_config)

        names = ("w13_weight", "w13_weight_scale", "w2_weight", "w2_weight_scale")
        return load, lambda: digest_of([getattr(experts, name) for name in names])


def main() -> None:
    way, rank, ranks = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    answers = os.fdopen(int(sys.argv[4]), "w", buffering=1)
    told = json.loads(sys.stdin.readline())
    me = Plain(rank, ranks) if way == "plain" else InVllm(rank, ranks)
    if isinstance(me, InVllm):
        from support.serving.vllm_on_cpu import rank_of

        with rank_of(me.config(told), rank, ranks, told["meeting"]):
            answers.write("ready\n")
            serve(me, answers)
    else:
        answers.write("ready\n")
        serve(me, answers)


def serve(me: Plain | InVllm, answers: Any) -> None:
    """One load for every two lines: what is to be loaded, answered when all is allocated, and ``go``."""
    for line in sys.stdin:
        load, digest = me.prepare(json.loads(line))
        answers.write("prepared\n")
        sys.stdin.readline()
        begun = time.monotonic()
        load()
        ended = time.monotonic()
        answers.write(json.dumps({"begun": begun, "ended": ended, "sha256": digest()}) + "\n")


if __name__ == "__main__":
    main()
