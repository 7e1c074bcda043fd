"""Checks of the load API's arguments: what is not usable is a typed error before anything is read."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch

from nvfp4_prep._util.text import first_of
from nvfp4_prep.checkpoint.safetensors_header import TensorRecord
from nvfp4_prep.errors import LoadError, UsageError
from nvfp4_prep_kernels import ExpertSlice

__all__ = ["as_device", "as_experts", "as_rank", "check_experts", "check_parameter"]


def as_device(device: object) -> torch.device:
    """Return a device that parameters can be loaded to.

    Raises:
        UsageError: if it does not name a device.
        LoadError: if this machine or this torch does not have it, or it is neither a CPU nor a CUDA device.
    """
    try:
        if isinstance(device, bool) or not isinstance(device, str | torch.device):
            raise TypeError(_kind(device))
        made = torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise UsageError(
            "is not a device", where="argument device", expected="'cpu', 'cuda' or 'cuda:N'", actual=repr(device)[:80]
        ) from error
    if made.type not in ("cpu", "cuda"):
        raise LoadError("cannot load to this device", expected="cpu or cuda", actual=made)
    if made.type == "cpu":
        return made
    if not torch.cuda.is_available():
        raise LoadError(
            "CUDA is not available",
            where=str(made),
            next_step="Load to 'cpu', or look at nvfp4-prep doctor for what is missing.",
        )
    found = torch.cuda.device_count()
    if made.index is not None and made.index >= found:
        raise LoadError("no such GPU", expected=f"cuda:0 to cuda:{found - 1}", actual=made)
    return torch.device("cuda", torch.cuda.current_device()) if made.index is None else made


def as_experts(experts: object) -> tuple[int, ...]:
    """Return numbers of experts; raises :class:`UsageError` for anything but a sequence of whole numbers."""
    try:
        if isinstance(experts, str | bytes):
            raise TypeError
        return tuple(_index(expert) for expert in experts)  # type: ignore[attr-defined]
    except TypeError as error:
        raise UsageError(
            "experts are not whole numbers", expected="a sequence of whole numbers", actual=repr(experts)[:80]
        ) from error


def as_rank(pair: object, name: str) -> tuple[int, int]:
    """Return a rank and its number of ranks; raises :class:`UsageError` if there is no such rank."""
    try:
        if not isinstance(pair, Sequence) or isinstance(pair, str | bytes) or len(pair) != 2:
            raise TypeError
        rank, size = _index(pair[0]), _index(pair[1])
    except TypeError as error:
        raise UsageError(
            f"{name} is not a rank and a number of ranks", expected="(rank, size)", actual=repr(pair)[:80]
        ) from error
    if not 0 <= rank < size:
        raise UsageError(f"no rank {rank} of {size}", expected=f"0 <= {name} rank < {name} size")
    return rank, size


def check_parameter(
    record: TensorRecord, part: ExpertSlice, experts: Sequence[int], parameter: torch.Tensor, device: torch.device
) -> None:
    """Raise :class:`LoadError` unless a parameter takes a rank's share of these stored experts."""
    where = f"{record.file}, tensor {record.name!r}"
    if not isinstance(parameter, torch.Tensor):
        raise LoadError("the parameter is not a tensor", where=where, actual=type(parameter).__name__)
    expected = (len(experts), *part.shape)
    if tuple(parameter.shape) != expected or parameter.element_size() != 1 or not parameter.is_contiguous():
        raise LoadError(
            "the parameter does not fit the rank's share",
            where=where,
            expected=f"contiguous {list(expected)} of one-byte elements",
            actual=f"{list(parameter.shape)} {parameter.dtype}, strides {list(parameter.stride())}",
        )
    if parameter.device != device:
        raise LoadError("the parameter is on another device", where=where, expected=device, actual=parameter.device)
    check_experts(record, experts)


def check_experts(record: TensorRecord, experts: Sequence[int]) -> None:
    """Raise :class:`LoadError` unless all experts are stored, and there is one at least."""
    where = f"{record.file}, tensor {record.name!r}"
    stored = record.shape[0]
    wrong = [expert for expert in experts if not 0 <= expert < stored]
    if wrong or not experts:
        raise LoadError(
            "no such experts" if wrong else "no experts to load",
            where=where,
            expected=f"0 to {stored - 1}",
            actual=first_of(wrong, 8) or "none",
        )


def _index(value: object) -> int:
    """Return a whole number, numpy's and torch's too, but not a truth value; raises ``TypeError``."""
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)  # type: ignore[arg-type]


def _kind(value: object) -> str:
    return f"{type(value).__name__} {value!r}"[:80]
