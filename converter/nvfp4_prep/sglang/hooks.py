"""Hooks into SGLang, in one table.

SGLang logs a hook that cannot be applied and goes on. A checkpoint served with half of the hooks would give garbage, so
the first of them, which puts the source's config in the stamp's place, refuses unless all others are in place. Without
it stock SGLang refuses the stamp's method name as unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from nvfp4_prep.errors import ServingError
from nvfp4_prep.prepared.stamp import QUANT_METHOD
from nvfp4_prep.sglang.arrivals import check_model, seen_by, tagged
from nvfp4_prep.sglang.source_config import adopt_source, stamped_configs

__all__ = ["HOOKS", "register_hooks"]

_CONFIG = "sglang.srt.utils.hf_transformers.config.get_config"
_refusal: str | None = None


def adopt(config: Any, *_args: Any, **_kwargs: Any) -> None:
    """Put the source's quantization config in the stamp's place, in every config that SGLang reads from disk."""
    for stamped in stamped_configs(config):
        if _refusal is not None:
            raise ServingError(_refusal)
        _check_applied()
        adopt_source(stamped)


def from_config(original: Callable[..., Any], cls: type, config: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Build the source's config object and hang the stamp on it."""
    from nvfp4_prep.sglang.methods import config_with_stamp

    return config_with_stamp(original, cls, config, *args, **kwargs)


def get_quant_method(original: Callable[..., Any], config: Any, layer: Any, *args: Any, **kwargs: Any) -> Any:
    """Put the prepared method in the place of SGLang's for NVFP4 experts of a stamped checkpoint."""
    from nvfp4_prep.sglang.methods import prepared_method

    return prepared_method(original(config, layer, *args, **kwargs), config, layer, *args, **kwargs)


def get_quant_config(made: Any, model_config: Any, *_args: Any, **_kwargs: Any) -> None:
    """Refuse a config object that does not know of the stamp: another --quantization was asked for."""
    from nvfp4_prep.sglang.methods import check_stamp_was_taken

    check_stamp_was_taken(made, model_config)


def rename(
    original: Callable[..., Any], loader: Any, source: Any, *args: Any, **kwargs: Any
) -> Iterator[tuple[str, torch.Tensor]]:
    """Spell the names of prepared tensors as SGLang's parameters: without ``routed_experts``.

    A running server's weights come this way from other directories, too, of whose configs SGLang reads nothing. What
    must not be served is refused here and not in the iterator: before SGLang touches a parameter.
    """
    from nvfp4_prep.sglang.sources import check_same_layout, check_same_tensors
    from nvfp4_prep.sglang.updates import begin_reading

    check_same_layout(source)
    weights = original(loader, source, *args, **kwargs)
    check_same_tensors(loader, source, kwargs.get("resolved_source"))
    begin_reading(source)
    return (tagged(name, tensor, seen_by(loader)) for name, tensor in weights)


def model_loader(made: Any, load_config: Any, model_config: Any = None) -> None:
    """Refuse load formats that do not read a checkpoint's tensors."""
    from nvfp4_prep.sglang.methods import check_loader

    check_loader(made, model_config)


def listed(found: Any, loader: Any, *_args: Any, **_kwargs: Any) -> None:
    """Keep the directory and the files that SGLang chose."""
    from nvfp4_prep.sglang.sources import remember_listing

    folder, files, _ = found
    remember_listing(loader, folder, files)


def update_weights(original: Callable[..., Any], updater: Any, model_path: str, *args: Any, **kwargs: Any) -> Any:
    """Have a running server hold the new weights, or the former ones."""
    from nvfp4_prep.sglang.updates import update_or_restore

    return update_or_restore(original, updater, model_path, *args, **kwargs)


def tensors(original: Callable[..., Any], updater: Any, named_tensors: Any, load_format: str | None = None) -> Any:
    """Refuse tensors of a trainer that a running prepared model cannot be served from."""
    from nvfp4_prep.sglang.tensor_updates import load_tensors

    return load_tensors(original, updater, named_tensors, load_format)


def receive(original: Callable[..., Any], updater: Any, *args: Any, **kwargs: Any) -> Any:
    """Have all ranks know of one that could not receive a broadcast."""
    from nvfp4_prep.sglang.tensor_updates import receive_broadcast

    return receive_broadcast(original, updater, *args, **kwargs)


def broadcast(original: Callable[..., Any], updater: Any, named_tensors: Any) -> Any:
    """Refuse the same of tensors that were broadcast."""
    from nvfp4_prep.sglang.tensor_updates import load_broadcast

    return load_broadcast(original, updater, named_tensors)


def ipc(original: Callable[..., Any], updater: Any, recv_req: Any) -> Any:
    """Refuse tensors of checkpoint-engine for a prepared model."""
    from nvfp4_prep.sglang.tensor_updates import refuse_ipc

    return refuse_ipc(original, updater, recv_req)


def end_update(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Leave prepared layers alone of which nothing came; what did was made ready at once."""
    from nvfp4_prep.serving.completeness import Completeness
    from nvfp4_prep.sglang.layer_weights import demanding

    with demanding(Completeness.ALL_OR_NONE):
        return original(*args, **kwargs)


def choose_backend(_result: Any, server_args: Any) -> None:
    """Choose the MoE runner backend of the file's layout unless one was asked for."""
    from nvfp4_prep.sglang.backends import choose_backend as choose

    choose(server_args)


def verify_load_format(original: Callable[..., Any], load_config: Any) -> Any:
    """Turn ``--load-format nvfp4_prep`` into the loader class."""
    if load_config.load_format == QUANT_METHOD:
        from nvfp4_prep.sglang.load_format import PreparedModelLoader

        load_config.load_format = PreparedModelLoader
        return None
    return original(load_config)


def dummy_load(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Let layers know that no tensors will arrive."""
    from nvfp4_prep.serving.completeness import Completeness
    from nvfp4_prep.sglang.layer_weights import demanding
    from nvfp4_prep.sglang.sources import note_model, remember_directory

    with demanding(Completeness.NOTHING):
        model = original(*args, **kwargs)
    note_model(kwargs["model_config"])
    remember_directory(kwargs["model_config"])
    return model


def load_model(original: Callable[..., Any], loader: Any, *args: Any, **kwargs: Any) -> Any:
    """Load a model and refuse a stamped one that did not take all of its prepared layers."""
    from nvfp4_prep.sglang.sources import folder_of, note_model

    config = kwargs["model_config"]
    note_model(config)
    return check_model(original(loader, *args, **kwargs), config, loader, folder_of(loader, config))


def all_weights(original: Callable[..., Any], loader: Any, model_config: Any, model: Any, **kwargs: Any) -> Any:
    """Have layers that SGLang does not hold in NVFP4 refuse prepared tensors, before any is read."""
    from nvfp4_prep.sglang.methods import guard_stock_layers

    guard_stock_layers(model, model_config)
    return original(loader, model_config, model, **kwargs)


_QUANTIZATION = "sglang.srt.layers.quantization"
_LOADER = "sglang.srt.model_loader.loader"
_UPDATER = "sglang.srt.model_executor.model_runner_components.weight_updater"
_CONFIGS = (
    f"{_QUANTIZATION}.modelopt_quant.ModelOptFp4Config",
    f"{_QUANTIZATION}.modelopt_quant.ModelOptMixedPrecisionConfig",
    f"{_QUANTIZATION}.compressed_tensors.compressed_tensors.CompressedTensorsConfig",
)
HOOKS: tuple[tuple[str, Callable[..., Any], str], ...] = (
    (_CONFIG, adopt, "AFTER"),
    *((f"{config}.from_config", from_config, "AROUND") for config in _CONFIGS),
    *((f"{config}.get_quant_method", get_quant_method, "AROUND") for config in _CONFIGS),
    ("sglang.srt.model_loader.weight_utils.get_quant_config", get_quant_config, "AFTER"),
    (f"{_LOADER}.get_model_loader", model_loader, "AFTER"),
    (f"{_LOADER}.DefaultModelLoader._prepare_weights", listed, "AFTER"),
    (f"{_LOADER}.DefaultModelLoader._get_weights_iterator", rename, "AROUND"),
    (f"{_LOADER}.RunaiModelStreamerLoader._get_weights_iterator", rename, "AROUND"),
    (f"{_LOADER}.DefaultModelLoader._get_all_weights", all_weights, "AROUND"),
    (f"{_LOADER}.RunaiModelStreamerLoader._get_all_weights", all_weights, "AROUND"),
    (f"{_LOADER}.DefaultModelLoader.load_model", load_model, "AROUND"),
    (f"{_LOADER}.RunaiModelStreamerLoader.load_model", load_model, "AROUND"),
    (f"{_LOADER}.DummyModelLoader.load_model", dummy_load, "AROUND"),
    (f"{_UPDATER}.WeightUpdater.update_weights_from_disk", update_weights, "AROUND"),
    (f"{_UPDATER}.WeightUpdater.update_weights_from_tensor", tensors, "AROUND"),
    (f"{_UPDATER}.WeightUpdater.receive_weights_from_distributed", receive, "AROUND"),
    (f"{_UPDATER}.WeightUpdater.load_weights_from_distributed", broadcast, "AROUND"),
    (f"{_UPDATER}.WeightUpdater.update_weights_from_ipc", ipc, "AROUND"),
    (f"{_UPDATER}.WeightUpdater.end_weight_update", end_update, "AROUND"),
    ("sglang.srt.arg_groups.model_path_hook.handle_model_source_paths", choose_backend, "AFTER"),
    ("sglang.srt.configs.load_config.LoadConfig._verify_load_format", verify_load_format, "AROUND"),
)
"""Dotted path in SGLang, hook, kind of hook. All are needed."""


def register_hooks(problem: str | None) -> None:
    """Register all hooks, or with a ``problem`` the first alone, which then raises it for prepared checkpoints."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    global _refusal
    _refusal = problem
    for target, hook, kind in HOOKS if problem is None else HOOKS[:1]:
        if not any(known is hook for _, known, _ in HookRegistry._hooks.get(target, ())):
            HookRegistry.register(target, hook, HookType[kind])
    if problem is None:
        from sglang.srt.arg_groups.choices import LOAD_FORMAT_CHOICES, add_load_format_choices

        if QUANT_METHOD not in LOAD_FORMAT_CHOICES:
            add_load_format_choices([QUANT_METHOD])


def _check_applied() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry

    missing = [target for target, _, _ in HOOKS if target not in HookRegistry._patched]
    if missing:
        raise ServingError(
            f"{len(missing)} of {len(HOOKS)} hooks could not be applied to this SGLang: {', '.join(missing)}",
            next_step="Install an SGLang that the plugin was tested with; the log has the reason.",
        )
