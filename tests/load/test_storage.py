"""Network storage is told from local storage by the table of mounts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nvfp4_prep.load.storage import is_network_storage, storage_of

TABLE = """22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/root rw
31 22 0:45 / /mnt/nfs rw,relatime shared:3 master:1 - nfs4 host:/export rw,vers=4.2
32 22 0:46 / /mnt/lustre rw - lustre mgs@tcp:/fs rw
33 22 0:47 / /dev/shm rw,nosuid - tmpfs tmpfs rw
34 22 0:48 / /mnt/s3 rw - fuse.s3fs s3fs rw
broken line
"""


@pytest.mark.parametrize(
    ("device", "network"),
    [((8, 1), False), ((0, 45), True), ((0, 46), True), ((0, 47), False), ((0, 48), True), ((9, 9), False)],
)
def test_by_mount(tmp_path: Path, device: tuple[int, int], network: bool) -> None:
    (tmp_path / "mountinfo").write_text(TABLE)
    assert is_network_storage(os.makedev(*device), tmp_path / "mountinfo") is network


def test_without_a_table(tmp_path: Path) -> None:
    assert not is_network_storage(os.makedev(8, 1), tmp_path / "missing")


@pytest.mark.parametrize(("kind", "named"), [("xfs", "xfs"), ("nfs4", "nfs4, across a network"), (None, "unknown")])
def test_the_name_of_the_storage(tmp_path: Path, kind: str | None, named: str) -> None:
    number = tmp_path.stat().st_dev
    line = f"22 1 {os.major(number)}:{os.minor(number)} / / rw - {kind} /dev/x rw\n"
    (tmp_path / "mountinfo").write_text(line if kind else "")
    assert storage_of(tmp_path, tmp_path / "mountinfo") == named
