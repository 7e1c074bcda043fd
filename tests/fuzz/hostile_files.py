"""Random damage to files: bytes, lengths, safetensors headers, and things in their place that are not files."""

from __future__ import annotations

import os
import shutil
import stat
import struct
from pathlib import Path
from random import Random

from fuzz.hostile_json import damaged_json

LARGE_NBYTES = 10**9
"""Of a sparse file: more than a command's memory, and little enough to be copied in the time that a command has."""


def remove(path: Path) -> None:
    """Remove whatever a path names."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def put_link(chance: Random, path: Path, case: Path) -> str:
    """Put a symbolic link in the place of a file or folder."""
    goals = ("/dev/zero", "/dev/stdin", "/dev/full", "/proc/self/mem", "nowhere", path.name, ".", "..")
    inside = (str(case / "elsewhere"), str(case / "elsewhere" / "precious.json"), "../neighbour/config.json")
    goal = chance.choice((*goals, *inside, *inside))
    remove(path)
    path.symlink_to(goal)
    return f"{path.name} is a link to {goal}"


def put_special(chance: Random, path: Path) -> str:
    """Put a FIFO, a socket, a folder, or a sparse file of many bytes in the place of a file."""
    kind = chance.choice(("FIFO", "socket", "folder", "large", "empty"))
    remove(path)
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "socket":
        os.mknod(path, stat.S_IFSOCK | 0o600)
    elif kind == "folder":
        path.mkdir()
    else:
        path.touch()
        os.truncate(path, LARGE_NBYTES if kind == "large" else 0)
    return f"{path.name} is a {kind}"


def damage_bytes(chance: Random, path: Path) -> str:
    """Cut, grow or flip a file."""
    data = bytearray(path.read_bytes())
    kind = chance.choice(("cut", "grow", "flip", "flip at the start", "random"))
    if kind == "cut":
        data = data[: chance.randrange(len(data) + 1)]
    elif kind == "grow":
        data += chance.randbytes(chance.choice((1, 8, 4096)))
    elif kind == "random":
        data = bytearray(chance.randbytes(chance.choice((1, 7, 8, 9, 100))))
    elif data:
        for _ in range(3):
            data[chance.randrange(min(len(data), 64) if "start" in kind else len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)
    return f"{path.name}: {kind}"


def damage_header(chance: Random, path: Path, case: Path) -> str:
    """Damage the header of a safetensors file: its JSON, or its length."""
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header, body = data[8 : 8 + length], data[8 + length :]
    if chance.random() < 0.2:
        new = chance.choice(
            (0, 1, length - 1, length + 1, len(data), len(data) - 8, 2**31, 2**63, 2**64 - 1, 100_000_001)
        )
        path.write_bytes(struct.pack("<Q", new % 2**64) + header + body)
        return f"{path.name}: header length {new}"
    header = damaged_json(chance, header, str(case))
    header += b" " * (-len(header) % 8)
    path.write_bytes(struct.pack("<Q", len(header)) + header + body)
    return f"{path.name}: header"


def damage(chance: Random, path: Path, case: Path) -> str:
    """Damage one file in one way that fits its kind, and say how."""
    if not path.is_file() or path.is_symlink():
        return f"{path.name}: as it was"
    kind = chance.random()
    if kind < 0.06:
        return put_link(chance, path, case)
    if kind < 0.12:
        return put_special(chance, path)
    if kind < 0.22:
        return damage_bytes(chance, path)
    if kind < 0.25:
        remove(path)
        return f"{path.name}: removed"
    try:
        if path.suffix == ".safetensors":
            return damage_header(chance, path, case)
        if path.suffix == ".json":
            path.write_bytes(damaged_json(chance, path.read_bytes(), str(case)))
            return f"{path.name}: JSON"
    except (ValueError, RecursionError, struct.error):  # damaged before, and no document any more
        pass
    return damage_bytes(chance, path) if path.stat().st_size < LARGE_NBYTES else f"{path.name}: as it was"


ADDED = (
    "chat_template.jinja", "modeling_x.py", "tokenizer.model", "pytorch_model.bin", "\x1b[2J.json", "a\nb.safetensors",
    "é.json", "model-00009-of-00009.safetensors", "consolidated.safetensors", "mtp/config.json", ".hidden", "x" * 250,
)  # fmt: skip


def add_file(chance: Random, folder: Path, case: Path) -> str:
    """Add a file, or something that is none, that does not belong there."""
    name = os.fsdecode(b"\xff\xfe.json") if chance.random() < 0.1 else chance.choice(ADDED)
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(chance.choice((b"", b"{}", b"\x08\0\0\0\0\0\0\0{}      ", chance.randbytes(100))))
    kind = chance.random()
    what = put_link(chance, path, case) if kind < 0.2 else put_special(chance, path) if kind < 0.4 else "a file"
    return f"added {name!a}: {what!a}"
