"""Audit hook that notes every attempt to change a file outside the folders that a command may write."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

_CHANGES = {
    "os.chmod": 0, "os.chown": 0, "os.link": 1, "os.mkdir": 0, "os.remove": 0, "os.rename": 1, "os.rmdir": 0,
    "os.symlink": 1, "os.truncate": 0, "os.utime": 0, "shutil.rmtree": 0, "shutil.move": 1, "shutil.copyfile": 1,
}  # fmt: skip
"""Events that change files, and which argument is the path that appears or goes away."""
_FOLDER_ARGUMENTS = {"os.mkdir": 2, "os.remove": 1, "os.rmdir": 1, "os.rename": 3, "os.link": 3, "os.symlink": 2}
"""Which argument of the event is the descriptor of the folder that the path is relative to, or -1."""


def _absolute(path: object, folder: object) -> str:
    """The real path of what a call names: links in its folders followed, the last name not."""
    if isinstance(path, int):
        return str(Path(f"/proc/self/fd/{path}").readlink())
    text = os.fsdecode(path)  # type: ignore[arg-type]
    if isinstance(folder, int) and folder >= 0:
        text = str(Path(f"/proc/self/fd/{folder}").readlink() / text)
    head, name = os.path.split(os.path.abspath(text))  # noqa: PTH100
    return os.path.join(os.path.realpath(head), name)  # noqa: PTH118


def watch_writes(allowed: list[str], report: Path) -> None:
    """Install the hook in this process, for good.

    Args:
        allowed: real paths of the folders below which anything may be changed.
        report: file that gets a line for each change elsewhere.
    """
    inside = (*(f"{folder}/" for folder in allowed), "/dev/", "/proc/self/fd/")
    descriptor = os.open(report, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def note(event: str, path: object, folder: object) -> None:
        found = _absolute(path, folder)
        if not (found + "/").startswith(inside):
            os.write(descriptor, f"{event} {found!a}\n".encode())

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, (str, bytes)) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
                note(event, path, -1)
        elif event in _CHANGES:
            number = _FOLDER_ARGUMENTS.get(event, len(arguments))
            note(event, arguments[_CHANGES[event]], arguments[number] if number < len(arguments) else -1)

    sys.addaudithook(hook)
