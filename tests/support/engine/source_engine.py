"""The source checkpoint in vLLM's own engine, with the experts of `source_experts.py`.

Run as a program: ``source_engine.py SOURCE DTYPE REQUEST.json ANSWER.json``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import source_experts  # noqa: F401 (before vLLM's engine is)

from vllm import LLM, SamplingParams


def main(source: str, dtype: str, request: Path, answer: Path) -> None:
    """Write tokens and log-probabilities of the request's prompts, greedily decoded."""
    wanted = json.loads(request.read_text())
    options = {"enforce_eager": True, "max_model_len": 128, "max_num_seqs": 1, "enable_prefix_caching": False}
    engine = LLM(source, dtype=dtype, **options)
    sampling = SamplingParams(temperature=0, max_tokens=wanted["max_tokens"], logprobs=1, ignore_eos=True)
    prompts = [{"prompt_token_ids": tokens} for tokens in wanted["prompts"]]
    found = [one.outputs[0] for one in engine.generate(prompts, sampling)]
    answer.write_text(
        json.dumps(
            [
                {
                    "tokens": list(each.token_ids),
                    "logprobs": [at[token].logprob for token, at in zip(each.token_ids, each.logprobs, strict=True)],
                }
                for each in found
            ]
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
