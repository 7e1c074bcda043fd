"""vLLM's load format ``nvfp4_prep``: prepared experts by the rank-exact loader, and all other tensors by its threads.

The files of prepared experts are taken out of vLLM's list of files. In their place the model gets tensors without data
(:mod:`nvfp4_prep.load.lazy_tensor`) under the same names, so that vLLM's own name mapping leads each to its parameter,
whose loader queues the read of exactly the rank's bytes. The reads run while vLLM loads the rest, whose tensors come
from the same threads where vLLM's default would read them one by one; when it is done, the loader waits for the
experts, and the tensor-parallel ranks of a host exchange their columns (:mod:`nvfp4_prep.serving.cooperation`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.config import ModelConfig, VllmConfig, get_current_vllm_config_or_none
from vllm.config.load import LoadConfig
from vllm.logger import init_logger
from vllm.model_executor.model_loader import get_model_loader, register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from nvfp4_prep._util.progress import RateLog
from nvfp4_prep.errors import ServingError
from nvfp4_prep.load import ExpertLoader, LoadOptions, TakesParameters, WholeTensors
from nvfp4_prep.load.options import rank_threads
from nvfp4_prep.serving.cooperation import Cooperation
from nvfp4_prep.serving.expert_files import ExpertFiles
from nvfp4_prep.vllm.compat import tensor_parallel_ranks

__all__ = ["LOAD_FORMAT", "PreparedModelLoader", "register_load_format"]

logger = init_logger(f"vllm.{__name__}")

LOAD_FORMAT = "nvfp4_prep"
_OPTIONS = {field.name for field in dataclasses.fields(LoadOptions)}
_OTHERS = "others"
_DEFAULT_ITERATOR, _SKIPS = "safetensors_weights_iterator", "should_skip_weight"

Weights = Iterator[tuple[str, torch.Tensor]]


class PreparedModelLoader(BaseModelLoader):  # type: ignore[misc]
    """Loads a prepared checkpoint.

    ``--model-loader-extra-config`` takes the fields of :class:`nvfp4_prep.load.LoadOptions` (``threads``,
    ``chunk_nbytes``, ``buffers``, ``direct_io``, ``gather``, ``verify``), ``cooperative``, ``exchange_nbytes`` and
    ``wait_s`` (:class:`nvfp4_prep.serving.cooperation.Cooperation`), ``others``: the load format of everything that is
    not an expert (with ``auto``, or left out, this loader streams them), and that format's own options.

    Attributes:
        report: of the last load.
    """

    def __init__(self, load_config: LoadConfig) -> None:
        """Raise :class:`ServingError` if ``others`` names this format itself."""
        super().__init__(load_config)
        extra = dict(load_config.model_loader_extra_config or {})
        others = extra.pop(_OTHERS, "auto")
        if others == LOAD_FORMAT:
            raise ServingError(f"{_OTHERS} cannot be {LOAD_FORMAT}", next_step="Leave it out for vLLM's default.")
        self._cooperation = Cooperation.take(extra)
        self._options = {name: extra.pop(name) for name in _OPTIONS & extra.keys()}
        self._others: Any = get_model_loader(
            dataclasses.replace(load_config, load_format=others, model_loader_extra_config=extra)
        )
        self._loader: Future[ExpertLoader] | None = None
        self.report: str | None = None

    def create_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        """Create the model as vLLM does, and pin staging memory meanwhile, which takes 0.9 ms a MiB."""
        make = self._make_loader(torch.get_default_device())
        with ThreadPoolExecutor(1) as pool:
            self._loader = pool.submit(make)
            try:
                model: nn.Module = super().create_model(vllm_config, model_config, prefix)
            except BaseException:
                self._loader.add_done_callback(_close_loader)
                self._loader = None
                raise
        return model

    def download_model(self, model_config: ModelConfig) -> None:
        """Download as the format of the other tensors does."""
        self._others.download_model(model_config)

    def get_all_weights(self, model_config: ModelConfig, model: nn.Module) -> Weights:
        """Return all tensors with their data, as the format of the others reads them: what a reload asks for."""
        weights: Weights = self._others.get_all_weights(model_config, model)
        return weights

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Load everything.

        Raises:
            LoadError, SourceError, VerificationError: if prepared experts cannot be read or are damaged. Where ranks
                load together every failure of one of them is a LoadError on all, with its rank.
            ServingError: if the checkpoint is not prepared or not in a local directory.
        """
        device = _experts_device(model)
        make = partial(self._take_loader, device)
        with self._cooperation.loading(tensor_parallel_ranks, device, make, logger.info) as loader:
            others = WholeTensors(loader)
            with _ExpertsApart(self._others, loader), _streamed(self._others, others):
                self._others.load_weights(model, model_config)
            report = loader.finish()
        if report.nbytes == others.nbytes:
            raise ServingError(
                f"--load-format {LOAD_FORMAT} found no prepared experts for this model",
                where=str(model_config.model),
                next_step="Leave --load-format out for a checkpoint that nvfp4-prep did not convert.",
            )
        self.report = str(report)
        logger.info("Weights, %.2f GB of them not of prepared experts: %s", others.nbytes / 1e9, report)

    def _make_loader(self, device: torch.device) -> Callable[[], ExpertLoader]:
        """Return a function that makes the loader in any thread: what depends on the calling one is settled here."""
        options = LoadOptions(**{"threads": _threads(), **self._options})
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        return lambda: ExpertLoader(device, options, progress=RateLog(logger.info))

    def _take_loader(self, device: torch.device) -> ExpertLoader:
        waiting, self._loader = self._loader, None
        if waiting is not None:
            loader = waiting.result()
            if loader.device == device:
                return loader
            loader.close()
        return self._make_loader(device)()


class _ExpertsApart:
    """While it is entered, vLLM's loader sees no files of prepared experts and yields handles for their tensors."""

    def __init__(self, others: Any, loader: TakesParameters) -> None:
        self._others = others
        self._apart = ExpertFiles(loader)

    def __enter__(self) -> None:
        prepare, weights = self._others._prepare_weights, self._others.get_all_weights

        def prepare_others(*args: Any, **kw: Any) -> Any:
            found = prepare(*args, **kw)
            if isinstance(found, list):
                return self._apart.set_apart(found)
            return tuple(self._apart.set_apart(part) if isinstance(part, list) else part for part in found)

        def handles_and_others(model_config: ModelConfig, model: nn.Module) -> Weights:
            others = weights(model_config, model)
            first = next(others, None)  # now vLLM has listed its files
            yield from self._apart.handles(getattr(model, "is_unused_checkpoint_weight", None))
            if first is not None:
                yield first
                yield from others

        self._others._prepare_weights = prepare_others
        self._others.get_all_weights = handles_and_others

    def __exit__(self, *exception: object) -> None:
        del self._others._prepare_weights, self._others.get_all_weights


@contextlib.contextmanager
def _streamed(loader: Any, others: WholeTensors) -> Iterator[None]:
    """While it is entered, what vLLM's default would read tensor by tensor through a mapping comes from ``others``."""
    module = sys.modules[type(loader).__module__]
    default = getattr(module, _DEFAULT_ITERATOR, None)
    plain = loader.load_config.load_format == "auto" and not loader.load_config.model_loader_extra_config
    if default is None or not plain or loader.load_config.safetensors_load_strategy is not None:
        yield
        return

    def iterate(files: list[str], *args: Any, **kw: Any) -> Weights:
        # Under expert parallelism vLLM does not read other ranks' experts, where they are not prepared ones.
        local = kw.get("local_expert_ids")
        skips: Any = getattr(importlib.import_module("vllm.model_executor.model_loader.weight_utils"), _SKIPS, None)
        if any("://" in file for file in files) or (local is not None and skips is None):
            yield from default(files, *args, **kw)
        else:
            is_unwanted = None if local is None else lambda name: bool(skips(name, local))
            yield from others.stream(sorted(map(Path, files)), is_unwanted)

    setattr(module, _DEFAULT_ITERATOR, iterate)
    try:
        yield
    finally:
        setattr(module, _DEFAULT_ITERATOR, default)


def register_load_format() -> None:
    """Teach this vLLM process the load format. Safe to call more than once."""
    from vllm.model_executor import model_loader

    if model_loader._LOAD_FORMAT_TO_MODEL_LOADER.get(LOAD_FORMAT) is not PreparedModelLoader:
        register_model_loader(LOAD_FORMAT)(PreparedModelLoader)


def _close_loader(made: Future[ExpertLoader]) -> None:
    if made.exception() is None:
        made.result().close()


def _experts_device(model: nn.Module) -> torch.device:
    """Return the device of the experts' parameters; all of one rank are on one device."""
    first = None
    for name, parameter in model.named_parameters():
        first = first or parameter.device
        if name.endswith(".routed_experts.w13_weight"):
            return parameter.device
    return first or torch.device("cpu")


def _threads() -> int:
    """Return the threads for this process's part of the cores: all ranks of one host load at one time."""
    config = get_current_vllm_config_or_none()
    ranks = 1 if config is None else int(config.parallel_config.world_size_across_dp)
    devices = torch.accelerator.device_count() if torch.accelerator.is_available() else 1
    return rank_threads(min(ranks, devices))
