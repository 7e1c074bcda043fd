"""Lower bounds on the time of a conversion, from a short probe: the source's disk, one core's rates, the planning.

Nothing is written, so the target's disk is not measured; the estimate is the largest of four lower bounds. The smoke
test at the end is estimated beside it.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nvfp4_prep._util.limits import usable_cores
from nvfp4_prep._util.system import start_thread
from nvfp4_prep._util.torch_threads import one_torch_thread
from nvfp4_prep.checkpoint.local_source import LocalSource
from nvfp4_prep.checkpoint.source import Source
from nvfp4_prep.planning.plan import Plan
from nvfp4_prep.smoke.gate import CPU_EXPERTS, cpu_layers

__all__ = ["SpeedEstimate", "estimate_speed"]

_BLOCK_NBYTES = 4 * 2**20
_READERS = 4
_PROBE_S = 0.5
_PASSES = 5
"""A byte's whole way through a conversion costs as much processor time as so many sha256 of it: two are digests, the
rest is layout, inverse, comparison and I/O. On 2 cores: 0.94 GB/s, where one core does 2.08 GB/s of sha256."""
_SMOKE_FLOPS = 4700
"""Of one weight in the smoke test on a CPU: its reference and the kernel's arithmetic, dequantization included, with
the default numbers of tokens. For experts of 2048 x 768 to 7168 x 2048: seconds times the rate of the probe."""
_PLANS = 2
"""The work over names costs so many times the planning: it is planned again, then written, indexed and recorded."""


@dataclass(frozen=True)
class SpeedEstimate:
    """Lower bounds of a conversion's seconds, without start-up, smoke run and writing.

    Attributes:
        read_s: to read the source past the page cache; ``None`` where that could not be measured.
        digest_s: to digest the largest file, which is done in order.
        cores_s: processor time of everything, shared by all cores.
        names_s: work over the tensors' names, which one core does; most of the time where tensors are tiny.
        read_gb_per_s, sha256_gb_per_s: what the probe measured, 10^9 bytes a second.
        cores: that this process may use, by its affinity and its control group's quota.
        smoke_s: of the smoke test on one core; ``None`` where a GPU runs it.
    """

    read_s: float | None
    digest_s: float
    cores_s: float
    names_s: float
    read_gb_per_s: float | None
    sha256_gb_per_s: float
    cores: int
    smoke_s: float | None = None

    @property
    def seconds(self) -> float:
        """The largest bound."""
        return max(self.read_s or 0.0, self.digest_s, self.cores_s, self.names_s)

    @property
    def limit(self) -> str:
        """What the largest bound is of: ``disk read``, ``digests``, ``cores`` or ``names``."""
        bounds = {"cores": self.cores_s, "digests": self.digest_s, "names": self.names_s}
        bounds["disk read"] = self.read_s or 0.0
        return max(bounds, key=lambda name: bounds[name])


def estimate_speed(plan: Plan, source: Source, planning_s: float) -> SpeedEstimate | None:
    """Probe for about a second and estimate; ``None`` for a source that is not on this machine.

    Args:
        plan: of the conversion.
        source: opened.
        planning_s: what it took to make the plan.
    """
    if not isinstance(source, LocalSource):
        return None
    nbytes = sum(file.nbytes for file in plan.source_files)
    read, digest = _read_rate(_blocks(source.root, plan)), _sha256_rate()
    cores = usable_cores()
    return SpeedEstimate(
        read_s=nbytes / read if read else None,
        digest_s=max(file.nbytes for file in plan.files) / digest,
        cores_s=_PASSES * nbytes / digest / cores,
        names_s=_PLANS * planning_s,
        read_gb_per_s=read / 1e9 if read else None,
        sha256_gb_per_s=digest / 1e9,
        cores=cores,
        smoke_s=None if torch.cuda.is_available() else _smoke_seconds(plan),
    )


def _smoke_seconds(plan: Plan) -> float:
    layers = {layer.source.index: layer.dims for layer in plan.layers}
    weights = 0
    for number in cpu_layers(layers) if layers else ():
        dims = layers[number]
        weights += min(CPU_EXPERTS, dims.experts) * 3 * dims.hidden * dims.intermediate
    return _SMOKE_FLOPS * weights / _flop_rate()


def _flop_rate() -> float:
    """Return the floating-point operations a second of one core, in a matrix product."""
    tokens, width = 256, 2048
    a, b = torch.ones(tokens, width), torch.ones(width, width)
    with one_torch_thread():
        torch.mm(a, b)
        begun = time.perf_counter()
        torch.mm(a, b)
        return 2 * tokens * width * width / (time.perf_counter() - begun)


def _sha256_rate() -> float:
    """Return the bytes a second of one core."""
    data = memoryview(bytes(8 * _BLOCK_NBYTES))
    begun = time.perf_counter()
    hashlib.sha256(data)
    return len(data) / (time.perf_counter() - begun)


def _blocks(root: Path, plan: Plan) -> list[tuple[str, int]]:
    """Return whole blocks to read as path and offset: first one of each shard, then further ones."""
    shards = [file for file in plan.source_files if file.nbytes >= _BLOCK_NBYTES]
    share = 64 // max(1, len(shards)) + 1
    blocks = []
    for turn in range(share):
        for file in shards:
            count = file.nbytes // _BLOCK_NBYTES
            if turn < count:
                blocks.append((str(root / file.name), turn * count // min(share, count) * _BLOCK_NBYTES))
    return blocks


def _read_rate(blocks: Sequence[tuple[str, int]]) -> float | None:
    """Return the bytes a second of several readers with direct I/O; ``None`` if that fails or there is too little."""
    waiting, done, failed = list(reversed(blocks)), [], threading.Event()
    end = time.perf_counter() + _PROBE_S

    def read() -> None:
        with contextlib.closing(mmap.mmap(-1, _BLOCK_NBYTES)) as buffer:  # page-aligned, as direct I/O wants it
            while waiting and not failed.is_set() and time.perf_counter() < end:
                with contextlib.suppress(IndexError):
                    path, offset = waiting.pop()
                    try:
                        done.append(_read_block(path, offset, buffer))
                    except OSError:
                        failed.set()

    begun = time.perf_counter()
    threads = [threading.Thread(target=read) for _ in range(_READERS)]
    for thread in threads:
        start_thread(thread)
    for thread in threads:
        thread.join()
    return sum(done) / (time.perf_counter() - begun) if done and not failed.is_set() else None


def _read_block(path: str, offset: int, buffer: mmap.mmap) -> int:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        return os.preadv(descriptor, [buffer], offset)
    finally:
        os.close(descriptor)
