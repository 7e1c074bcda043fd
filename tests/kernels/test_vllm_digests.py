"""The layout package against digests of what vLLM made of the same layers (tests/data/make_vllm_digests.py)."""

from __future__ import annotations

import functools
import json
import struct
from dataclasses import replace
from typing import Any

import pytest
import torch

from data.synthetic_layers import LAYERS, SyntheticLayer
from nvfp4_prep_kernels import MoeLayout, PreparedTensor, take_rank
from support.digest_cases import Case, assert_recorded, prepared
from support.paths import DATA

DIGESTS = DATA / "vllm_digests.json"
BY_NAME = {layer.name: layer for layer in LAYERS}


@functools.cache
def recorded() -> dict[str, Any]:
    layers: dict[str, Any] = json.loads(DIGESTS.read_text())["layers"]
    return layers


KEYS = [key for key in recorded() if key.startswith("synthetic/")]


def case_of(key: str) -> Case:
    _, name, *variants = key.split("/")
    layer = BY_NAME[name]
    batched = "batched" in variants
    layout = MoeLayout.cutedsl_batched() if batched else MoeLayout.cutedsl(gated=layer.gated)
    size, rank = (variants[-1].removeprefix("tp").split("-rank")) if variants[-1:] > ["tp"] else (1, 0)
    return Case(layer, layout, (int(size), int(rank)), recorded()[key])


def floats(layer: SyntheticLayer, projections: list[str], leaf: str) -> list[list[float]]:
    return [
        [struct.unpack("<f", layer.tensor(expert, name, leaf).data)[0] for name in projections]
        for expert in range(layer.experts)
    ]


@pytest.mark.parametrize("key", KEYS)
def test_prepared_bytes_equal_vllms(key: str) -> None:
    case = case_of(key)
    for tensor in PreparedTensor:
        assert_recorded(prepared(case, tensor, case.tp), case.record["tensors"][tensor.value])
    assert case.record["padded_hidden"] == case.layout.padded_hidden(case.dims.hidden)
    share = case.dims.intermediate // case.tp[0]
    assert case.record["padded_intermediate"] == case.layout.padded_intermediate(share)


@pytest.mark.parametrize("key", [key for key in KEYS if "/tp" in key])
def test_share_of_the_prepared_whole_equals_vllms_preparation_of_the_share(key: str) -> None:
    """Where a layout claims to serve a size, a cut of the prepared whole is what vLLM makes of the rank's share."""
    case = case_of(key)
    size, rank = case.tp
    if size not in case.layout.tp_sizes(case.dims, limit=size):
        case = replace(case, layout=case.layout.for_moe_tp(size))
        if not case.layout.interleaved and case.layout.gated:
            return  # the batched kernel pads nothing: such a file is not made
    for tensor in PreparedTensor:
        share = take_rank(case.layout, tensor, prepared(case, tensor, (1, 0)), case.dims, rank, size)
        assert_recorded(share, case.record["tensors"][tensor.value])


@pytest.mark.parametrize("key", KEYS)
def test_scale_vectors_equal_vllms(key: str) -> None:
    """Raw weight_scale_2 (gate's for w13), input scales as maxima over the layer, alphas as their product."""
    case = case_of(key)
    layer, record = case.layer, case.record["tensors"]
    w13 = ["gate_proj", "up_proj"] if layer.gated else ["up_proj"]
    for side, projections in (("w13", w13), ("w2", ["down_proj"])):
        scale_2 = torch.tensor([row[0] for row in floats(layer, projections, "weight_scale_2")])
        input_scale = torch.tensor(floats(layer, projections, "input_scale")).max().repeat(layer.experts)
        vectors = {f"{side}_weight_scale_2": scale_2, f"{side}_input_scale": input_scale}
        if f"{side}_alpha" in record:
            vectors[f"{side}_alpha"] = scale_2 * input_scale
        for name, vector in vectors.items():
            assert vector.dtype == torch.float32
            assert_recorded(vector, record[name])


def test_every_synthetic_layer_is_recorded() -> None:
    assert {key.split("/")[1] for key in KEYS} == set(BY_NAME)
