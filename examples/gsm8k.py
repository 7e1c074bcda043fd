"""GSM8K accuracy of a prepared checkpoint against its source, both served by vLLM with the same kernel.

    python examples/gsm8k.py SOURCE PREPARED -- --tensor-parallel-size 8

Serves the source with --moe-backend flashinfer_cutedsl, runs lm-eval's gsm8k (five-shot, greedy, through the
completions endpoint, as vLLM's own accuracy tests do), stops the server, does the same with the prepared checkpoint and
compares. The weights in the kernel are bit-equal (where gate and up share their scales, see the manifest), so the two
scores differ only by the run-to-run noise of batched greedy decoding: the check fails if they differ by more than
--tolerance (default 0.02, about two standard errors of 1,319 questions at 90 %).

Needs GPUs of compute capability 10.0 or 10.3, and (in a clone): pip install . vllm==0.33.0 "lm-eval[api]"
--dry-run prints the commands. Exit code 1: accuracy lost. It has not been run on such a GPU yet.
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
from pathlib import Path

KERNEL = ("--moe-backend", "flashinfer_cutedsl")


def serve_command(model: str, port: int, extra: Sequence[str], *, prepared: bool) -> list[str]:
    """vLLM's command; a prepared checkpoint needs no backend flag."""
    return ["vllm", "serve", model, "--port", str(port), *(() if prepared else KERNEL), *extra]


def eval_command(model: str, port: int, output: Path, limit: int | None) -> list[str]:
    """lm-eval's command."""
    served = f"model={model},base_url=http://127.0.0.1:{port}/v1/completions,num_concurrent=64,max_retries=3"
    command = ["lm_eval", "--model", "local-completions", "--model_args", f"{served},tokenized_requests=False"]
    command += ["--tasks", "gsm8k", "--num_fewshot", "5", "--batch_size", "1", "--output_path", str(output)]
    return command if limit is None else [*command, "--limit", str(limit)]


@contextlib.contextmanager
def server(command: Sequence[str], port: int, timeout_s: float) -> Iterator[None]:
    """Runs a server until the block ends; raises ``RuntimeError`` if it does not get healthy."""
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
    """Whether the server answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def read_score(output: Path) -> tuple[float, float]:
    """(exact match, standard error) from lm-eval's newest result file under ``output``."""
    files = sorted(output.rglob("results*.json"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise RuntimeError(f"lm-eval left no results under {output}")
    result = json.loads(files[-1].read_text())["results"]["gsm8k"]
    return float(result["exact_match,strict-match"]), float(result["exact_match_stderr,strict-match"])


def accuracy(model: str, args: argparse.Namespace, *, prepared: bool) -> tuple[float, float]:
    """Serves, evaluates, stops."""
    serve = serve_command(model, args.port, args.vllm, prepared=prepared)
    with tempfile.TemporaryDirectory() as folder:
        evaluate = eval_command(model, args.port, Path(folder), args.limit)
        print(f"$ {shlex.join(serve)} &\n$ {shlex.join(evaluate)}", file=sys.stderr)
        if args.dry_run:
            return 0.0, 0.0
        with server(serve, args.port, args.timeout):
            subprocess.run(evaluate, check=True)
        return read_score(Path(folder))


def verdict(source: tuple[float, float], prepared: tuple[float, float], tolerance: float) -> tuple[bool, str]:
    """Whether the prepared checkpoint is as accurate, and the sentence for the report."""
    difference = prepared[0] - source[0]
    good = abs(difference) <= tolerance
    text = f"source {source[0]:.4f} ± {source[1]:.4f}, prepared {prepared[0]:.4f} ± {prepared[1]:.4f}"
    return good, f"{text}, difference {difference:+.4f} ({'within' if good else 'MORE THAN'} {tolerance})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    extra = argv[argv.index("--") + 1 :] if "--" in argv else []
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="directory or Hub id of the source")
    parser.add_argument("prepared", help="directory or Hub id of the prepared checkpoint")
    parser.add_argument("--port", type=int, default=8321)
    parser.add_argument("--limit", type=int, help="questions (all 1,319 by default)")
    parser.add_argument("--tolerance", type=float, default=0.02)
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for a server to get healthy")
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    args = parser.parse_args(argv[: argv.index("--")] if "--" in argv else argv)
    args.vllm = extra
    missing = [program for program in ("vllm", "lm_eval") if shutil.which(program) is None]
    if missing and not args.dry_run:
        parser.error(f'not installed: {", ".join(missing)}. Run in a clone: pip install . vllm==0.33.0 "lm-eval[api]"')
    try:
        source = accuracy(args.source, args, prepared=False)
        prepared = accuracy(args.prepared, args, prepared=True)
    except (RuntimeError, subprocess.CalledProcessError) as error:
        sys.exit(f"error: {error}")
    if args.dry_run:
        return 0
    good, text = verdict(source, prepared, args.tolerance)
    print(text)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
