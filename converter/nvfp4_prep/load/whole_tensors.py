"""A stream of all tensors of some files, read by a loader's threads onto its device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from nvfp4_prep.checkpoint.safetensors_header import TensorRecord, read_header
from nvfp4_prep.errors import LoadError
from nvfp4_prep.load.group_loader import TakesParameters
from nvfp4_prep.load.worker import Submission

__all__ = ["WINDOW_NBYTES", "WholeTensors"]

WINDOW_NBYTES = 256 * 1024 * 1024
"""Device memory of tensors that are being read or wait to be taken."""
_ROOM = 2
"""A tensor larger than the window goes to the device only where so many times its size is free."""
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True, slots=True)
class _Coming:
    """A tensor that is being read, or is to be read in one go by safetensors when its turn comes."""

    path: Path
    record: TensorRecord
    reading: tuple[torch.Tensor, Submission] | None = None

    @property
    def nbytes(self) -> int:
        return 0 if self.reading is None else self.record.nbytes


class WholeTensors:
    """Whole tensors, in the order of the files, and of their places in them or of their names.

    Device memory: :data:`WINDOW_NBYTES` for what is ahead of the caller, or one larger tensor. A tensor that the caller
    keeps is the caller's: nothing is reused.

    Attributes:
        nbytes: read by the loader so far.
    """

    def __init__(self, loader: TakesParameters) -> None:
        self._loader = loader
        self.nbytes = 0

    def stream(
        self, files: Sequence[Path], is_unwanted: Callable[[str], bool] | None = None, *, by_name: bool = False
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield names and tensors; the loader's ``finish`` is still to be called.

        Args:
            files: of safetensors, in a local directory.
            is_unwanted: whether a tensor of this name is left out.
            by_name: whether a file's tensors come in the order of their names, not of their places.

        Raises:
            SourceError: if a header is damaged.
            LoadError: if a file cannot be read, or the load has failed otherwise.
        """
        ahead = deque[_Coming]()
        waiting = 0
        for path in files:
            records = read_header(path).tensors
            for record in sorted(records, key=lambda record: record.name) if by_name else records:
                if is_unwanted is not None and is_unwanted(record.name):
                    continue
                while ahead and waiting + record.nbytes > WINDOW_NBYTES:
                    waiting -= ahead[0].nbytes
                    yield self._take(ahead.popleft())
                coming = self._begin(path, record)
                waiting += coming.nbytes
                ahead.append(coming)
        while ahead:
            yield self._take(ahead.popleft())

    def _begin(self, path: Path, record: TensorRecord) -> _Coming:
        dtype, device = _DTYPES.get(record.dtype), self._loader.device
        if dtype is None or not record.nbytes or not _fits(record.nbytes, device):
            return _Coming(path, record)
        try:
            data = torch.empty(record.nbytes, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError:  # the model leaves less than the window
            return _Coming(path, record)
        submission = self._loader.submit_whole(path, record, data)
        self.nbytes += record.nbytes
        return _Coming(path, record, (data.view(dtype).view(record.shape), submission))

    def _take(self, coming: _Coming) -> tuple[str, torch.Tensor]:
        name = coming.record.name
        if coming.reading is None:
            return name, _by_safetensors(coming.path, name)
        tensor, submission = coming.reading
        error = self._loader.wait_for(submission)
        if error is not None:
            raise error
        return name, tensor


def _by_safetensors(path: Path, name: str) -> torch.Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise LoadError(
            f"cannot be read ({error})",
            where=f"{path}, tensor {name!r}",
            next_step="The file is damaged or truncated: copy or download it again.",
        ) from error
    return tensor


def _fits(nbytes: int, device: torch.device) -> bool:
    if nbytes <= WINDOW_NBYTES or device.type != "cuda":
        return True
    return _ROOM * nbytes <= torch.cuda.mem_get_info(device)[0]
