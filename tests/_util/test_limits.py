"""Limits of control groups, read from a file system as the kernel shows it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nvfp4_prep._util.limits import usable_cores, usable_memory_nbytes
from nvfp4_prep.commands import doctor
from nvfp4_prep.load.options import LoadOptions, rank_threads
from nvfp4_prep.pipeline.workers import default_memory_nbytes, default_threads

V2 = "30 23 0:26 {root} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1 = "30 23 0:26 {root} /sys/fs/cgroup/{name} rw,nosuid shared:9 - cgroup cgroup rw,{name}"
GIB = 2**30


def v1_mounts(root: str) -> list[str]:
    return [V1.format(root=root, name=name) for name in ("cpu,cpuacct", "memory", "pids")]


@pytest.fixture(autouse=True)
def large_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {*range(64)})
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**26}[name])


def machine(root: Path, groups: list[str], mounts: list[str], files: dict[str, str]) -> Path:
    texts = {
        "proc/self/cgroup": "\n".join(groups) + "\n",
        "proc/self/mountinfo": "\n".join(["22 1 8:1 / / rw - ext4 /dev/sda rw", *mounts]) + "\n",
        **{f"sys/fs/cgroup/{name}": text for name, text in files.items()},
    }
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


CASES = {
    "v2, in a container's own namespace": (
        ["0::/"],
        [V2.format(root="/")],
        {"cpu.max": "400000 100000\n", "memory.max": f"{8 * GIB}\n"},
        (4, 8 * GIB),
    ),
    "v2, a container that sees the host's path": (
        ["0::/kubepods/pod1/abc"],
        [V2.format(root="/kubepods/pod1/abc")],
        {"cpu.max": "400000 100000\n", "memory.max": f"{8 * GIB}\n"},
        (4, 8 * GIB),
    ),
    "v2, limits of a slice above": (
        ["0::/user.slice/session.scope"],
        [V2.format(root="/")],
        {
            "user.slice/session.scope/cpu.max": "max 100000\n",
            "user.slice/session.scope/memory.max": "max\n",
            "user.slice/cpu.max": "200000 100000\n",
            "user.slice/memory.max": f"{3 * GIB}\n",
        },
        (2, 3 * GIB),
    ),
    "v2, a sibling's limits": (
        ["0::/mine"],
        [V2.format(root="/")],
        {"mine/cpu.max": "max 100000\n", "other/cpu.max": "100000 100000\n", "other/memory.max": "4096\n"},
        (64, 256 * GIB),
    ),
    "v2, one core and a half": (["0::/"], [V2.format(root="/")], {"cpu.max": "150000 100000\n"}, (2, 256 * GIB)),
    "v2, more than there is": (
        ["0::/"],
        [V2.format(root="/")],
        {"cpu.max": "12800000 100000\n", "memory.max": f"{512 * GIB}\n"},
        (64, 256 * GIB),
    ),
    "v1, in Docker": (
        ["12:memory:/docker/abc", "4:cpu,cpuacct:/docker/abc", "1:name=systemd:/docker/abc"],
        v1_mounts("/docker/abc"),
        {
            "cpu,cpuacct/cpu.cfs_quota_us": "300000\n",
            "cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            "memory/memory.limit_in_bytes": f"{2 * GIB}\n",
        },
        (3, 2 * GIB),
    ),
    "v1, without limits": (
        ["12:memory:/", "4:cpu,cpuacct:/"],
        v1_mounts("/"),
        {
            "cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
            "cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            "memory/memory.limit_in_bytes": "9223372036854771712\n",
        },
        (64, 256 * GIB),
    ),
    "v1, beside an empty v2": (
        ["12:memory:/", "4:cpu,cpuacct:/job", "0::/"],
        [*v1_mounts("/"), "31 23 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"],
        {"cpu,cpuacct/job/cpu.cfs_quota_us": "50000\n", "cpu,cpuacct/job/cpu.cfs_period_us": "100000\n"},
        (1, 256 * GIB),
    ),
    "numbers that make no sense": (
        ["0::/"],
        [V2.format(root="/")],
        {"cpu.max": f"{'9' * 5000} 100000\n", "memory.max": "²\n"},
        (64, 256 * GIB),
    ),
    "a group without a path": (["0::"], [V2.format(root="/")], {"cpu.max": "100000 100000\n"}, (64, 256 * GIB)),
    "a mount with a NUL": (["0::/"], ["30 23 0:26 / /sys/fs/\0 rw - cgroup2 cgroup2 rw"], {}, (64, 256 * GIB)),
    "files that make no sense": (
        ["0::/", "", "nonsense", "3:cpu"],
        [V2.format(root="/"), "", "1 2 3 - cgroup2", "- cgroup2 a b"],
        {"cpu.max": "many 0\n", "memory.max": "\n"},
        (64, 256 * GIB),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_limits_of_control_groups(case: str, tmp_path: Path) -> None:
    groups, mounts, files, expected = CASES[case]
    root = machine(tmp_path, groups, mounts, files)
    assert (usable_cores(root), usable_memory_nbytes(root)) == expected


def test_a_system_without_control_groups(tmp_path: Path) -> None:
    assert (usable_cores(tmp_path), usable_memory_nbytes(tmp_path)) == (64, 256 * GIB)


def limited(root: Path, monkeypatch: pytest.MonkeyPatch, cores: str, memory: str) -> None:
    files = {"cpu.max": f"{cores} 100000\n", "memory.max": f"{memory}\n"}
    machine(root, ["0::/"], [V2.format(root="/")], files)
    for function in (usable_cores, usable_memory_nbytes):
        monkeypatch.setattr(function, "__defaults__", (root,))


def test_defaults_follow_the_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limited(tmp_path, monkeypatch, "400000", str(GIB))
    assert default_threads() == 5
    assert default_memory_nbytes() == GIB // 2
    assert LoadOptions().thread_count == 3 and rank_threads(2) == 2
    assert doctor.diagnose().machine.startswith(
        "4 of 64 processors, 1.07 GB of 274.88 GB memory (this process's limits),"
    )


def test_many_cores_in_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers without a quota beside them must not get the container killed."""
    limited(tmp_path, monkeypatch, "max", str(4 * GIB))
    assert default_threads() == 64
    assert default_memory_nbytes() == default_memory_nbytes(256) == 2 * GIB
    assert default_memory_nbytes(8) == GIB


def test_a_machine_without_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limited(tmp_path, monkeypatch, "max", "max")
    assert default_memory_nbytes() == 8 * GIB and default_memory_nbytes(1) == 640 * 2**20
    assert doctor.diagnose().machine.startswith("64 processors, 274.88 GB memory, ")
