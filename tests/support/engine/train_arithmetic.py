"""A small Qwen3-MoE model that adds numbers of two digits: trained, and its experts quantized to NVFP4 by ModelOpt.

Run as a program: ``train_arithmetic.py MODEL TASK STEPS``. MODEL gets the quantized checkpoint with its tokenizer, TASK
an lm-eval task named ``addition``, shaped as GSM8K is, with questions that the model was not trained on.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

QUESTIONS = 200
SHOTS = 5
ALPHABET = "#0123456789+=\n"
"""One token a character; the first pads."""
CONFIG: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    # Not a multiple of 32: so vLLM takes no AMX attention, an illegal instruction on some virtual machines.
    "head_dim": 80,
    "moe_intermediate_size": 128,
    "intermediate_size": 256,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "architectures": ["Qwen3MoeForCausalLM"],
}
BATCH = 16
LEARNING_RATE = 1e-3
TASK = """\
task: addition
dataset_path: json
dataset_kwargs:
  data_files:
    train: {folder}/train.jsonl
    test: {folder}/test.jsonl
output_type: generate_until
training_split: train
fewshot_split: train
test_split: test
doc_to_text: "{{{{question}}}}="
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
fewshot_delimiter: "\\n"
generation_kwargs:
  until: ["\\n"]
  do_sample: false
  temperature: 0.0
  max_gen_toks: 8
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
filter_list:
  - name: strict-match
    filter:
      - function: regex
        regex_pattern: "([0-9]{{3}})"
      - function: take_first
"""

Problem = tuple[int, int]


def question(problem: Problem) -> str:
    """Return ``07+35``."""
    return f"{problem[0]:02d}+{problem[1]:02d}"


def answer(problem: Problem) -> str:
    """Return ``042``."""
    return f"{sum(problem):03d}"


def problems() -> tuple[list[Problem], list[Problem]]:
    """Return those to train on and those to be asked."""
    every = list(itertools.product(range(100), repeat=2))
    random.Random(0).shuffle(every)
    return every[QUESTIONS:], every[:QUESTIONS]


def batches(known: list[Problem], seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of token ids, and where an answer or its end is to be foretold: each row is a prompt of lm-eval."""
    chosen = random.Random(seed)
    while True:
        rows, targets = [], []
        for _ in range(BATCH):
            lines = [(f"{question(one)}=", f"{answer(one)}\n") for one in chosen.choices(known, k=SHOTS + 1)]
            rows.append([ALPHABET.index(character) for line in lines for character in "".join(line)])
            targets.append([part for asked, told in lines for part in [False] * len(asked) + [True] * len(told)])
        yield torch.tensor(rows), torch.tensor(targets)


def train(known: list[Problem], steps: int) -> Qwen3MoeForCausalLM:
    """Return the model after that many steps, with a learning rate that falls to zero."""
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**CONFIG))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 50) * (1 - step / steps))
    for tokens, target in itertools.islice(batches(known, seed=1), steps):
        logits = model(tokens).logits[:, :-1]
        where = target[:, 1:]
        loss = torch.nn.functional.cross_entropy(logits[where], tokens[:, 1:][where])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    print(f"loss of the last batch: {loss.item():.3f}")
    return model.to(torch.bfloat16).eval()


def quantize(model: Qwen3MoeForCausalLM, known: list[Problem], directory: Path) -> None:
    """Calibrate input scales, quantize the experts and write the checkpoint, all by ModelOpt."""

    def calibrate(calibrated: torch.nn.Module) -> None:
        with torch.no_grad():
            for tokens, _ in itertools.islice(batches(known, seed=2), 4):
                calibrated(tokens)

    mtq.quantize(model, mtq.NVFP4_EXPERTS_ONLY_CFG, calibrate)
    export_hf_checkpoint(model, export_dir=str(directory))


def tokenizer() -> PreTrainedTokenizerFast:
    """Return one token a character."""
    made = Tokenizer(WordLevel({character: place for place, character in enumerate(ALPHABET)}, unk_token=ALPHABET[0]))
    made.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token=ALPHABET[0], pad_token=ALPHABET[0], clean_up_tokenization_spaces=False
    )


def write_task(folder: Path, known: list[Problem], asked: list[Problem]) -> None:
    """Write lm-eval's task and its data."""
    folder.mkdir(parents=True)
    for name, chosen in (("train", known[:100]), ("test", asked)):
        lines = [json.dumps({"question": question(one), "answer": answer(one)}) for one in chosen]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "addition.yaml").write_text(TASK.format(folder=folder))


def main(model: Path, task: Path, steps: int) -> None:
    """Train, quantize, write."""
    known, asked = problems()
    quantize(train(known, steps), known, model)
    tokenizer().save_pretrained(model)
    write_task(task, known, asked)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
