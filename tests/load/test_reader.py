"""Opening of files that are read by many threads."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nvfp4_prep.errors import LoadError
from nvfp4_prep.load import reader


def test_no_descriptor_is_left_where_direct_io_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "experts.safetensors"
    file.write_bytes(b"x" * 4096)
    opened: list[int] = []

    def refuse(self: reader.FileReader) -> None:
        opened.append(self._descriptor)
        raise LoadError("cannot be opened", where=str(self.path))

    monkeypatch.setattr(reader.FileReader, "_open_direct", refuse)
    with pytest.raises(LoadError):
        reader.FileReader.open(file, direct=True)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[0])
