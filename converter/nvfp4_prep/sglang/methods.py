"""SGLang's config objects and MoE methods, as they become prepared ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nvfp4_prep.errors import ServingError
from nvfp4_prep.prepared.stamp import STAMP_KEY, Stamp
from nvfp4_prep.sglang.source_config import adopted_stamp

__all__ = [
    "check_loader",
    "check_stamp_was_taken",
    "config_with_stamp",
    "guard_stock_layers",
    "prepared_method",
]

_STAMP = "nvfp4_prep_stamp"


def config_with_stamp(original: Callable[..., Any], cls: type, config: dict[str, Any], *args: Any, **kw: Any) -> Any:
    """Return what the stock class makes of the source's config, with the stamp; stock configs pass through."""
    if STAMP_KEY not in config:
        return original(cls, config, *args, **kw)
    clean = {key: value for key, value in config.items() if key != STAMP_KEY}
    made = original(cls, clean, *args, **kw)
    setattr(made, _STAMP, Stamp.parse(config[STAMP_KEY]))
    return made


def check_stamp_was_taken(made: Any, model_config: Any) -> None:
    """Raise :class:`ServingError` if a stamped checkpoint got a config object without stamp."""
    if adopted_stamp(model_config.hf_config) is None or getattr(made, _STAMP, None) is not None:
        return
    raise ServingError(
        f"quantization method {model_config.quantization} was asked for on top of prepared experts",
        where=str(model_config.model_path),
        next_step="Leave --quantization out, or serve the source checkpoint (`nvfp4-prep restore`).",
    )


def check_loader(loader: Any, model_config: Any) -> None:
    """Raise :class:`ServingError` if a stamped checkpoint is to be loaded by what does not read its tensors by name.

    Other instances' memory and dumps of a running server hold what SGLang derives, too, and pass the checks by.
    """
    if model_config is None or adopted_stamp(model_config.hf_config) is None:
        return
    from sglang.srt.model_loader import loader as loaders

    from nvfp4_prep.sglang.load_format import PreparedModelLoader

    by_name = (loaders.DefaultModelLoader, loaders.ModelOptModelLoader, loaders.RunaiModelStreamerLoader)
    if type(loader) in (*by_name, loaders.DummyModelLoader, PreparedModelLoader):
        return
    raise ServingError(
        f"{type(loader).__name__} does not load a prepared checkpoint's tensors by their names",
        where=str(model_config.model_path),
        next_step="Leave --load-format out, or use safetensors, fastsafetensors, instanttensor, runai_streamer or"
        " nvfp4_prep.",
    )


def prepared_method(method: Any, config: Any, layer: Any, *args: Any, **kwargs: Any) -> Any:
    """Return the prepared method in the place of ``method``, if that is for NVFP4 experts of a stamped file."""
    stamp = getattr(config, _STAMP, None)
    if stamp is None or method is None:
        return method
    from sglang.srt.layers.moe.fused_moe_triton import FusedMoE
    from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsFusedMoEMethod
    from sglang.srt.layers.quantization.compressed_tensors.schemes import CompressedTensorsW4A4Nvfp4MoE
    from sglang.srt.layers.quantization.modelopt_quant import ModelOptNvFp4FusedMoEMethod

    if not isinstance(layer, FusedMoE):
        return method
    prefix = str(kwargs.get("prefix", args[0] if args else ""))
    if type(method) is ModelOptNvFp4FusedMoEMethod:
        from nvfp4_prep.sglang.modelopt_method import PreparedModelOptMethod

        return PreparedModelOptMethod(method.quant_config, stamp, prefix)
    if type(method) is CompressedTensorsFusedMoEMethod and type(layer.scheme) is CompressedTensorsW4A4Nvfp4MoE:
        from nvfp4_prep.sglang.compressed_tensors_scheme import PreparedScheme

        layer.scheme = PreparedScheme(stamp, prefix)
    return method


def guard_stock_layers(model: Any, model_config: Any) -> None:
    """Have the stock expert layers of a stamped checkpoint's model refuse prepared tensors, by name.

    SGLang keeps the experts of most draft models unquantized, whatever the checkpoint says. Original tensors, which
    are loaded with the number of their expert, pass.
    """
    from sglang.srt.layers.moe.fused_moe_triton import FusedMoE

    from nvfp4_prep.sglang.layer_weights import set_loader

    if adopted_stamp(model_config.hf_config) is None:
        return
    for layer_name, layer in model.named_modules():
        if isinstance(layer, FusedMoE) and not hasattr(layer, "nvfp4_prep"):
            for name, param in layer.named_parameters():
                set_loader(param, _only_originals(param.weight_loader, f"{layer_name}.{name}"))


def _only_originals(loader: Callable[..., Any], where: str) -> Callable[..., Any]:
    def weight_loader(param: Any, loaded_weight: Any, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return loader(param, loaded_weight, *args, **kwargs)
        raise ServingError(
            "prepared experts came for a layer that SGLang's model class does not hold in NVFP4",
            where=where,
            next_step="Leave speculative decoding with this checkpoint's own draft layer out, or serve with vLLM.",
        )

    return weight_loader
