"""The processors near a GPU: reading threads and staging there spare the way between sockets."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch

__all__ = ["near_processors", "run_near", "stay_near"]

_SYS = Path("/sys")
_Result = TypeVar("_Result")


def near_processors(device: torch.device, threads: int, sys: Path = _SYS) -> frozenset[int] | None:
    """Return the processors of the NUMA node that a GPU is attached to, for one of the ranks with a GPU there.

    Args:
        device: of the load.
        threads: reading threads.
        sys: where sysfs is mounted.

    Returns:
        None where the node is not known, where this process is already bound to it, and where the node has fewer
        usable processors than the threads of the ranks of all visible GPUs there: then the others are better than none.
    """
    if device.type != "cuda" or not hasattr(os, "sched_getaffinity"):
        return None
    nodes = [_node(number, sys) for number in range(torch.cuda.device_count())]
    index = torch.cuda.current_device() if device.index is None else device.index
    node = nodes[index] if index < len(nodes) else None
    if node is None:
        return None
    usable = os.sched_getaffinity(0)
    near = _processors(sys / f"devices/system/node/node{node}/cpulist") & usable
    enough = len(near) >= threads * Counter(nodes)[node]
    return frozenset(near) if enough and near != usable else None


def stay_near(processors: frozenset[int] | None) -> None:
    """Bind the calling thread, and no other, to processors; does nothing for None or if the system refuses."""
    if processors is not None:
        try:
            os.sched_setaffinity(0, processors)
        except OSError:
            return  # a cpuset that became smaller meanwhile: anywhere, then


def run_near(processors: frozenset[int] | None, work: Callable[[], _Result]) -> _Result:
    """Return what a function returns, called on these processors: memory is allocated where it is first touched."""
    if processors is None:
        return work()
    with ThreadPoolExecutor(1, initializer=stay_near, initargs=(processors,)) as pool:
        return pool.submit(work).result()


def _node(number: int, sys: Path) -> int | None:
    """Return the NUMA node of a visible GPU, None where the driver, torch or the system does not say."""
    properties = torch.cuda.get_device_properties(number)
    address = [getattr(properties, f"pci_{name}_id", None) for name in ("domain", "bus", "device")]
    if None in address:
        return None
    domain, bus, slot = address
    try:
        node = int((sys / f"bus/pci/devices/{domain:04x}:{bus:02x}:{slot:02x}.0/numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def _processors(path: Path) -> set[int]:
    """Read a list such as ``0-15,32-47``; nothing if there is none."""
    try:
        parts = [part.partition("-") for part in path.read_text().strip().split(",")]
        return {number for first, _, last in parts for number in range(int(first), int(last or first) + 1)}
    except (OSError, ValueError):
        return set()
