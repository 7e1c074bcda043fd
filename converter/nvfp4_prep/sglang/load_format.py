"""SGLang's load format ``nvfp4_prep``: prepared experts by the rank-exact loader, and all other tensors by its threads.

In the place of the files of prepared experts the model gets tensors without data (:mod:`nvfp4_prep.load.lazy_tensor`)
under the same names, whose parameters' loaders queue the read of exactly the rank's bytes. The reads run while SGLang
loads the rest, whose tensors come from the same threads where SGLang's default would read whole files into host memory;
they are done before it derives anything from them, and so is the exchange of columns between the
tensor-parallel ranks of a host (:mod:`nvfp4_prep.serving.cooperation`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.model_loader import loader as sglang_loader
from sglang.srt.model_loader.loader import DefaultModelLoader

from nvfp4_prep._util.progress import RateLog
from nvfp4_prep.errors import ServingError
from nvfp4_prep.load import ExpertLoader, LoadOptions, TakesParameters, WholeTensors
from nvfp4_prep.load.options import rank_threads
from nvfp4_prep.prepared.stamp import QUANT_METHOD
from nvfp4_prep.serving.cooperation import Alone, Cooperation, ServerRanks, server_ranks
from nvfp4_prep.serving.expert_files import ExpertFiles
from nvfp4_prep.sglang.arrivals import seen_by, tagged

__all__ = ["LOAD_FORMAT", "PreparedModelLoader"]

logger = logging.getLogger(__name__)

LOAD_FORMAT = QUANT_METHOD
_OPTIONS = {field.name for field in dataclasses.fields(LoadOptions)}
_OTHERS = "others"
_DEFAULT_ITERATOR = "buffered_multi_thread_safetensors_weights_iterator"
_ALLOWED = ("auto", "safetensors", "fastsafetensors", "instanttensor")

Weights = Iterator[tuple[str, torch.Tensor]]


class PreparedModelLoader(DefaultModelLoader):  # type: ignore[misc]
    """Loads a prepared checkpoint.

    ``--model-loader-extra-config`` takes the fields of :class:`nvfp4_prep.load.LoadOptions`, ``cooperative``,
    ``exchange_nbytes`` and ``wait_s`` (:class:`nvfp4_prep.serving.cooperation.Cooperation`), ``others``: the load
    format of everything that is not an expert (with ``auto``, or left out, this loader streams them), and that
    format's own options. Weight updates of a running server read whole tensors.

    Attributes:
        report: of the last load.
    """

    def __init__(self, load_config: LoadConfig) -> None:
        """Raise :class:`ServingError` if ``others`` is not one of SGLang's formats for files of safetensors."""
        extra = dict(load_config.model_loader_extra_config or {})
        others = extra.pop(_OTHERS, "auto")
        if others not in _ALLOWED:
            raise ServingError(
                f"{_OTHERS} cannot be {others!r}",
                expected=" or ".join(_ALLOWED),
                next_step="Leave it out for SGLang's default.",
            )
        self._cooperation = Cooperation.take(extra)
        self._options = {name: extra.pop(name) for name in _OPTIONS & extra.keys()}
        super().__init__(dataclasses.replace(load_config, load_format=others, model_loader_extra_config=extra))
        self._files: ExpertFiles | None = None
        self._loader: TakesParameters | None = None
        self._others: WholeTensors | None = None
        self.report: str | None = None

    def load_model(self, *, model_config: Any, device_config: Any) -> torch.nn.Module:
        """Load everything.

        Raises:
            LoadError, SourceError, VerificationError: if prepared experts cannot be read or are damaged. Where ranks
                load together every failure of one of them is a LoadError on all, with its rank.
            ServingError: if the checkpoint is not prepared or not in a local directory.
        """
        device = torch.device(device_config.device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        options = LoadOptions(**{"threads": _threads(), **self._options})
        make = partial(ExpertLoader, device, options, progress=RateLog(logger.info))
        with self._cooperation.loading(_tensor_parallel_ranks, device, make, logger.info) as loader:
            self._loader, self._files, self._others = loader, ExpertFiles(loader), WholeTensors(loader)
            try:
                with self._streamed(self._others):
                    model: torch.nn.Module = super().load_model(model_config=model_config, device_config=device_config)
            finally:
                self._loader = self._files = self._others = None
        return model

    @contextlib.contextmanager
    def _streamed(self, others: WholeTensors) -> Iterator[None]:
        """While it is entered, what SGLang's default would read file by file into host memory comes from ``others``.

        In SGLang's order of files and names. Where another way of reading was asked for, that is taken.
        """
        config = self.load_config
        default = getattr(sglang_loader, _DEFAULT_ITERATOR, None)
        if default is None or config.load_format != "auto" or config.model_loader_extra_config:
            yield
            return

        def iterate(files: list[str], *args: Any, **kw: Any) -> Weights:
            if any(kw.get(option) for option in ("disable_mmap", "prefetch", "drop_cache_after_load")):
                return default(files, *args, **kw)  # type: ignore[no-any-return]
            return others.stream(list(map(Path, files)), by_name=True)

        with patch.object(sglang_loader, _DEFAULT_ITERATOR, iterate):
            yield

    def _prepare_weights(self, *args: Any, **kwargs: Any) -> tuple[str, list[str], bool]:
        folder, files, use_safetensors = super()._prepare_weights(*args, **kwargs)
        return folder, files if self._files is None else self._files.set_apart(files), use_safetensors

    def _get_all_weights(self, model_config: Any, model: torch.nn.Module) -> Weights:
        others = super()._get_all_weights(model_config, model)
        first = next(others, None)  # now SGLang has listed its files
        if self._files is not None:
            for name, handle in self._handles(self._files):
                yield tagged(name, handle, seen_by(self))
        if first is not None:
            yield first
            yield from others

    def _handles(self, files: ExpertFiles) -> Weights:
        index = self.load_config.draft_model_idx
        if index is None:
            return files.handles()
        chosen: Weights = self._filter_mtp_weights(files.handles(), "", index)
        return chosen

    def load_weights_and_postprocess(self, model: torch.nn.Module, weights: Weights, target_device: Any) -> None:
        """Wait for the queued reads between loading and what SGLang derives."""
        self.load_weights_only(model, weights, target_device)
        if self._loader is not None:
            report = self._loader.finish()
            streamed = 0 if self._others is None else self._others.nbytes
            if report.nbytes == streamed:
                raise ServingError(
                    f"--load-format {LOAD_FORMAT} found no prepared experts for this model",
                    next_step="Leave --load-format out for a checkpoint that nvfp4-prep did not convert.",
                )
            self.report = str(report)
            logger.info("Weights, %.2f GB of them not of prepared experts: %s", streamed / 1e9, report)
        self.postprocess_weights(model, target_device)


def _threads() -> int:
    """Return the threads for this process's part of the cores: ranks of one host load at one time."""
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    ranks = int(parallel.tp_size) * int(parallel.pp_size)
    devices = torch.accelerator.device_count() if torch.accelerator.is_available() else 1
    return rank_threads(min(ranks, devices))


def _tensor_parallel_ranks() -> ServerRanks | Alone:
    """Return the ranks between which SGLang divides the columns of experts, of this pipeline stage alone."""
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    if getattr(parallel, "moe_tp_size", 0) == 1:
        return Alone("experts are divided, not their columns (expert parallelism), or one rank has them all")
    return server_ranks(getattr(parallel, "moe_tp_group", None), "SGLang")
