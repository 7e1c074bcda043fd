"""Files of prepared experts, taken out of a server's list: handles instead of data under the same tensor names.

The server's own name mapping leads each handle (``lazy_tensor``) to its parameter, whose loader queues
the read of exactly the rank's bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from nvfp4_prep.checkpoint.filenames import EXPERT_SCALES, EXPERTS_PREFIX, MANIFEST
from nvfp4_prep.checkpoint.safetensors_header import read_header
from nvfp4_prep.errors import ServingError
from nvfp4_prep.load import Catalog, TakesParameters, make_handle
from nvfp4_prep.prepared.stamp import QUANT_METHOD

__all__ = ["ExpertFiles"]


class ExpertFiles:
    """The files of prepared experts that a server listed."""

    def __init__(self, loader: TakesParameters) -> None:
        self._loader = loader
        self._files: list[Path] = []

    def set_apart(self, files: Sequence[str]) -> list[str]:
        """Return the other files and remember those of experts.

        Raises:
            ServingError: if a file of experts is not in a local directory.
        """
        others = []
        for file in files:
            if not Path(file).name.startswith(EXPERTS_PREFIX):
                others.append(file)
            elif "://" in file:
                raise ServingError(
                    f"--load-format {QUANT_METHOD} reads local files",
                    where=file,
                    next_step="Use --load-format runai_streamer, or download the checkpoint.",
                )
            elif Path(file) not in self._files:
                self._files.append(Path(file))
        return others

    def handles(self, is_unused: Callable[[str], bool] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the names of the set-apart files' tensors, each with a handle."""
        crc32 = self._checksums() if self._loader.options.verify else {}
        for path in sorted(self._files):
            for record in read_header(path).tensors:
                if is_unused is None or not is_unused(record.name):
                    yield record.name, make_handle(self._loader, path, record, crc32.get(record.name))

    def _checksums(self) -> dict[str, tuple[int, ...]]:
        checksums: dict[str, tuple[int, ...]] = {}
        for root in {path.parent for path in self._files}:
            if not (root / MANIFEST).exists():
                raise ServingError(
                    f"verify needs {MANIFEST}", where=str(root), next_step="Copy or download the whole checkpoint."
                )
            catalog = Catalog.open(root)
            catalog.check_sha256(EXPERT_SCALES)
            for layer in catalog.manifest.layers:
                for name, values in layer.expert_crc32.items():
                    checksums[layer.prepared_name(name)] = values
        return checksums
