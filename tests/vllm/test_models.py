"""Model families and parallel configurations: prepared against source, bit for bit, in every rank.

Everything from files on disk through vLLM's ModelConfig, DefaultModelLoader, model classes, load_weights,
process_weights_after_loading and kernel construction. The oracle is vLLM on the source with
--moe-backend flashinfer_cutedsl.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from nvfp4_prep.commands.convert import convert
from nvfp4_prep.errors import ServingError
from nvfp4_prep.options import ConvertOptions, GateUpPolicy, LayoutName
from nvfp4_prep.vllm.versions import TESTED, installed_version
from support.checkpoint_files import IN_REPOSITORY, WHOLE
from support.serving.compare import Counts, Job, Outcome, run
from support.serving.families import COMPRESSED, FAMILIES
from support.serving.installed import PADS
from support.serving.results import TABLE, Checkpoints
from support.serving.table_by_version import documented
from support.serving.tiny_models import TinyModel
from support.serving.vllm_on_cpu import LIFT_REFUSAL

EP = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "TP1": {},
    "TP2": {"tensor_parallel_size": 2},
    "TP2 with EP": EP,
    "PP2": {"pipeline_parallel_size": 2},
    "TP2 with EP, EPLB, 2 redundant": {
        **EP,
        "enable_eplb": True,
        "eplb_config": {"num_redundant_experts": 2},
    },
}


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        model: what is converted.
        configuration: name of the parallel configuration.
        parallel: its ParallelConfig fields.
        note: what is special, for the table.
        options: of the conversion.
        oracle: what vLLM loads instead of the source, where it cannot load the source right.
        input_scales: see Job.
        padded: the sizes need padding, which vLLM 0.31 does not do.
    """

    model: TinyModel
    configuration: str
    parallel: dict[str, Any]
    note: str = ""
    options: ConvertOptions = field(default_factory=ConvertOptions)
    oracle: TinyModel | None = None
    input_scales: bool = True
    padded: bool = False

    @property
    def name(self) -> str:
        return f"{self.model.family}{f' ({self.note})' if self.note else ''}"


def case(model: TinyModel, configuration: str, note: str = "", **changes: Any) -> Case:
    return Case(model, configuration, CONFIGURATIONS[configuration], note, **changes)


# vLLM 0.33 loads stacked Llama-4 NVFP4 experts right on one rank only: under TP it cuts the combined w13 block scales
# across the border of gate and up, under EP their sizes do not fit. There the oracle is the same weights, one by one.
LLAMA4 = FAMILIES["llama4"]
UNSTACKED = replace(LLAMA4, stacked=False, one_scalar=True)
QWEN, NEMOTRON, DEEPSEEK = FAMILIES["qwen3_moe"], FAMILIES["nemotron_h"], FAMILIES["deepseek_v3"]
# Our processes are launched from outside, as torchrun would: then vLLM takes rank and world as they are given.
DP2 = {"data_parallel_size": 2, "enable_expert_parallel": True, "distributed_executor_backend": "external_launcher"}
ROUND_ROBIN = {**EP, "expert_placement_strategy": "round_robin"}

CASES = [
    case(model, name, oracle=UNSTACKED if model is LLAMA4 and name in ("TP2", "TP2 with EP") else None)
    for model in FAMILIES.values()
    for name in CONFIGURATIONS
    if (model is not LLAMA4 or "EPLB" not in name)
] + [
    Case(DEEPSEEK, "TP2 with EP, round robin", ROUND_ROBIN),
    Case(DEEPSEEK, "DP2 with EP", DP2),
    Case(QWEN, "DP2 with EP", DP2),
    Case(NEMOTRON, "DP2 with EP", DP2),
    case(QWEN.with_sizes(8, 320, 96), "TP1", "I 96, H 320 padded", padded=True),
    case(QWEN.with_sizes(6, 336, 352), "TP2 with EP", "I 352, H 336 padded, 6 experts", padded=True),
    case(QWEN.with_sizes(8, 256, 192), "TP2", "I 192, --moe-tp 2", options=ConvertOptions(moe_tp=2), padded=True),
    case(NEMOTRON.with_sizes(8, 320, 192), "TP1", "I 192, H 320 padded", padded=True),
    case(
        NEMOTRON.with_sizes(8, 320, 192),
        "TP2",
        "I 192, H 320, --moe-tp 2",
        options=ConvertOptions(moe_tp=2),
        padded=True,
    ),
    case(COMPRESSED, "TP1", "compressed-tensors"),
    case(COMPRESSED, "TP2", "compressed-tensors"),
    case(COMPRESSED, "TP2 with EP", "compressed-tensors, without input scales", input_scales=False),
    case(COMPRESSED, "TP2 with EP, EPLB, 2 redundant", "compressed-tensors"),
    case(replace(QWEN, quant="modelopt_mixed"), "TP1", "ModelOpt mixed precision"),
    case(replace(QWEN, quant="modelopt_mixed_split"), "TP1", "mixed, layers in hf_quant_config.json"),
    case(replace(DEEPSEEK, quant="modelopt_legacy"), "TP1", "hf_quant_config.json"),
    case(
        replace(QWEN, equal_gate_up=False),
        "TP1",
        "gate/up scales differ, policy vllm",
        options=ConvertOptions(gate_up_scales=GateUpPolicy.VLLM),
    ),
]


@pytest.mark.parametrize("row", CASES, ids=lambda row: f"{row.name}-{row.configuration}")
@pytest.mark.usefixtures("plugin")
def test_prepared_equals_source(row: Case, checkpoints: Checkpoints, request: pytest.FixtureRequest) -> None:
    source, prepared = checkpoints.get(row.model, row.options)
    if row.oracle is not None:
        source, _ = checkpoints.get(row.oracle)
    if row.padded and not PADS:
        refused_for_padding(row, prepared, request)
        return
    job = Job(str(source), str(prepared), options={"parallel": row.parallel}, input_scales=row.input_scales)
    outcomes: Sequence[Outcome] = request.getfixturevalue("ranks").run(job) if row.parallel else [run(job)]
    record(row, outcomes)
    for outcome in outcomes:
        assert outcome.unsupported is None
        assert outcome.differences == []
        assert outcome.layers == (1 if "PP2" in row.configuration else 2)
        assert outcome.compared >= 14 * outcome.layers
        # Eight tensors and eight loader calls a layer, whatever the number of experts.
        assert outcome.prepared.calls == 8 * outcome.layers
        experts = sum(1 for name, _ in row.model.tensors() if ".experts" in name)
        assert outcome.prepared.tensors == len(list(row.model.tensors())) - experts + 8 * len(row.model.layers)


def refused_for_padding(row: Case, prepared: Path, request: pytest.FixtureRequest) -> None:
    """Assert that an installed vLLM that does not pad (0.31) gets no layer that needs it, and add the row."""
    job = Job(str(prepared), str(prepared), options={"parallel": row.parallel})
    with pytest.raises((ServingError, RuntimeError), match="the experts' sizes need padding"):
        request.getfixturevalue("ranks").run(job) if row.parallel else run(job)
    nothing = asdict(Counts())
    TABLE.append(
        {
            "model": row.name,
            "configuration": row.configuration,
            "result": "refused: this vLLM does not pad",
            "compared": "0",
            "source": nothing,
            "prepared": nothing,
        }
    )


WAYS = {
    "TRTLLM file": (LayoutName.TRTLLM, "flashinfer_trtllm", "auto"),
    "CuteDSL file, TRTLLM kernel": (LayoutName.CUTEDSL, "flashinfer_trtllm", "flashinfer_trtllm"),
    "TRTLLM file, CuteDSL kernel": (LayoutName.TRTLLM, "flashinfer_cutedsl", "flashinfer_cutedsl"),
}
"""The file's layout, the kernel that vLLM runs for the source, the flag for the prepared checkpoint."""


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("row", CASES, ids=lambda row: f"{row.name}-{row.configuration}")
@pytest.mark.usefixtures("plugin")
def test_both_kernels_from_either_file(
    row: Case, way: str, checkpoints: Checkpoints, request: pytest.FixtureRequest
) -> None:
    """vLLM on the source with the same kernel is the oracle; input scales as above."""
    layout, kernel, flag = WAYS[way]
    if row.padded and not PADS and kernel == "flashinfer_cutedsl":
        pytest.skip("this vLLM does not pad for CuteDSL: refused, as in test_prepared_equals_source")
    source, prepared = checkpoints.get(row.model, replace(row.options, layout=layout))
    if row.oracle is not None:
        source, _ = checkpoints.get(row.oracle)
    job = Job(
        str(source),
        str(prepared),
        options={"parallel": row.parallel},
        input_scales=row.input_scales,
        kernel=kernel,
        prepared_kernel=flag,
    )
    outcomes: Sequence[Outcome] = request.getfixturevalue("ranks").run(job) if row.parallel else [run(job)]
    for outcome in outcomes:
        assert outcome.unsupported is None
        assert outcome.differences == []
        assert outcome.layers == (1 if "PP2" in row.configuration else 2)
        two_scales = layout is LayoutName.TRTLLM and len(row.model.projections) == 3
        assert outcome.prepared.calls == (9 if two_scales else 8) * outcome.layers


REAL_QUANTIZER = "TP1, real quantizer"
QUANTIZED = {  # written by real quantizers; with what vLLM needs beside the files
    "modelopt-qwen3_moe-sharded": {},
    "modelopt041-mixtral-default": {},
    "modelopt041-deepseek_v3-mlp": {"topk_method": "noaux_tc"},  # transformers does not write it
    "llmc-qwen3_moe": {},
    "llmc09-mixtral": {},  # gate and up differ: policy vllm
}


@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize("name", QUANTIZED)
def test_checkpoints_of_real_quantizers(name: str, tmp_path: Path) -> None:
    """The repository has one of them whole; the others are there where the project's shared data is."""
    source = WHOLE / name if (WHOLE / name).is_dir() else IN_REPOSITORY / name
    if source.parent == IN_REPOSITORY and name != "modelopt-qwen3_moe-sharded":
        pytest.skip("only one layer of it is in the repository")
    convert(source, tmp_path / "prepared", ConvertOptions(gate_up_scales=GateUpPolicy.VLLM))
    job = Job(str(source), str(tmp_path / "prepared"), options={"model": {"hf_overrides": QUANTIZED[name]}})
    outcome = run(job)
    assert (outcome.unsupported, outcome.differences) == (None, [])
    assert outcome.layers == 2
    row = {"model": name, "configuration": REAL_QUANTIZER, "result": "bit-equal", "compared": outcome.compared}
    TABLE.append({**row, "source": asdict(outcome.source), "prepared": asdict(outcome.prepared)})


def test_the_table_by_version_says_what_was_seen() -> None:
    """docs/vllm-models.md, the column of the installed version, for all rows that ran before this test."""
    minor = ".".join(installed_version().split(".")[:2])
    if minor not in TESTED or os.environ.get(LIFT_REFUSAL):
        pytest.skip(f"no column for vLLM {minor}")
    page = documented()
    seen = {(row["model"], row["configuration"]): row["result"] for row in TABLE}
    for key in seen.keys() - page.keys():
        assert key[1] == REAL_QUANTIZER, f"{key} is not in the table"  # whose files are not on every machine
    assert {key: page[key][minor] for key in seen.keys() & page.keys()} == {
        key: seen[key] for key in seen.keys() & page.keys()
    }


def record(row: Case, outcomes: Sequence[Outcome]) -> None:
    """Adds a row to the table that is printed at the end."""
    bad = [o.unsupported or f"DIFFERS: {', '.join(o.differences)}" for o in outcomes if o.unsupported or o.differences]
    name = f"{row.name} (oracle: the same weights unstacked)" if row.oracle else row.name
    TABLE.append(
        {
            "model": name,
            "configuration": row.configuration,
            "result": "; ".join(bad) or "bit-equal",
            "compared": " + ".join(str(outcome.compared) for outcome in outcomes),
            "source": asdict(outcomes[-1].source),
            "prepared": asdict(outcomes[-1].prepared),
        }
    )


def test_vllm_itself_loads_stacked_llama4_scales_wrong_under_tensor_parallelism(
    checkpoints: Checkpoints, ranks: Any
) -> None:
    """Why Llama-4's oracle is unstacked under TP2. When this fails, vLLM was repaired and the oracle can go."""
    stacked, prepared = checkpoints.get(LLAMA4)
    outcomes = ranks.run(Job(str(stacked), str(prepared), options={"parallel": CONFIGURATIONS["TP2"]}))
    for outcome in outcomes:
        assert {name.split("/")[1] for name in outcome.differences} == {"w13_weight_scale", "kernel.w1_scale"}


def test_compressed_tensors_under_expert_parallelism_differs_in_input_scales_only(
    checkpoints: Checkpoints, ranks: Any
) -> None:
    """vLLM takes the maximum over the rank's experts there; a prepared checkpoint has the layer's, as TP1 and EPLB."""
    source, prepared = checkpoints.get(COMPRESSED)
    outcomes = ranks.run(Job(str(source), str(prepared), options={"parallel": EP}))
    derived = {"w13_input_scale", "w2_input_scale", "kernel.a1_gscale", "kernel.a2_gscale", "kernel.g1_alphas"}
    derived |= {"kernel.g2_alphas", "w13_weight_scale_2", "w2_weight_scale_2"}
    found = {name.split("/")[1] for outcome in outcomes for name in outcome.differences}
    assert found <= derived
    assert found
