"""vLLM's own engine on a GPU: tokens of a prepared checkpoint, of its source's experts in its place, and after sleep.

Run as a program, one engine a process: ``engine_on_gpu.py MODEL SOURCE PREPARED ANSWER.json``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

PROMPTS = [[5, 6, 7, 8], list(range(10, 31)), [99, 3, 200], [250] * 40]
MAX_TOKENS = 24


def main(name: str, source: Path, prepared: Path, answer: Path) -> None:
    """Write tokens and their log-probabilities by what the engine did before."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "NVFP4_PREP_REFERENCE_MOE": "1",
    }
    from support.serving.vllm_on_gpu import bring_up

    bring_up()
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    from support.engine.whole_models import NEMOTRON_H, QWEN3_MOE
    from support.serving.source_experts_on_gpu import SourceLayers
    from vllm import LLM, SamplingParams

    model = {model.name: model for model in (QWEN3_MOE, NEMOTRON_H)}[name]
    engine = LLM(
        str(prepared),
        dtype="float16",
        enforce_eager=True,
        enable_sleep_mode=True,
        enable_prefix_caching=False,
        max_model_len=128,
        max_num_seqs=4,
        gpu_memory_utilization=0.2,
        kv_cache_memory_bytes=64 << 20,
        attention_backend="TRITON_ATTN",
        moe_backend="flashinfer_cutedsl",
        compilation_config={"custom_ops": ["none"]},
    )
    sampling = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, logprobs=1, ignore_eos=True)

    def complete() -> list[Any]:
        prompts: Any = [{"prompt_token_ids": tokens} for tokens in PROMPTS]
        done = [one.outputs[0] for one in engine.generate(prompts, sampling, use_tqdm=False)]
        return [
            [list(one.token_ids), [at[token].logprob for token, at in zip(one.token_ids, one.logprobs, strict=True)]]
            for one in done
        ]

    found = {"prepared": complete()}
    print("prepared", found["prepared"][0], flush=True)
    for key, wrong in (("source", False), ("wrong", True)):
        layers = SourceLayers(model, source, wrong)
        with mock.patch.object(RoutedExperts, "forward_modular", layers.forward()):
            found[key] = complete()
    print("source", found["source"][0], flush=True)
    answer.write_text(json.dumps(found))
    engine.sleep(level=1)
    engine.wake_up()
    found["level 1"] = complete()
    answer.write_text(json.dumps(found))
    engine.sleep(level=2)
    engine.wake_up(tags=["weights"])
    engine.collective_rpc("reload_weights")
    engine.wake_up(tags=["kv_cache"])
    found["level 2"] = complete()
    answer.write_text(json.dumps(found))
    print("done", flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main(sys.argv[1], *map(Path, sys.argv[2:]))
