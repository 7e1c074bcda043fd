"""Open files of a source: few descriptors, however many shards there are."""

from __future__ import annotations

import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from nvfp4_prep._util.system import open_files_error

__all__ = ["DescriptorPool"]

_MOST = 256
_FEWEST = 4


@dataclass
class _Open:
    descriptor: int
    users: int = 0
    forgotten: bool = False


class DescriptorPool:
    """Descriptors by name, closed in the order of their last use; may be used by several threads.

    A descriptor in use is never closed, so at most as many are open as the limit and the threads together.
    """

    def __init__(
        self, open_file: Callable[[str], int], limit: int | None = None, where: Callable[[str], str] = str
    ) -> None:
        """Start without an open file.

        Args:
            open_file: returns a descriptor for a name; called again when the name's descriptor was given back.
            limit: most descriptors to keep; by default a quarter of what the process may have, less where it has many.
            where: returns the path of a name, for errors.
        """
        self._open_file = open_file
        self._where = where
        self.limit = _default_limit() if limit is None else limit
        self._open: OrderedDict[str, _Open] = OrderedDict()
        self._lock = threading.Lock()

    @contextmanager
    def use(self, name: str) -> Iterator[int]:
        """Lend a descriptor.

        Raises:
            OpenFilesError: if no descriptor is left, even after all idle ones were closed.
            SourceError: as ``open_file``.
        """
        with self._lock:
            entry = self._open.get(name)
            if entry is None:
                self._close_idle(self.limit - 1)
                entry = self._open[name] = _Open(self._obtain(name))
            self._open.move_to_end(name)
            entry.users += 1
        try:
            yield entry.descriptor
        finally:
            with self._lock:
                entry.users -= 1
                if entry.forgotten and not entry.users:
                    _close(entry.descriptor)

    def _obtain(self, name: str) -> int:
        try:
            return self._open_file(name)
        except OSError as error:
            if open_files_error(error) is None:
                raise
        self._close_idle(0)
        try:
            return self._open_file(name)
        except OSError as error:
            raise open_files_error(error, self._where(name)) or error from error

    def _close_idle(self, keep: int) -> None:
        """Close descriptors that nobody uses, the longest unused first, until ``keep`` are left; with the lock held."""
        for name in [name for name, entry in self._open.items() if not entry.users]:
            if len(self._open) <= keep:
                return
            _close(self._open.pop(name).descriptor)

    def forget(self, name: str) -> None:
        """Close a name's descriptor, after its last use where it is in use."""
        with self._lock:
            self._forget(name)

    def _forget(self, name: str) -> None:
        entry = self._open.pop(name, None)
        if entry is not None:
            entry.forgotten = True
            if not entry.users:
                _close(entry.descriptor)

    def close(self) -> None:
        """Forget all names."""
        with self._lock:
            for name in list(self._open):
                self._forget(name)


def _close(descriptor: int) -> None:
    with suppress(OSError):
        os.close(descriptor)


def _default_limit() -> int:
    """Return a quarter of what the process may have, but no more than a third of what others have left of it."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return _MOST
    return max(_FEWEST, min(_MOST, soft // 4, (soft - _open_now()) // 3))


def _open_now() -> int:
    try:
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - their number
    except OSError:  # no descriptor for the look itself, or no /proc
        return 0
