"""GSM8K accuracy of a prepared checkpoint against its source, both served by vLLM with the prepared file's kernel.

    python examples/gsm8k.py SOURCE PREPARED -- --tensor-parallel-size 8

Serves the source with the --moe-backend that the prepared layout is for (of a Hub id: flashinfer_cutedsl), runs
lm-eval's gsm8k (five-shot, greedy, through the completions endpoint, as vLLM's own accuracy tests do), stops the
server, does the same with the prepared checkpoint and compares. The weights in the kernel are bit-equal (where gate and
up share their scales, see the manifest), so the two scores differ only by the run-to-run noise of batched greedy
decoding: the check fails if they differ by more than --tolerance (default 0.02, about two standard errors of 1,319
questions at 90 %). It also says how many answers differ.

Needs GPUs of compute capability 10.0 or 10.3, and (in a clone): pip install . vllm==0.33.0 "lm-eval[api]"
--dry-run prints the commands. Exit code 1: accuracy lost. It has not been run on such a GPU yet; with a small model, a
task of its own (--task, --include-path) and a CPU build of vLLM (--serve) it is run by tests/engine/test_accuracy.py.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

FILTER = "strict-match"
INSTALL = 'Run in a clone: pip install . vllm==0.33.0 "lm-eval[api]"'


@dataclass(frozen=True)
class Evaluation:
    """The task and how lm-eval asks it.

    Attributes:
        task: lm-eval's name; it must have exact_match under the filter strict-match, as gsm8k has.
        shots: solved questions before each question.
        concurrency: questions asked at the same time.
        limit: questions, or None for all.
        include_path: folder with a task that lm-eval does not have.
    """

    task: str = "gsm8k"
    shots: int = 5
    concurrency: int = 64
    limit: int | None = None
    include_path: str | None = None

    def command(self, model: str, port: int, output: Path) -> list[str]:
        """Return lm-eval's command."""
        url = f"http://127.0.0.1:{port}/v1/completions"
        served = f"model={model},base_url={url},num_concurrent={self.concurrency},max_retries=3"
        command = ["lm_eval", "--model", "local-completions", "--model_args", f"{served},tokenized_requests=False"]
        command += ["--tasks", self.task, "--num_fewshot", str(self.shots), "--batch_size", "1"]
        command += ["--output_path", str(output), "--log_samples"]
        if self.include_path is not None:
            command += ["--include_path", self.include_path]
        return command if self.limit is None else [*command, "--limit", str(self.limit)]


@dataclass(frozen=True)
class Score:
    """What lm-eval found.

    Attributes:
        exact: share of right answers.
        error: its standard error.
        answers: by number of the question.
    """

    exact: float
    error: float
    answers: dict[int, str] = field(default_factory=dict, repr=False)

    def differing(self, other: Score) -> int:
        """Return how many questions have another answer."""
        numbers = self.answers.keys() | other.answers.keys()
        return sum(self.answers.get(number) != other.answers.get(number) for number in numbers)


def backend_of(prepared: Path) -> str:
    """Return vLLM's --moe-backend for the layout of a prepared checkpoint: CuteDSL where it is not a local one."""
    file = prepared / "config.json"
    if not file.is_file():
        return "flashinfer_cutedsl"
    return str(json.loads(file.read_text())["quantization_config"]["layout"]["name"]).removesuffix("_batched")


def serve_command(serve: str, model: str, port: int, extra: Sequence[str], *, backend: str | None) -> list[str]:
    """Return the server's command; a prepared checkpoint needs no backend."""
    chosen = () if backend is None else ("--moe-backend", backend)
    return [*shlex.split(serve), model, "--port", str(port), *chosen, *extra]


@contextlib.contextmanager
def server(command: Sequence[str], port: int, timeout_s: float) -> Iterator[None]:
    """Run a server until the block ends; raise ``RuntimeError`` if it does not get healthy."""
    if healthy(port):
        raise RuntimeError(f"port {port} has a server already: give another --port")
    process = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + timeout_s
        while not healthy(port):
            if process.poll() is not None:
                raise RuntimeError(f"the server ended with exit code {process.returncode}: {shlex.join(command)}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"the server was not healthy after {timeout_s:.0f} s: {shlex.join(command)}")
            time.sleep(2)
        yield
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def healthy(port: int) -> bool:
    """Return whether the server answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def read_score(output: Path, task: str) -> Score:
    """Read lm-eval's newest result file under ``output``, and the answers that were logged with it."""
    result = json.loads(newest(output, "results*.json").read_text())["results"][task]
    answers = {}
    for line in newest(output, f"samples_{task}_*.jsonl").read_text().splitlines():
        sample = json.loads(line)
        if sample["filter"] == FILTER:
            answers[int(sample["doc_id"])] = str(sample["filtered_resps"][0])
    return Score(float(result[f"exact_match,{FILTER}"]), float(result[f"exact_match_stderr,{FILTER}"]), answers)


def newest(output: Path, pattern: str) -> Path:
    """Return the newest file of a pattern; lm-eval puts a time into each name."""
    files = sorted(output.rglob(pattern), key=lambda path: path.stat().st_mtime)
    if not files:
        raise RuntimeError(f"lm-eval left no {pattern} under {output}")
    return files[-1]


def accuracy(
    serve: Sequence[str], evaluation: Evaluation, model: str, port: int, timeout_s: float, output: Path
) -> Score:
    """Serve, evaluate, stop."""
    with server(serve, port, timeout_s):
        subprocess.run(evaluation.command(model, port, output), check=True)
    return read_score(output, evaluation.task)


def verdict(source: Score, prepared: Score, tolerance: float) -> tuple[bool, str]:
    """Return whether the prepared checkpoint is as accurate, and the sentence for the report."""
    difference = prepared.exact - source.exact
    good = abs(difference) <= tolerance
    text = f"source {source.exact:.4f} ± {source.error:.4f}, prepared {prepared.exact:.4f} ± {prepared.error:.4f}"
    text += f", difference {difference:+.4f} ({'within' if good else 'MORE THAN'} {tolerance})"
    return good, f"{text}, {source.differing(prepared)} of {len(source.answers)} answers differ"


def arguments_of(argv: Sequence[str]) -> argparse.Namespace:
    """Return the parsed command line; what stands after ``--`` is for vLLM."""
    own = list(argv[: argv.index("--")] if "--" in argv else argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="directory or Hub id of the source")
    parser.add_argument("prepared", help="directory or Hub id of the prepared checkpoint")
    parser.add_argument("--task", default=Evaluation.task, help="lm-eval's task (default %(default)s)")
    parser.add_argument("--include-path", help="folder with a task that lm-eval does not have")
    parser.add_argument("--shots", type=int, default=Evaluation.shots)
    parser.add_argument("--concurrency", type=int, default=Evaluation.concurrency, help="questions at a time")
    parser.add_argument("--limit", type=int, help="questions (all by default; gsm8k has 1,319)")
    parser.add_argument("--tolerance", type=float, default=0.02)
    parser.add_argument("--output", type=Path, help="folder for lm-eval's results and answers (else thrown away)")
    parser.add_argument("--serve", default="vllm serve", help="server's command, before the model")
    parser.add_argument("--serve-source", help="the source's server, if it is another one")
    parser.add_argument("--port", type=int, default=8321)
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for a server to get healthy")
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    args = parser.parse_args(own)
    args.vllm = list(argv[len(own) + 1 :])
    programs = [shlex.split(serve)[0] for serve in (args.serve, args.serve_source or args.serve)]
    missing = [program for program in dict.fromkeys([*programs, "lm_eval"]) if shutil.which(program) is None]
    if missing and not args.dry_run:
        parser.error(f"not installed: {', '.join(missing)}. {INSTALL}")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    args = arguments_of(sys.argv[1:] if arguments is None else arguments)
    evaluation = Evaluation(args.task, args.shots, args.concurrency, args.limit, args.include_path)
    scores = []
    with tempfile.TemporaryDirectory() as thrown_away:
        for name, model in (("source", args.source), ("prepared", args.prepared)):
            prepared, output = name == "prepared", (args.output or Path(thrown_away)) / name
            command = args.serve if prepared else args.serve_source or args.serve
            backend = None if prepared else backend_of(Path(args.prepared))
            serve = serve_command(command, model, args.port, args.vllm, backend=backend)
            print(f"$ {shlex.join(serve)} &", file=sys.stderr)
            print(f"$ {shlex.join(evaluation.command(model, args.port, output))}", file=sys.stderr)
            if args.dry_run:
                continue
            try:
                scores.append(accuracy(serve, evaluation, model, args.port, args.timeout, output))
            except (RuntimeError, subprocess.CalledProcessError) as error:
                sys.exit(f"error: {error}")
    if args.dry_run:
        return 0
    good, text = verdict(*scores, args.tolerance)
    print(text)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
