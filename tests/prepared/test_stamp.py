"""The stamp: where it goes, what it keeps, what it says."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from nvfp4_prep import ConvertOptions, LayoutName
from nvfp4_prep.errors import ServingError
from nvfp4_prep.moe.model_config import NESTED_KEYS, quantization_configs
from nvfp4_prep.prepared.stamp import QUANT_METHOD, Stamp, config_bytes, make_stamp, stamp_in
from nvfp4_prep.prepared.stamp import stamped as stamp_config
from nvfp4_prep_kernels import MoeLayout
from nvfp4_prep_kernels.fingerprint import fingerprint

QUANT = {
    "quant_method": "modelopt",
    "quant_algo": "NVFP4",
    "producer": {"name": "modelopt", "version": "0.41.0"},
    "ignore": ["lm_head"],
    "kv_cache_scheme": {"num_bits": 8},
}
HF = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "exclude_modules": ["lm_head"]}}


def stamped(config: dict[str, Any], hf: dict[str, Any] | None = None) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(config_bytes(stamp_config(config, hf, ConvertOptions(), gated=True)))
    return made


def test_top_level() -> None:
    made = stamped({"a": 1, "quantization_config": QUANT, "z": {"unknown": [1.5, None]}})
    assert list(made) == ["a", "quantization_config", "z"]
    stamp = made["quantization_config"]
    assert stamp["quant_method"] == QUANT_METHOD == "nvfp4_prep"
    assert stamp["source"] == QUANT
    assert stamp["quant_algo"] == "NVFP4"
    assert stamp["ignore"] == ["lm_head"]
    assert stamp["kv_cache_scheme"] == {"num_bits": 8}
    assert "producer" not in stamp  # vLLM rewrites quant_method where producer.name is modelopt
    assert made["z"] == {"unknown": [1.5, None]}


def test_nested_only_and_both_places() -> None:
    nested = stamped({"text_config": {"quantization_config": QUANT, "x": 1}})
    assert "quantization_config" not in nested
    assert nested["text_config"]["quantization_config"]["quant_method"] == QUANT_METHOD
    assert nested["text_config"]["x"] == 1
    both = stamped({"quantization_config": QUANT, "text_config": {"quantization_config": {"other": 1}}})
    assert both["quantization_config"] == both["text_config"]["quantization_config"]
    assert both["quantization_config"]["source"] == QUANT


@pytest.mark.parametrize("holder", ["", *NESTED_KEYS])
def test_the_stamp_is_found_wherever_it_was_written(holder: str) -> None:
    config = {"quantization_config": QUANT}
    found = stamp_in(stamped({holder: config} if holder else config))
    assert found is not None and found["source"] == QUANT


def test_hf_quant_config_counts_only_where_the_config_has_none() -> None:
    alone = stamped({"a": 1}, HF)["quantization_config"]
    assert alone["source"] == HF
    assert alone["quant_algo"] == "NVFP4"
    assert alone["exclude_modules"] == ["lm_head"]
    assert stamped({"quantization_config": QUANT}, HF)["quantization_config"]["source"] == QUANT
    assert next(iter(quantization_configs({"quantization_config": QUANT}, HF).values())) == QUANT


@pytest.mark.parametrize("nested", [5, True, "quantized_layers", ["quantized_layers"], None])
def test_hf_quant_config_of_another_shape_does_not_count(nested: object) -> None:
    mixed = {"quant_algo": "MIXED_PRECISION"}
    assert stamped({"quantization_config": mixed}, {"quantization": nested})["quantization_config"]["source"] == mixed


def test_text_survives() -> None:
    made = config_bytes(stamp_config({"name": "模型", "bad": "\ud800"}, None, ConvertOptions(), gated=True))
    assert "模型".encode() in made
    assert json.loads(made.decode("utf-8"))["bad"] == "\ud800"


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("block", [16, 32, 64])
def test_layout_of_the_stamp(gated: bool, block: int) -> None:
    layout = make_stamp(QUANT, ConvertOptions(gate_up_block=block), gated=gated)["layout"]
    assert layout["name"] == "flashinfer_cutedsl"
    assert layout["gate_up_block"] == block
    assert layout["scale_swizzle"] == "128x4"
    assert layout["hidden_alignment"] == 256
    assert layout["intermediate_alignment"] == (64 if gated else 128)
    assert layout["fingerprint"] == fingerprint(MoeLayout.cutedsl(gated=gated, gate_up_block=block))


def test_fingerprints_tell_layouts_apart_and_ignore_tensor_parallelism() -> None:
    layouts = [MoeLayout.cutedsl(gated=True, gate_up_block=block) for block in (16, 32, 64)]
    layouts += [MoeLayout.cutedsl(gated=False), MoeLayout.cutedsl_batched()]
    assert len({fingerprint(layout) for layout in layouts}) == 5
    assert fingerprint(layouts[2].for_moe_tp(4)) == fingerprint(layouts[2])
    batched = make_stamp(QUANT, ConvertOptions(layout=LayoutName.CUTEDSL_BATCHED), gated=True)["layout"]
    assert batched["name"] == "flashinfer_cutedsl_batched"


@pytest.mark.parametrize("layout", LayoutName)
def test_the_plugin_reads_what_convert_stamps(layout: LayoutName) -> None:
    stamp = Stamp.parse(make_stamp({"quant_method": "modelopt"}, ConvertOptions(layout), gated=True))
    assert stamp.moe_layout(gated=True) == ConvertOptions(layout).layout_for(gated=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"moe_tp": math.inf}, "stamp is incomplete or damaged .ValueError: moe_tp must be a whole number"),
        ({"moe_tp": True}, "moe_tp must be a whole number"),
        ({"gate_up_block": "64"}, "gate_up_block must be a whole number"),
        ({"fingerprint": "0"}, "fingerprint must be a sha256"),
        ({"name": None}, "name must be a text"),
        ({"gate_up_block": 48}, "stamp is incomplete or damaged .LayoutError"),
        ({"hidden_alignment": 128}, "unknown layout.*hidden_alignment 256.*'hidden_alignment': 128"),
        ({"scale_swizzle": "64x4"}, "unknown layout"),
    ],
)
def test_a_stamp_that_was_changed_is_refused(change: dict[str, Any], message: str) -> None:
    stamp = make_stamp({"quant_method": "modelopt"}, ConvertOptions(), gated=True)
    stamp["layout"].update(change)
    with pytest.raises(ServingError, match=message):
        Stamp.parse(stamp)


@pytest.mark.parametrize("source", [None, 5, [5], {"quant_method": None}, {"quant_method": 5}])
def test_a_stamp_without_a_usable_source_is_refused(source: Any) -> None:
    stamp = {**make_stamp({}, ConvertOptions(), gated=True), "source": source}
    with pytest.raises(ServingError, match=r"stamp is incomplete or damaged .TypeError"):
        Stamp.parse(stamp)


@pytest.mark.parametrize("version", [True, 1.0, "1", 2, None])
def test_a_version_that_is_not_this_one(version: Any) -> None:
    stamp = {**make_stamp(QUANT, ConvertOptions(), gated=True), "format_version": version}
    with pytest.raises(ServingError, match="does not know"):
        Stamp.parse(stamp)


def test_a_later_version_s_keys_are_ignored() -> None:
    stamp = make_stamp(QUANT, ConvertOptions(), gated=True)
    later = {**stamp, "later": 1, "layout": {**stamp["layout"], "later": 1}}
    assert Stamp.parse(later) == Stamp.parse(stamp)
