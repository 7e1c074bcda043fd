"""The files of one load, each opened once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nvfp4_prep.checkpoint.safetensors_header import TensorRecord
from nvfp4_prep.errors import LoadError
from nvfp4_prep.load.options import DirectIO
from nvfp4_prep.load.reader import FileReader
from nvfp4_prep.load.storage import is_network_storage

__all__ = ["OpenFiles"]


class OpenFiles:
    """Readers by path, from the first use until :meth:`close`."""

    def __init__(self, direct_io: DirectIO) -> None:
        self._direct_io = direct_io
        self._readers: dict[Path, FileReader] = {}

    def reader(self, path: Path, record: TensorRecord, experts: Sequence[int]) -> FileReader:
        """Return the reader of a file.

        Args:
            path: the file.
            record: a tensor in it.
            experts: the ones that will be read; whether the first file's are in the page cache decides how it is read.

        Raises:
            LoadError: if it cannot be opened, or is shorter than the tensor's place says.
        """
        reader = self._readers.get(path)
        if reader is None:
            mode = self._direct_io
            reader = FileReader.open(path, direct=mode is not DirectIO.NEVER)
            stored = record.nbytes // record.shape[0]
            first, last = min(experts), max(experts)
            cached = reader.cached(record.offset_bytes + first * stored, (last + 1 - first) * stored)
            if mode is DirectIO.AUTO and cached:
                reader.direct = False
            reader.share_rows = mode is DirectIO.AUTO
            reader.resident = cached and not reader.direct and not is_network_storage(reader.device)
            self._readers[path] = reader
        if reader.nbytes < record.offset_bytes + record.nbytes:
            raise LoadError(
                "file is shorter than its header says",
                where=f"{path}, tensor {record.name!r}",
                expected=f"at least {record.offset_bytes + record.nbytes} bytes",
                actual=f"{reader.nbytes} bytes",
                next_step="The file is truncated: copy or download it again.",
            )
        return reader

    def close(self) -> None:
        """Close all of them. No thread may read any more."""
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()
