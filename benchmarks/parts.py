"""What `make bench` runs: each part is a program of this folder that writes its figures as JSON."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        name: of the part and of its file of results.
        about: what it measures.
        program: file of this folder; it takes ``--json FILE`` and ends with 0 if its figures count.
        arguments: with ``{work}`` (a new folder on the disk) and ``{memory}`` (a new folder in memory).
        small: the arguments instead of these with ``--small``.
        needs: ``gpu``, ``vllm``, ``flashinfer``.
        limit_s: seconds after which it is ended.
        work_gb, memory_gb: free space that it needs there, in 10^9 bytes.
        awaited: the pages do without its figures while no run is on file.
    """

    name: str
    about: str
    program: str
    arguments: tuple[str, ...]
    small: tuple[str, ...]
    needs: tuple[str, ...] = ()
    limit_s: int = 600
    work_gb: float = 0.1
    memory_gb: float = 0.0
    awaited: bool = False


PARTS = (
    Part(
        "convert",
        "a conversion against cp and sync of the same bytes",
        "bench_convert.py",
        ("--work", "{work}"),
        ("--work", "{work}", "--experts", "8", "--hidden", "512", "--intermediate", "256", "--repetitions", "1"),
        limit_s=1200,
        work_gb=31,
    ),
    Part(
        "scaling",
        "every command on 2 to 32 cores, with cp, in memory",
        "bench_scaling.py",
        ("--memory", "{memory}"),
        ("--memory", "{memory}", "--experts", "8", "--layers", "1", "--only", "layer", "tiny", "--cores", "1"),
        limit_s=2400,
        memory_gb=31,
        awaited=True,
    ),
    Part(
        "load-host",
        "bytes and system calls of every rank's load",
        "bench_load_host.py",
        ("--directory", "{work}"),
        ("--directory", "{work}", "--experts", "1"),
        limit_s=300,
        work_gb=1,
    ),
    Part(
        "slow-storage",
        "ranks on storage whose every read costs milliseconds",
        "bench_slow_storage.py",
        ("--directory", "{memory}"),
        ("--directory", "{memory}", "--small", "--ranks", "2", "--repeats", "1", "--delay-ms", "1"),
        needs=("vllm",),
        limit_s=2400,
        memory_gb=2,
        awaited=True,
    ),
    Part(
        "smoke-host",
        "what the smoke run catches, torch backend",
        "bench_smoke.py",
        ("--backend", "torch"),
        ("--backend", "torch"),
    ),
    Part(
        "compile-flashinfer",
        "FlashInfer's kernels compiled for sm_100a",
        "bench_compile_flashinfer.py",
        (),
        (),
        needs=("flashinfer",),
    ),
    Part(
        "prepare-kernels",
        "the preparation kernels, 96 experts",
        "bench_prepare_kernels.py",
        ("--experts", "96"),
        ("--experts", "8", "--repeats", "3"),
        needs=("gpu", "vllm"),
        limit_s=300,
    ),
    Part(
        "prepare-kernels-layer",
        "the preparation kernels, a layer of 384 experts",
        "bench_prepare_kernels.py",
        ("--experts", "384"),
        ("--experts", "16", "--repeats", "3"),
        needs=("gpu", "vllm"),
        limit_s=300,
    ),
    Part(
        "trtllm-kernels",
        "TRTLLM-gen's layout: preparation and conversion, 96 experts",
        "bench_trtllm_kernels.py",
        ("--experts", "96"),
        ("--experts", "8", "--repeats", "3"),
        needs=("gpu", "vllm"),
        limit_s=300,
    ),
    Part(
        "load-ranks",
        "all ranks of a host at once",
        "bench_load_ranks.py",
        ("--directory", "{memory}", "--experts", "384"),
        ("--directory", "{memory}", "--experts", "8", "--repeats", "2"),
        needs=("gpu",),
        memory_gb=10,
    ),
    Part(
        "relayout-load",
        "a layer loaded for the other kernel against the file's own",
        "bench_relayout_load.py",
        ("--directory", "{memory}"),
        ("--directory", "{memory}", "--experts", "16", "--repeats", "2"),
        needs=("gpu",),
        limit_s=300,
        memory_gb=10,
    ),
    Part(
        "smoke",
        "the smoke run of a whole layer, and what it catches",
        "bench_smoke.py",
        (),
        ("--experts", "16", "--mutation-experts", "4", "--repeats", "1"),
        needs=("gpu",),
    ),
    Part(
        "load",
        "the loader against other loaders and the bus",
        "bench_load.py",
        ("--directory", "{memory}", "--disk", "{work}"),
        ("--directory", "{memory}", "--disk", "{work}", "--layers", "1", "--repeats", "2", "--sweep", "4,4,8 12,4,20"),
        needs=("gpu", "vllm"),
        work_gb=2,
        memory_gb=26,
    ),
    Part(
        "load-vllm",
        "the whole load by vLLM's own code",
        "bench_load_vllm.py",
        ("--directory", "{memory}", "--repeats", "10"),
        ("--directory", "{memory}", "--experts", "32", "--repeats", "2"),
        needs=("gpu", "vllm"),
        memory_gb=20,
    ),
    Part(
        "start",
        "the start of a whole model in vLLM, from construction to ready",
        "bench_start.py",
        ("--directory", "{memory}"),
        ("--directory", "{memory}", "--layers", "1", "--experts", "8", "--repeats", "1"),
        needs=("gpu", "vllm"),
        limit_s=1200,
        memory_gb=45,
        awaited=True,
    ),
)
"""Host parts first."""
