"""Doctor: what is installed here, how fast the disk is, and what of this tool will work."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nvfp4_prep._util.arguments import PATH, checked, optional
from nvfp4_prep._util.installed import installed_versions
from nvfp4_prep._util.limits import machine_memory_nbytes, usable_cores, usable_memory_nbytes
from nvfp4_prep._util.system import open_files_error
from nvfp4_prep._util.text import format_nbytes
from nvfp4_prep.errors import UsageError

__all__ = [
    "PLUGIN_GROUP",
    "SGLANG_PLUGIN_GROUP",
    "Ability",
    "Diagnosis",
    "DiskSpeed",
    "diagnose",
    "measure_disk",
]

PLUGIN_GROUP = "vllm.general_plugins"
SGLANG_PLUGIN_GROUP = "sglang.srt.plugins"
_DISK_NBYTES = 512 * 2**20
_BLOCK_NBYTES = 16 * 2**20


@dataclass(frozen=True)
class Ability:
    """An ability of this tool, whether it will work here, and why (not)."""

    name: str
    works: bool
    reason: str


@dataclass(frozen=True)
class DiskSpeed:
    """A directory's disk: rates of one sequential file of random bytes.

    Attributes:
        directory: where.
        free_nbytes: room.
        write_gb_per_s: 10^9 bytes a second, with the flush to disk in the time.
        read_gb_per_s: read back past the page cache; ``None`` where the file system has no direct I/O.
        locks: whether the file system has the locks that keep two runs apart.
    """

    directory: str
    free_nbytes: int
    write_gb_per_s: float
    read_gb_per_s: float | None
    locks: bool


@dataclass(frozen=True)
class Diagnosis:
    """Findings of :func:`diagnose`.

    Attributes:
        versions: of this tool, Python and the packages; empty where a package is not installed.
        machine: processors, memory and system.
        cards: CUDA devices, one line each.
        abilities: what will work.
        disk: where a directory was given.
    """

    versions: dict[str, str]
    machine: str
    cards: tuple[str, ...]
    abilities: tuple[Ability, ...]
    disk: DiskSpeed | None

    def __repr__(self) -> str:
        works = sum(ability.works for ability in self.abilities)
        return f"Diagnosis(ok={self.ok}, {works} of {len(self.abilities)} abilities, {len(self.cards)} GPUs)"

    @property
    def ok(self) -> bool:
        """Whether checkpoints can be converted here."""
        return self.abilities[0].works

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON value."""
        return {"ok": self.ok, **asdict(self)}


@checked(directory=optional(PATH))
def diagnose(directory: str | Path | None = None) -> Diagnosis:
    """Look at this machine. Needs no GPU and no optional package.

    Args:
        directory: measure the disk under it: 537 MB are written, read and deleted.

    Raises:
        UsageError: if the directory cannot be written.
    """
    found = installed_versions()
    cards, no_torch = _cards()
    return Diagnosis(
        versions=found,
        machine=_machine(),
        cards=cards,
        abilities=(*_offline(no_torch), *_vllm(cards, found["vllm"]), *_sglang(cards, found["sglang"])),
        disk=None if directory is None else measure_disk(Path(directory)),
    )


def _machine() -> str:
    """Return what this process may use of the machine, and what the machine has where that is more."""
    cores, machine_cores = usable_cores(), os.cpu_count() or 1
    memory, machine_memory = format_nbytes(usable_memory_nbytes()), format_nbytes(machine_memory_nbytes())
    text = f"{cores} processors, {memory} memory"
    if (cores, memory) != (machine_cores, machine_memory):
        text = f"{cores} of {machine_cores} processors, {memory} of {machine_memory} memory (this process's limits)"
    return f"{text}, {platform.system()} {platform.machine()}"


def _cards() -> tuple[tuple[str, ...], str]:
    """Return the CUDA devices; and why torch cannot be used, or an empty text."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library that torch links is missing
        return (), f"torch cannot be imported ({error})"
    lines = []
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        lines.append(
            f"{facts.name}, compute capability {facts.major}.{facts.minor}, {format_nbytes(facts.total_memory)}"
        )
    return tuple(lines), ""


def _offline(no_torch: str) -> list[Ability]:
    offline = Ability("convert, verify, restore, relayout", not no_torch, no_torch or "on the CPU, no GPU needed")
    if no_torch:
        return [offline]
    from nvfp4_prep.smoke.backends import choose_backend

    facts = choose_backend().facts
    real = "the kernel that serves" if facts.real_kernel else f"not the kernel that serves ({facts.reason})"
    return [offline, Ability("smoke test of the fused experts", True, f"{facts.name} on {facts.device}: {real}")]


@dataclass(frozen=True)
class _AllowList:
    """Plugins that a server may load, by the environment; all without ``names``."""

    variable: str
    names: list[str] | None


def _vllm(cards: tuple[str, ...], version: str) -> list[Ability]:
    from nvfp4_prep.vllm.versions import version_problem

    problem = version_problem(version) if version else "vLLM is not installed"
    allowed = os.environ.get("VLLM_PLUGINS")
    names = None if allowed is None else allowed.split(",")  # as vLLM reads it: an empty list allows nothing
    return _serving("vLLM", version, problem, PLUGIN_GROUP, _AllowList("VLLM_PLUGINS", names), cards)


def _sglang(cards: tuple[str, ...], version: str) -> list[Ability]:
    from nvfp4_prep.sglang.versions import version_problem

    problem = version_problem(version) if version else "SGLang is not installed"
    allowed = os.environ.get("SGLANG_PLUGINS")
    names = [name.strip() for name in allowed.split(",")] if allowed else None  # as SGLang reads it: empty is unset
    return _serving("SGLang", version, problem, SGLANG_PLUGIN_GROUP, _AllowList("SGLANG_PLUGINS", names), cards)


def _serving(
    server: str, version: str, problem: str | None, group: str, allowed: _AllowList, cards: tuple[str, ...]
) -> list[Ability]:
    """Return whether a server sees the plugin, and whether it will serve with it."""
    visible = any(point.name == "nvfp4_prep" for point in importlib.metadata.entry_points(group=group))
    if not visible:
        reason = f"no entry point in {group}: install nvfp4-prep here (pip install . in a clone of it)"
        plugin = Ability(f"{server} plugin", False, reason)
    elif allowed.names is not None and "nvfp4_prep" not in allowed.names:
        reason = f"{allowed.variable}={','.join(allowed.names)} leaves nvfp4_prep out"
        plugin = Ability(f"{server} plugin", False, reason)
    else:
        reason = f"visible to {server}" if version else f"installed ({server} itself is not)"
        plugin = Ability(f"{server} plugin", True, reason)
    missing = [] if plugin.works else ["the plugin is not visible"]
    missing += [problem] if problem else []
    if not any("compute capability 10." in card for card in cards):
        names = "B200, B300, GB200, GB300"
        missing.append(f"the CuteDSL and TRTLLM-gen kernels need a GPU of compute capability 10.x ({names})")
    return [plugin, Ability(f"serving with {server}", not missing, "; ".join(missing) or f"{server} {version}")]


def measure_disk(directory: Path) -> DiskSpeed:
    """Write, flush, read and delete one file of random bytes.

    Raises:
        UsageError: if the directory does not exist, cannot be written or has no room.
    """
    another = "Give a directory that you can write to, with 1.07 GB free."
    try:
        free = shutil.disk_usage(directory).free
        if free < 2 * _DISK_NBYTES:
            raise UsageError(
                f"only {format_nbytes(free)} free: too little to measure", where=str(directory), next_step=another
            )
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".nvfp4-prep-doctor-") as file:
            block = os.urandom(_BLOCK_NBYTES)
            begin = time.perf_counter()
            for _ in range(_DISK_NBYTES // _BLOCK_NBYTES):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            write_s = time.perf_counter() - begin
            return DiskSpeed(
                directory=str(directory),
                free_nbytes=free,
                write_gb_per_s=_DISK_NBYTES / write_s / 1e9,
                read_gb_per_s=_read_rate(file.name),
                locks=_has_locks(file.fileno()),
            )
    except OSError as error:
        refused = UsageError(f"cannot be measured ({error.strerror})", where=str(directory), next_step=another)
        raise open_files_error(error, str(directory)) or refused from error


def _read_rate(path: str) -> float | None:
    """Return 10^9 bytes a second with direct I/O; ``None`` where the file system has none."""
    import mmap

    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return None
    try:
        with contextlib.closing(mmap.mmap(-1, _BLOCK_NBYTES)) as buffer:  # page-aligned, as direct I/O wants it
            begin = time.perf_counter()
            done = 0
            while done < _DISK_NBYTES:
                done += os.preadv(descriptor, [buffer], done)
            return _DISK_NBYTES / (time.perf_counter() - begin) / 1e9
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _has_locks(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
