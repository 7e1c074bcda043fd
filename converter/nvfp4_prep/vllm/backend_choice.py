"""Choice of the MoE backend for a prepared checkpoint: its own, or the other one by an explicit flag.

vLLM 0.33 reads no environment variable for the NVFP4 MoE backend; ``--moe-backend`` is the only choice there is.
Backends that want weights in another form (CUTLASS, Marlin, b12x …) are refused: restoring the source's order and
running their own preparation would be what serving the source does, bytes and time alike.
"""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.oracle import nvfp4 as oracle
from vllm.model_executor.layers.quantization.utils.quant_utils import kNvfp4Dynamic, kNvfp4Static

from nvfp4_prep.errors import ServingError
from nvfp4_prep.layouts import LAYOUTS, SERVER_FLAGS, layout_of_backend
from nvfp4_prep.prepared.stamp import Stamp

__all__ = ["pin_backend", "stock_choice", "tell_choice"]

logger = init_logger(f"vllm.{__name__}")


def pin_backend(moe_config: FusedMoEConfig, stamp: Stamp, layer_name: str) -> bool:
    """Set the backend that the layer runs: the flag's where there is one, else that of the file's layout.

    Returns:
        Whether the user asked for it by name.

    Raises:
        ServingError: if something else was asked for than a kernel that prepared weights can be given to.
    """
    asked = moe_config.moe_backend
    if asked == "auto":
        moe_config.moe_backend = LAYOUTS[stamp.layout].flag
        return False
    if asked in SERVER_FLAGS:
        return True
    raise ServingError(
        f"prepared for the {LAYOUTS[stamp.layout].kernel} kernels, but an MoE backend"
        " was asked for that wants weights in another form",
        where=layer_name,
        expected=f"--moe-backend {' or '.join(SERVER_FLAGS)} (or none)",
        actual=f"--moe-backend {asked}",
        next_step="Leave --moe-backend out, or serve the source checkpoint (`nvfp4-prep restore`).",
    )


def stock_choice(moe_config: FusedMoEConfig) -> str | None:
    """Return the name of the backend that vLLM chooses for the source's layer, or ``None`` if it finds none."""
    pinned, logged = moe_config.moe_backend, oracle.logger
    moe_config.moe_backend, oracle.logger = "auto", _Silent()
    try:
        return str(oracle.select_nvfp4_moe_backend(moe_config, kNvfp4Static, kNvfp4Dynamic)[0].value)
    except (NotImplementedError, ValueError):
        return None
    finally:
        moe_config.moe_backend, oracle.logger = pinned, logged


def tell_choice(moe_config: FusedMoEConfig, running: str, *, asked: bool) -> None:
    """Log once which kernel runs, which one stock vLLM would have chosen for the source, and how to change it."""
    stock = stock_choice(moe_config)
    other = layout_of_backend(stock or "")
    own = layout_of_backend(running)
    why = "asked for by --moe-backend" if asked else "for which this checkpoint was made"
    if stock == running:
        logger.info_once("Prepared NVFP4 experts run %s, %s; vLLM chooses it for the source too.", running, why)
    elif other and own and LAYOUTS[other].flag != LAYOUTS[own].flag:
        logger.info_once(
            "Prepared NVFP4 experts run %s, %s. For the source vLLM would have chosen %s here: --moe-backend %s serves"
            " this checkpoint with it, `nvfp4-prep relayout --layout %s` makes one for it.",
            running,
            why,
            stock,
            LAYOUTS[other].flag,
            other,
        )
    else:
        logger.info_once(
            "Prepared NVFP4 experts run %s, %s. For the source vLLM would have chosen %s here, which only the source"
            " can be served with.",
            running,
            why,
            stock or "no backend",
        )


class _Silent:
    """A logger that says nothing: vLLM remembers what it has logged once, and the real choice is still to be told."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None
