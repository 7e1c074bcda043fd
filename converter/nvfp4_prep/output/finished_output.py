"""Finished outputs: whether a directory is one, without reading tensors, and what a stopped run left beside it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from nvfp4_prep.checkpoint.filenames import WORK_FOLDER
from nvfp4_prep.errors import NvfpPrepError
from nvfp4_prep.output.atomic_file import translate_os_error
from nvfp4_prep.output.journal_file import JOURNAL_PATH
from nvfp4_prep.output.target_checks import PARTS_FOLDER, SOURCE_FOLDER, check_names
from nvfp4_prep.output.target_lock import LOCK
from nvfp4_prep.output.target_root import TargetRoot, check_work_folder

__all__ = ["has_files", "remove_finished_work"]


def has_files(path: Path, sizes: Mapping[str, int], begins: Mapping[str, bytes]) -> bool:
    """Return whether a directory holds these files and no others.

    Args:
        path: the directory.
        sizes: of all files, by name.
        begins: bytes that files begin with.
    """
    try:
        check_names(path, sizes)
        with TargetRoot.open(path) as root:
            return all(_has_file(root, name, nbytes, begins.get(name, b"")) for name, nbytes in sizes.items())
    except (OSError, NvfpPrepError):  # something else, or a link; whoever writes there says so
        return False


def _has_file(root: TargetRoot, name: str, nbytes: int, begin: bytes) -> bool:
    with open(root.open_file(name, os.O_RDONLY), "rb") as stream:
        return os.fstat(stream.fileno()).st_size == nbytes and stream.read(len(begin)) == begin


def remove_finished_work(path: Path) -> None:
    """Remove what a run that was stopped in its very last steps left beside a finished output.

    Raises:
        TargetError: if it cannot be removed, or has a journal: then nothing is finished.
    """
    if not os.path.lexists(path / WORK_FOLDER):
        return
    check_work_folder(path / WORK_FOLDER, (LOCK,), (SOURCE_FOLDER, PARTS_FOLDER))
    try:
        with TargetRoot.open(path) as root:
            if root.status(JOURNAL_PATH) is None:
                root.remove_tree(WORK_FOLDER)
                root.sync()
    except OSError as error:
        raise translate_os_error(error, path / WORK_FOLDER) from error
