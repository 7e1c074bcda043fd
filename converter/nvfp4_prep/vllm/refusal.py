"""Refusal for a vLLM that the plugin was not tested with: a clear message, for prepared checkpoints alone."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from nvfp4_prep.errors import ServingError
from nvfp4_prep.prepared.stamp import QUANT_METHOD

__all__ = ["register_refusal"]


def register_refusal(problem: str) -> None:
    """Register a quantization method that raises :class:`ServingError` when a stamped checkpoint is opened."""

    class RefusingConfig(QuantizationConfig):  # type: ignore[misc]
        """Answers for no checkpoint but a prepared one, and that with an error."""

        @classmethod
        def override_quantization_method(
            cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
        ) -> str | None:
            if hf_quant_cfg.get("quant_method") == QUANT_METHOD:
                raise ServingError(problem)
            return None

        def get_name(self) -> str:
            return QUANT_METHOD

        def get_supported_act_dtypes(self) -> list[Any]:
            return []

        @classmethod
        def get_min_capability(cls) -> int:
            return 100

        @staticmethod
        def get_config_filenames() -> list[str]:
            return []

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> QuantizationConfig:
            raise ServingError(problem)

        def get_quant_method(self, layer: Any, prefix: str) -> None:
            return None

    register_quantization_config(QUANT_METHOD)(RefusingConfig)
