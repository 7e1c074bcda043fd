"""Whether a directory is what a command would write, file by file, without reading tensors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from nvfp4_prep.errors import NvfpPrepError
from nvfp4_prep.output.target import check_names
from nvfp4_prep.output.target_root import TargetRoot

__all__ = ["has_files"]


def has_files(path: Path, sizes: Mapping[str, int], begins: Mapping[str, bytes]) -> bool:
    """Return whether a directory holds these files and no others.

    Args:
        path: the directory.
        sizes: of all files, by name.
        begins: bytes that files begin with.
    """
    try:
        check_names(path, sizes)
        with TargetRoot(path) as root:
            return all(_has_file(root, name, nbytes, begins.get(name, b"")) for name, nbytes in sizes.items())
    except (OSError, NvfpPrepError):  # something else, or a link; whoever writes there says so
        return False


def _has_file(root: TargetRoot, name: str, nbytes: int, begin: bytes) -> bool:
    with open(root.open_file(name, os.O_RDONLY), "rb") as stream:
        return os.fstat(stream.fileno()).st_size == nbytes and stream.read(len(begin)) == begin
