"""Storage whose every read costs milliseconds: a folder passed through with FUSE (slow_storage.c), reads counted.

A library that delays ``read`` and ``pread`` (LD_PRELOAD) would not see page faults of mappings, which is how other
loaders and this project's earlier versions read; a file system of its own does. Needs root, ``/dev/fuse`` and ``cc``.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import struct
import subprocess
import time
from pathlib import Path
from types import TracebackType

SOURCE = Path(__file__).with_suffix(".c")
_DETACH = 2


def refusal() -> str:
    """Why there can be no such storage here, or nothing."""
    if os.geteuid() != 0 or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "mounting with FUSE needs root and /dev/fuse"
    return "" if shutil.which("cc") else "no C compiler (cc)"


class SlowStorage:
    """A folder mounted once more, slowly. Use it as a context.

    Attributes:
        root: where it is mounted.
    """

    def __init__(self, folder: Path, work: Path) -> None:
        """``work``: an empty folder for the program and the mount."""
        self._folder, self._work = folder, work
        self.root = work / "mount"
        self._control: mmap.mmap | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> SlowStorage:
        program, control = self._work / "slow_storage", self._work / "control"
        subprocess.run(["cc", "-O2", "-Wall", "-pthread", "-o", program, SOURCE], check=True)
        control.write_bytes(bytes(24))
        self.root.mkdir()
        with control.open("r+b") as stream:
            self._control = mmap.mmap(stream.fileno(), 24)
        self._process = subprocess.Popen([program, self._folder, self.root, control])
        deadline = time.monotonic() + 10
        while not os.path.ismount(self.root):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{program} did not mount {self.root}")
            time.sleep(0.02)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ctypes.CDLL(None).umount2(os.fsencode(self.root), _DETACH)
        if self._process is not None:
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def set_delay(self, ms: float) -> None:
        """What every read costs from now on; what was read so far is forgotten."""
        if self._control is not None:
            self._control[:] = struct.pack("=QQQ", round(ms * 1000), 0, 0)

    @property
    def counts(self) -> tuple[int, int]:
        """Reads and bytes since the last :meth:`set_delay`."""
        if self._control is None:
            return 0, 0
        _, reads, nbytes = struct.unpack("=QQQ", self._control[:])
        return reads, nbytes
