"""Outlines of files that a run will write: enough to know one of them again that the journal has lost."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from nvfp4_prep.checkpoint.small_files import MAX_SMALL_NBYTES
from nvfp4_prep.errors import TargetError
from nvfp4_prep.output.atomic_file import translate_read_error
from nvfp4_prep.output.target_root import TargetRoot

__all__ = ["Outline", "find_known", "have_same_bytes", "is_cut_off"]

_CHUNK_NBYTES = 1 << 24


@dataclass(frozen=True)
class Outline:
    """What is known of a file before it is made.

    Attributes:
        nbytes: its size; ``None`` where only its making tells.
        begin: bytes that it begins with.
        whole: makes all its bytes, where the plan alone decides them.
        accepts: whether these bytes of a small file may be its.
    """

    nbytes: int | None = None
    begin: bytes = b""
    whole: Callable[[], bytes] | None = None
    accepts: Callable[[bytes], bool] = lambda raw: True

    def fits(self, root: TargetRoot, name: str) -> bool:
        """Return whether an entry of a directory is a regular file that fits; only look."""
        try:
            descriptor = root.open_file(name, os.O_RDONLY)
        except (TargetError, PermissionError):  # a link, another kind of file, or one that nobody here can look into
            return False
        with open(descriptor, "rb") as stream:
            nbytes = os.fstat(descriptor).st_size
            if self.nbytes is not None:
                return nbytes == self.nbytes and stream.read(len(self.begin)) == self.begin
            if nbytes > MAX_SMALL_NBYTES:
                return False
            raw = stream.read()
        return raw == self.whole() if self.whole is not None else self.accepts(raw)


def is_cut_off(root: TargetRoot, name: str, outline: Outline) -> bool:
    """Return whether a regular file is the beginning of one with a header, which no program can use: ours, damaged.

    Raises:
        TargetError: if it cannot be read.
    """
    if outline.nbytes is None or not outline.begin:
        return False
    try:
        with open(root.open_file(name, os.O_RDONLY), "rb") as stream:
            nbytes = os.fstat(stream.fileno()).st_size
            begin = outline.begin[:nbytes]
            return nbytes < outline.nbytes and stream.read(len(begin)) == begin
    except OSError as error:
        raise translate_read_error(error, root.path / name) from error


def find_known(root: TargetRoot, names: Iterable[str], outlines: Mapping[str, Outline]) -> set[str]:
    """Return those of the names under which the directory has a file that fits its outline.

    The journal has lost such a file, or it is somebody else's who has one just like it. So it is replaced only by the
    same bytes, and removed only where its outline is all of them.

    Raises:
        TargetError: if a file cannot be read.
    """
    known = set()
    for name in names:
        try:
            if name in outlines and root.status(name) is not None and outlines[name].fits(root, name):
                known.add(name)
        except OSError as error:
            raise translate_read_error(error, root.path / name) from error
    return known


def have_same_bytes(root: TargetRoot, name: str, other_root: TargetRoot, other: str) -> bool:
    """Return whether two entries are regular files with the same bytes.

    Raises:
        TargetError: if one cannot be opened.
    """
    with contextlib.ExitStack() as opened:
        streams = []
        for folder, entry in ((root, name), (other_root, other)):
            try:
                descriptor = folder.open_file(entry, os.O_RDONLY)
            except TargetError:  # a link, or another kind of file
                return False
            except OSError as error:
                raise translate_read_error(error, folder.path / entry) from error
            streams.append(opened.enter_context(open(descriptor, "rb")))
        one, two = streams
        if os.fstat(one.fileno()).st_size != os.fstat(two.fileno()).st_size:
            return False
        while chunk := one.read(_CHUNK_NBYTES):
            if two.read(len(chunk)) != chunk:
                return False
    return True
