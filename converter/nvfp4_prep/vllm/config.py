"""Quantization configs: the source's own, which answer for the prepared expert layers and leave all the rest alone.

A stamped ``quantization_config`` becomes the source's in memory (with the stamp under a key of its own), before vLLM
resolves the method. So vLLM resolves the same method name as for the source checkpoint, and whatever else reads the
config (fusion passes, KV cache, excluded modules, model files) sees the source's. The three config classes that can
hold NVFP4 experts are replaced in vLLM's registry by subclasses whose ``from_config`` hands back the stock class unless
the stamp is there.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import MutableMapping
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.quantization import get_quantization_config, register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.modelopt import ModelOptMixedPrecisionConfig, ModelOptNvFp4Config

from nvfp4_prep.errors import ServingError
from nvfp4_prep.prepared.stamp import QUANT_METHOD, STAMP_KEY, Stamp
from nvfp4_prep.vllm.compat import normalized_source
from nvfp4_prep.vllm.moe_method import PreparedNvFp4MoEMethod

__all__ = ["Nvfp4PrepConfig", "adopt_source", "register_configs"]

logger = init_logger(f"vllm.{__name__}")


class WithPreparedExperts(ABC):
    """Mixed into a stock config class: prepared experts here, everything else from the stock class."""

    stamp: Stamp

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizationConfig:
        """Return the stock config for a stock checkpoint, else this class with the stamp."""
        stock = next(base for base in cls.__mro__ if base not in (cls, WithPreparedExperts))
        if STAMP_KEY not in config:
            return stock.from_config(config)  # type: ignore[attr-defined]
        clean = {key: value for key, value in config.items() if key != STAMP_KEY}
        made = super().from_config(copy.deepcopy(clean))  # type: ignore[misc]
        made.stamp = Stamp.parse(config[STAMP_KEY])
        return made

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """Return the prepared method for NVFP4 routed experts, else what the stock class says."""
        moe_config = self._nvfp4_config(layer, prefix) if isinstance(layer, RoutedExperts) else None
        if moe_config is None:
            return super().get_quant_method(layer, prefix)  # type: ignore[misc]
        online = getattr(self, "online_quantization_config", None)
        if online is not None and online.resolve_quant_method_cls(type(layer), prefix) is not None:
            raise ServingError(
                "online quantization was asked for on top of prepared experts",
                where=prefix,
                next_step="Remove --quantization-config for the routed experts, or serve the source checkpoint.",
            )
        return PreparedNvFp4MoEMethod(moe_config, layer.moe_config, self.stamp, prefix)

    @abstractmethod
    def _nvfp4_config(self, layer: RoutedExperts, prefix: str) -> ModelOptNvFp4Config | None:
        """Return the ModelOpt NVFP4 config of a routed-experts layer, if the source has NVFP4 (W4A4) experts there."""


class PreparedModelOptNvFp4Config(WithPreparedExperts, ModelOptNvFp4Config):  # type: ignore[misc]
    """ModelOpt NVFP4."""

    def _nvfp4_config(self, layer: RoutedExperts, prefix: str) -> ModelOptNvFp4Config | None:
        return self if self.quant_method == "NVFP4" and not self.is_layer_excluded(prefix) else None


class PreparedModelOptMixedConfig(WithPreparedExperts, ModelOptMixedPrecisionConfig):  # type: ignore[misc]
    """ModelOpt mixed precision."""

    def _nvfp4_config(self, layer: RoutedExperts, prefix: str) -> ModelOptNvFp4Config | None:
        if self.is_layer_excluded(prefix) or self._resolve_quant_algo(prefix) != "NVFP4":
            return None
        return self.nvfp4_config


class PreparedCompressedTensorsConfig(WithPreparedExperts, CompressedTensorsConfig):  # type: ignore[misc]
    """compressed-tensors ``nvfp4-pack-quantized``."""

    def _nvfp4_config(self, layer: RoutedExperts, prefix: str) -> ModelOptNvFp4Config | None:
        self._add_fused_moe_to_target_scheme_map()
        scheme = self.get_scheme_dict(layer, f"{prefix}.0.{layer.ckpt_down_proj_name}")
        both = scheme is not None and all(
            scheme.get(side) is not None and self._is_nvfp4_format(scheme.get(side))
            for side in ("weights", "input_activations")
        )
        return ModelOptNvFp4Config(is_checkpoint_nvfp4_serialized=True) if both else None


PREPARED_CONFIGS: dict[str, type[WithPreparedExperts]] = {
    "modelopt_fp4": PreparedModelOptNvFp4Config,
    "modelopt_mixed": PreparedModelOptMixedConfig,
    "compressed-tensors": PreparedCompressedTensorsConfig,
}
"""By the method name that vLLM resolves for the source."""


class Nvfp4PrepConfig(QuantizationConfig):  # type: ignore[misc]
    """Quantization config behind the name in the stamp; it only finds the source's method."""

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Put the source's config in the stamp's place and return the source's method; ``None`` without a stamp."""
        if hf_quant_cfg.get("quant_method") != QUANT_METHOD:
            return None
        method = adopt_source(hf_quant_cfg, user_quant, hf_config)
        for holder in (hf_config, getattr(hf_config, "text_config", None)):
            stamped = getattr(holder, "quantization_config", None)
            if isinstance(stamped, MutableMapping) and stamped.get("quant_method") == QUANT_METHOD:
                adopt_source(stamped, user_quant, hf_config)
        logger.info_once("Prepared NVFP4 experts: weights go into the kernel's parameters as they are.")
        return method

    def get_name(self) -> str:
        """Return the stamp's method name."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Return the dtypes of ModelOpt NVFP4."""
        return [torch.bfloat16, torch.half]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the kernels need sm_100; the check with the reason is vLLM's own, per layer."""
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return no names: the stamp is in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizationConfig:
        """Return the source's config object, for callers that look the class up by the stamp's name."""
        adopted = dict(config)
        method = adopt_source(adopted, None, None)
        return get_quantization_config(method).from_config(adopted)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> None:
        """Never reached: :meth:`from_config` returns the source's config."""
        return


def adopt_source(config: MutableMapping[str, Any], user_quant: str | None, hf_config: Any) -> str:
    """Replace a stamp by the source's quantization_config, in place, and keep the stamp under :data:`STAMP_KEY`.

    Returns:
        The method name that vLLM resolves for the source.

    Raises:
        ServingError: if the stamp cannot be read or its source is of no format with NVFP4 experts.
    """
    stamp = Stamp.parse(config)
    original = dict(config)
    source = normalized_source(stamp.source)
    method = source["quant_method"]
    for name in PREPARED_CONFIGS:
        override = get_quantization_config(name).override_quantization_method(source, user_quant, hf_config=hf_config)
        method = override or method
    if method not in PREPARED_CONFIGS:
        raise ServingError(
            "the source's quantization method cannot hold prepared experts",
            where="config.json, quantization_config.source",
            expected=", ".join(PREPARED_CONFIGS),
            actual=method,
            next_step="Run `nvfp4-prep verify` on the directory.",
        )
    if method == "modelopt_mixed" and "quantized_layers" not in source:
        # Else vLLM would look for hf_quant_config.json, which a prepared checkpoint does not have.
        source["quantized_layers"] = source.get("quantization", {}).get("quantized_layers", {})
    config.clear()
    config.update(source)
    config[STAMP_KEY] = original
    return str(method)


def register_configs() -> None:
    """Register the stamp's method and the three subclasses."""
    register_quantization_config(QUANT_METHOD)(Nvfp4PrepConfig)
    for name, config in PREPARED_CONFIGS.items():
        register_quantization_config(name)(config)
