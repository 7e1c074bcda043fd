"""Prepared checkpoints equal SGLang's own load of the source: model families, parallel configurations, backends.

Everything is SGLang's own code: ServerArgs and their resolution, ModelConfig, loaders, model classes,
process_weights_after_loading. The oracle is SGLang on the source with the same backend.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from sglang_compare import RAW_COMPRESSED, RAW_SCALES, UNPADDED, UNREAD, Job, Outcome, run
from sglang_models import COMPRESSED_MTP, COMPRESSED_QWEN, MODELS, Checkpoints, Model
from sglang_results import TABLE, WHOLE

from nvfp4_prep.options import ConvertOptions, LayoutName

CUTEDSL, TRTLLM, ROUTED = "flashinfer_cutedsl", "flashinfer_trtllm", "flashinfer_trtllm_routed"
BATCHED = "flashinfer_cutedsl_batched"
DEEPEP = "DeepEP low latency (its dispatcher a stand-in)"
PARALLEL: dict[str, dict[str, Any]] = {
    "TP1": {},
    "TP2": {"tp_size": 2},
    "TP2 with EP2": {"tp_size": 2, "ep_size": 2},
    "TP4": {"tp_size": 4},
    "TP4 with EP4": {"tp_size": 4, "ep_size": 4},
    "TP2 with PP2": {"tp_size": 2, "pp_size": 2},
    "DP attention 4, EP4": {"tp_size": 4, "dp_size": 4, "enable_dp_attention": True, "ep_size": 4},
    "PP2": {"pp_size": 2},
    "TP2 with EP2, EPLB, 2 redundant": {
        "tp_size": 2,
        "ep_size": 2,
        "enable_eplb": True,
        "ep_num_redundant_experts": 2,
    },
    "TP2 with EP2, EPLB, slots in another order": {
        "tp_size": 2,
        "ep_size": 2,
        "enable_eplb": True,
        "ep_num_redundant_experts": 2,
        "init_expert_location": json.dumps(
            {"physical_to_logical_map": [[3, 7, 7, 0, 1, 2, 6, 5, 4, 3], [0, 1, 2, 3, 4, 5, 6, 7, 1, 0]]}
        ),
    },
    DEEPEP: {"moe_a2a_backend": "deepep"},
    "DP attention 2, EP2": {"tp_size": 2, "dp_size": 2, "enable_dp_attention": True, "ep_size": 2},
}


NAMES = {
    "deepseek_v3": "DeepSeek-V3",
    "deepseek_v3_mtp": "DeepSeek-V3",
    "qwen3_moe": "Qwen3-MoE",
    "glm4_moe": "GLM-4",
    "minimax_m2": "MiniMax-M2",
    "nemotron_h": "Nemotron-H",
    "kimi_k25": "Kimi-K2.5",
    "llama4": "Llama-4",
}
LAYOUTS = {
    CUTEDSL: LayoutName.CUTEDSL,
    TRTLLM: LayoutName.TRTLLM,
    BATCHED: LayoutName.CUTEDSL_BATCHED,
}


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        model: what is converted.
        file: layout of the file.
        parallel: name of the parallel configuration.
        backend: the backend that serves it.
        note: what is special, for the table.
        options: of the conversion.
        left_out: endings of names that are not compared.
        draft: whether the draft model is loaded.
    """

    model: Model
    file: str
    parallel: str
    backend: str
    note: str = ""
    options: ConvertOptions = field(default_factory=ConvertOptions)
    left_out: tuple[str, ...] = RAW_SCALES
    draft: bool = False

    @property
    def name(self) -> str:
        return f"{NAMES[self.model.family]}{f' ({self.note})' if self.note else ''}"

    @property
    def asked(self) -> str:
        """No flag where the file's layout decides."""
        read = BATCHED if self.parallel == DEEPEP else self.backend
        return "auto" if self.file == read else self.backend


def case(model: Model, file: str, parallel: str, backend: str, note: str = "", **changes: Any) -> Case:
    left_out = (*RAW_SCALES, *UNREAD) if backend == CUTEDSL else RAW_SCALES
    if model.one_input_scale:
        left_out = ()
    if model.quant == "compressed-tensors":
        left_out = RAW_COMPRESSED
    return Case(model, file, parallel, backend, note, **{"left_out": left_out, **changes})


QWEN, DEEPSEEK, GLM = MODELS["qwen3_moe"], MODELS["deepseek_v3"], MODELS["glm4_moe"]
QWEN_ONE = replace(QWEN, one_input_scale=True)
DEEPSEEK_ONE = replace(DEEPSEEK, one_input_scale=True)
TWO_SCALES = replace(QWEN, equal_gate_up=False)
WIDE = QWEN.with_sizes(4, 384, 128)
NANO = MODELS["nemotron_h"].with_sizes(4, 384, 192)
H384 = "H 384 padded in the file"
ONE = "one input scale a layer"
LARGER = QWEN_ONE.with_sizes(8, 256, 256)  # so that four ranks need no padding
FOUR = ("TP4", "TP4 with EP4", "TP2 with PP2", "DP attention 4, EP4")

CASES = [
    *(
        case(MODELS[name], layout, "TP1", layout)
        for name in MODELS
        if name != "mixtral"
        for layout in (CUTEDSL, TRTLLM)
    ),
    *(case(QWEN_ONE, layout, "TP1", layout, ONE) for layout in (CUTEDSL, TRTLLM)),
    case(QWEN, CUTEDSL, "TP1", TRTLLM, "permuted at load"),
    case(QWEN, TRTLLM, "TP1", CUTEDSL, "permuted at load"),
    case(QWEN, TRTLLM, "TP1", ROUTED),
    *(case(QWEN, TRTLLM, parallel, TRTLLM) for parallel in PARALLEL if parallel not in ("TP1", DEEPEP, *FOUR)),
    *(case(DEEPSEEK, TRTLLM, parallel, TRTLLM) for parallel in ("TP2", "TP2 with EP2")),
    *(case(GLM, TRTLLM, parallel, TRTLLM) for parallel in ("TP2", "TP2 with EP2")),
    *(
        case(QWEN_ONE, CUTEDSL, parallel, CUTEDSL, "one input scale a layer")
        for parallel in PARALLEL
        if parallel not in ("TP1", DEEPEP, *FOUR)
    ),
    *(
        case(LARGER, layout, parallel, layout, f"I 256, {ONE}")
        for layout in (CUTEDSL, TRTLLM)
        for parallel in ("TP1", "TP2", *FOUR)
    ),
    *(
        case(DEEPSEEK_ONE, CUTEDSL, parallel, CUTEDSL, "one input scale a layer")
        for parallel in ("TP2", "TP2 with EP2")
    ),
    case(QWEN, CUTEDSL, "TP2", TRTLLM, "permuted at load"),
    case(QWEN, TRTLLM, "TP2", CUTEDSL, "permuted at load"),
    *(case(QWEN_ONE, file, DEEPEP, CUTEDSL, ONE) for file in (BATCHED, CUTEDSL, TRTLLM)),
    case(QWEN_ONE, BATCHED, "TP1", CUTEDSL, f"permuted at load, {ONE}"),
    case(QWEN_ONE, BATCHED, "TP2 with EP2", TRTLLM, f"permuted at load, {ONE}"),
    case(LARGER, BATCHED, "TP2", TRTLLM, f"permuted at load, I 256, {ONE}"),
    case(replace(WIDE, one_input_scale=True), TRTLLM, DEEPEP, CUTEDSL, H384),
    case(TWO_SCALES, TRTLLM, "TP1", TRTLLM, "gate/up scales differ"),
    case(TWO_SCALES, TRTLLM, "TP2 with EP2", TRTLLM, "gate/up scales differ"),
    case(QWEN.with_sizes(8, 256, 96), TRTLLM, "TP1", TRTLLM, "I 96 padded"),
    *(case(WIDE, file, "TP1", b, H384) for file in (CUTEDSL, TRTLLM) for b in (CUTEDSL, TRTLLM)),
    case(replace(WIDE, one_input_scale=True), CUTEDSL, "TP2", CUTEDSL, H384),
    case(NANO, TRTLLM, "TP1", TRTLLM, "H 384, I 192 padded"),
    case(NANO, CUTEDSL, "TP1", CUTEDSL, "H 384, I 192 padded", left_out=(*RAW_SCALES, *UNREAD, *UNPADDED)),
    case(replace(QWEN, quant="modelopt_mixed"), CUTEDSL, "TP1", CUTEDSL, "ModelOpt mixed precision"),
    case(replace(QWEN, quant="modelopt_mixed"), TRTLLM, "TP1", TRTLLM, "ModelOpt mixed precision"),
    case(replace(DEEPSEEK, quant="modelopt_legacy"), TRTLLM, "TP1", TRTLLM, "hf_quant_config.json"),
    case(COMPRESSED_QWEN, TRTLLM, "TP1", TRTLLM, "compressed-tensors"),
    case(COMPRESSED_QWEN.with_sizes(8, 256, 256), TRTLLM, "TP2", TRTLLM, "compressed-tensors"),
    *(
        case(COMPRESSED_MTP, file, "TP1", TRTLLM, f"compressed-tensors, {what}", draft=what == "draft model")
        for file, what in ((TRTLLM, "target of a draft model"), (TRTLLM, "draft model"), (CUTEDSL, "draft model"))
    ),
    case(replace(COMPRESSED_QWEN, one_input_scale=True), CUTEDSL, "TP2 with EP2", TRTLLM, f"compressed-tensors, {ONE}"),
]
WHOLE["table"] = len(CASES)


@pytest.mark.parametrize("row", CASES, ids=lambda row: f"{row.name}-{row.file}-{row.parallel}-{row.backend}")
@pytest.mark.usefixtures("plugin")
def test_prepared_equals_source(row: Case, checkpoints: Checkpoints, ranks_of: Callable[[int], Any]) -> None:
    from sglang.srt.layers.moe.fused_moe_triton import layer as fused_moe

    source, prepared = checkpoints.get(row.model, replace(row.options, layout=LAYOUTS[row.file]))
    parallel = PARALLEL[row.parallel]
    options = {**parallel, **({"disable_radix_cache": True} if row.model.family == "nemotron_h" else {})}
    job = Job(
        str(source), str(prepared), row.backend, row.asked, options=options, left_out=row.left_out, draft=row.draft
    )
    dispatcher = SimpleNamespace(set_quant_config=lambda config: None)
    stand_in = mock.patch.object(fused_moe, "MaybeTboDeepEPDispatcher", lambda **_: dispatcher)
    world = parallel.get("tp_size", 1) * parallel.get("pp_size", 1)
    with stand_in:
        outcomes: Sequence[Outcome] = ranks_of(world).run(job) if world > 1 else [run(job)]
    record(row, outcomes)
    tensors = 9 if row.file == TRTLLM and row.model.gated else 8
    for outcome in outcomes:
        assert outcome.unsupported is None
        assert outcome.differences == []
        assert outcome.layers == (1 if row.draft else 2 // parallel.get("pp_size", 1))
        assert outcome.compared >= 14 * outcome.layers
        # One loader call a tensor, whatever the number of experts.
        assert outcome.prepared.calls == tensors * outcome.layers


def record(row: Case, outcomes: Sequence[Outcome]) -> None:
    """Add a row to the table that is printed at the end."""
    bad = [o.unsupported or f"DIFFERS: {', '.join(o.differences)}" for o in outcomes if o.unsupported or o.differences]
    TABLE.append(
        {
            "model": row.name,
            "file": row.file,
            "parallel": row.parallel,
            "backend": f"{row.backend} ({'no flag' if row.asked == 'auto' else 'asked for'})",
            "result": "; ".join(bad) or "bit-equal",
            "compared": " + ".join(str(outcome.compared) for outcome in outcomes),
            "source": asdict(outcomes[-1].source),
            "prepared": asdict(outcomes[-1].prepared),
        }
    )
