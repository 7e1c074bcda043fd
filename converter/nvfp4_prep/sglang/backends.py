"""MoE runner backends of SGLang and the layouts that they read."""

from __future__ import annotations

import logging
from typing import Any

from nvfp4_prep.errors import NvfpPrepError, ServingError
from nvfp4_prep.layouts import LAYOUTS, SGLANG_FLAGS, LayoutName
from nvfp4_prep.prepared.sglang_rules import COMPRESSED
from nvfp4_prep.prepared.stamp import QUANT_METHOD, Stamp
from nvfp4_prep.serving.placement import relayout_to
from nvfp4_prep.sglang.source_config import adopted_stamp
from nvfp4_prep_kernels import MoeLayout

__all__ = ["backend_of", "choose_backend", "wanted_layout"]

logger = logging.getLogger(__name__)

_CUTEDSL, _TRTLLM = LAYOUTS[LayoutName.CUTEDSL].flag, LAYOUTS[LayoutName.TRTLLM].flag
_EVERY_START = f", or give --moe-runner-backend {_CUTEDSL} to rearrange the weights at every start."


def backend_of(stamp: Stamp) -> str:
    """Return the backend that reads the file's layout; SGLang has no CuteDSL kernel for compressed-tensors."""
    return _TRTLLM if stamp.source.get("quant_method") == COMPRESSED else LAYOUTS[stamp.layout].flag


def choose_backend(server_args: Any) -> None:
    """Declare the backend of a prepared checkpoint's layout where none was asked for, and the source's method.

    Raises:
        ServingError: if the checkpoint is prepared, and another kernel's backend or a backup of experts was asked for.
    """
    from sglang.srt.arg_groups.model_override_base import resolving_view
    from sglang.srt.arg_groups.overrides import declare_resolution

    stamp = _stamp_of(server_args)
    if stamp is None:
        return
    view = resolving_view(server_args)
    if view.enable_elastic_expert_backup:
        raise ServingError(
            "--enable-elastic-expert-backup keeps original experts, which a prepared checkpoint does not have",
            where=str(server_args.model_path),
            next_step="Leave it out: lost experts are then loaded again from the checkpoint.",
        )
    if view.quantization is None:
        # For some architectures SGLang does not look into the config and asks for this flag.
        declare_resolution(server_args, QUANT_METHOD, quantization=_method_of(stamp))
    asked = view.moe_runner_backend
    if asked == "auto":
        declare_resolution(server_args, QUANT_METHOD, moe_runner_backend=backend_of(stamp))
    elif asked not in SGLANG_FLAGS:
        raise _other_backend(asked, "--moe-runner-backend")


def wanted_layout(stamp: Stamp, *, gated: bool, where: str) -> MoeLayout:
    """Return the layout that this process's backend reads.

    Between the batched layout and the others every expert is prepared anew, so that is done only if the backend was
    asked for.

    Raises:
        ServingError: if the backend reads no layout that the file can be brought into.
    """
    from sglang.srt.layers.moe.utils import get_moe_a2a_backend, get_moe_runner_backend, is_flashinfer_cutedsl_v1_path
    from sglang.srt.runtime_context import get_server_args

    backend = get_moe_runner_backend()
    if get_moe_a2a_backend().is_megamoe():
        raise ServingError(
            "prepared for FlashInfer's CuteDSL and TRTLLM kernels, but megamoe runs a kernel of its own",
            where=where,
            next_step="Leave --moe-a2a-backend megamoe out, or serve the source checkpoint (`nvfp4-prep restore`).",
        )
    masked = is_flashinfer_cutedsl_v1_path()
    read = LayoutName.CUTEDSL_BATCHED if masked else SGLANG_FLAGS.get(backend.value)
    if read is None:
        raise _other_backend(backend.value, where)
    if masked == stamp.batched or (gated and get_server_args().moe_runner_backend != "auto"):
        return MoeLayout.named(read, gated=gated, moe_tp=stamp.moe_tp)
    a2a = get_moe_a2a_backend().value
    raise ServingError(
        f"prepared in the {LAYOUTS[stamp.layout].kernel} layout, but {backend.value} with"
        f" --moe-a2a-backend {a2a} reads the {LAYOUTS[read].kernel} one",
        where=where,
        next_step=(
            "Serve with --moe-a2a-backend deepep and --moe-runner-backend flashinfer_cutedsl, or"
            f" {relayout_to('--layout cutedsl')}{_EVERY_START}"
            if stamp.batched
            else f"Leave --moe-a2a-backend deepep out, or {relayout_to('--layout cutedsl-batched')}{_EVERY_START}"
        ),
    )


def _stamp_of(server_args: Any) -> Stamp | None:
    """Return the stamp of the model that is to be served; ``None`` for stock checkpoints.

    SGLang reads (and remembers) the same config a little later; what it cannot read is left to its own words, after
    ours that no backend was chosen.
    """
    from sglang.srt.utils.hf_transformers import config as hf_config

    try:
        found = hf_config.get_config(
            server_args.model_path,
            trust_remote_code=server_args.trust_remote_code,
            revision=server_args.revision,
        )
    except NvfpPrepError:
        raise
    except Exception as error:
        logger.warning(
            "The config of %s cannot be read (%s: %s), so nvfp4-prep does not know whether its experts are prepared and"
            " chooses no MoE runner backend for them.",
            server_args.model_path,
            type(error).__name__,
            error,
        )
        return None
    stamp = adopted_stamp(found)
    return None if stamp is None else Stamp.parse(stamp)


def _method_of(stamp: Stamp) -> str:
    """Return SGLang's name of the source's quantization method."""
    method = stamp.source.get("quant_method", "modelopt")
    if method == COMPRESSED:
        return COMPRESSED
    nested = stamp.source.get("quantization")
    algo = (nested if isinstance(nested, dict) else stamp.source).get("quant_algo")
    return "modelopt_mixed" if str(algo).upper() == "MIXED_PRECISION" else "modelopt_fp4"


def _other_backend(asked: str, where: str) -> ServingError:
    return ServingError(
        "prepared for FlashInfer's CuteDSL and TRTLLM kernels, but another MoE runner backend was asked for",
        where=where,
        expected=" or ".join(SGLANG_FLAGS),
        actual=asked,
        next_step="Leave --moe-runner-backend out, or serve the source checkpoint (`nvfp4-prep restore`).",
    )
