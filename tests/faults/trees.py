"""Digests of directory trees."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

WORK_FOLDER = ".nvfp4_prep"

_DIGEST_NBYTES = 32 * 2**20
"""Larger than any file here, but for sparse ones that only look large: their size must do."""

Tree = dict[str, str]


def _content(path: Path) -> str:
    facts = path.lstat()
    if stat.S_ISREG(facts.st_mode):
        data = path.read_bytes() if facts.st_size <= _DIGEST_NBYTES else b""
        return f"{facts.st_size} bytes, sha256 {hashlib.sha256(data).hexdigest()}"
    if stat.S_ISLNK(facts.st_mode):
        return f"link to {str(path.readlink())!r}"
    return f"kind {stat.S_IFMT(facts.st_mode):o}"


def tree_of(folder: Path) -> Tree:
    """Return every entry below a folder: size and sha256 of files, goal of links (not followed), kind of others."""
    return {
        path.relative_to(folder).as_posix(): _content(path)
        for root, folders, files in os.walk(folder)
        for path in (Path(root) / name for name in (*folders, *files))
    }


def without_work(tree: Tree) -> Tree:
    """Return the tree without the work folder of an unfinished run."""
    return {name: content for name, content in tree.items() if name.split("/")[0] != WORK_FOLDER}


def difference(found: Tree, expected: Tree) -> str:
    """Say in one line how two trees differ; empty if they do not."""
    missing = sorted(expected.keys() - found.keys())
    added = sorted(found.keys() - expected.keys())
    changed = sorted(name for name in found.keys() & expected.keys() if found[name] != expected[name])
    parts = (("missing", missing), ("added", added), ("changed", changed))
    return "; ".join(f"{what}: {', '.join(names[:6])}" for what, names in parts if names)
