"""The parts of the SGLang plugin that need no SGLang: versions, and the source's config in the stamp's place."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nvfp4_prep.errors import ServingError
from nvfp4_prep.layouts import LAYOUTS, LayoutName
from nvfp4_prep.options import ConvertOptions
from nvfp4_prep.prepared.stamp import STAMP_KEY, Stamp, make_stamp
from nvfp4_prep.sglang.arrivals import tagged
from nvfp4_prep.sglang.source_config import adopt_source, adopted_stamp, stamped_configs
from nvfp4_prep.sglang.versions import TESTED, version_problem
from nvfp4_prep_kernels import MoeLayout
from nvfp4_prep_kernels.fingerprint import fingerprint

FLAT = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "ignore": ["lm_head"]}
LEGACY = {
    "producer": {"name": "modelopt", "version": "0.29.0"},
    "quantization": {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]},
}
MIXED = {
    "quant_method": "modelopt",
    "quant_algo": "MIXED_PRECISION",
    "quantized_layers": {"a": {"quant_algo": "NVFP4"}},
}


def stamp_of(source: dict[str, Any]) -> dict[str, Any]:
    return dict(make_stamp(source, ConvertOptions(), gated=True))


def test_the_source_takes_the_stamps_place() -> None:
    config = stamp_of(FLAT)
    before = dict(config)
    model = SimpleNamespace(quantization_config=config, text_config=None)
    assert stamped_configs(model) == [config]
    adopt_source(config)
    assert config == {**FLAT, STAMP_KEY: before}
    assert stamped_configs(model) == []
    assert adopted_stamp(model) == before


def test_a_config_of_hf_quant_config_json_becomes_flat() -> None:
    """SGLang writes quant_algo beside a nested section and then finds no excluded modules."""
    config = stamp_of(LEGACY)
    adopt_source(config)
    del config[STAMP_KEY]
    assert config == {**LEGACY["quantization"], "producer": LEGACY["producer"], "quant_method": "modelopt"}


def test_mixed_precision_is_complete_without_another_file() -> None:
    config = stamp_of(MIXED)
    adopt_source(config)
    assert config["quantized_layers"] == MIXED["quantized_layers"]
    assert config["kv_cache_quant_algo"] is None


@pytest.mark.parametrize("method", ["fp8", "awq", "nvfp4_prep"])
def test_other_sources_are_refused(method: str) -> None:
    with pytest.raises(ServingError, match="cannot hold prepared experts"):
        adopt_source(stamp_of({**FLAT, "quant_method": method}))


def test_stock_configs_are_not_looked_at() -> None:
    model = SimpleNamespace(quantization_config=dict(FLAT), text_config=SimpleNamespace(quantization_config=None))
    assert stamped_configs(model) == []
    assert adopted_stamp(model) is None


def test_trtllm_stamps_are_read() -> None:
    layout = MoeLayout.trtllm(gated=True)
    written = stamp_of(FLAT)
    name = LAYOUTS[LayoutName.TRTLLM].stamp_name
    written["layout"] = {**written["layout"], "name": name, "fingerprint": fingerprint(layout)}
    stamp = Stamp.parse(written)
    assert stamp.moe_layout(gated=True) == layout
    stamp.check_fingerprint(gated=True)
    with pytest.raises(ServingError, match="fingerprint"):
        stamp.check_fingerprint(gated=False)


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        ("model.layers.1.mlp.experts.routed_experts.w2_weight", "model.layers.1.mlp.experts.w2_weight"),
        ("a.experts.routed_experts.w13_weight_scale_2_up", "a.experts.w13_weight_scale_2_up"),
        ("a.experts.routed_experts.other", "a.experts.routed_experts.other"),
        ("model.layers.1.mlp.experts.0.gate_proj.weight", "model.layers.1.mlp.experts.0.gate_proj.weight"),
    ],
)
def test_parameter_names(stored: str, name: str) -> None:
    assert tagged(stored, torch.empty(0))[0] == name


@pytest.mark.parametrize("version", [*TESTED, "0.5.24", "0.5.30.post1"])
def test_versions_that_are_taken(version: str) -> None:
    assert version_problem(version) is None


@pytest.mark.parametrize("version", ["0.5.22", "0.4.10", "0.6.0", "1.0", "main"])
def test_versions_that_are_refused(version: str) -> None:
    problem = version_problem(version)
    assert problem is not None and version in problem
