"""The TRTLLM-gen layout against digests of what vLLM's and SGLang's own functions made of the same layers.

`tests/data/make_trtllm_digests.py` recorded them; FlashInfer's index functions are asked again where it is installed
(tests/kernels/test_flashinfer_layout.py).
"""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from typing import Any

import pytest

from data.synthetic_layers import LAYERS
from nvfp4_prep_kernels import MoeDims, MoeLayout, PreparedTensor, take_rank
from nvfp4_prep_kernels.tile_relayout import relayout_tiles
from support.digest_cases import Case, assert_recorded, prepared
from support.paths import DATA

DIGESTS = DATA / "trtllm_digests.json"
BY_NAME = {layer.name: layer for layer in LAYERS}


@functools.cache
def recorded() -> dict[str, Any]:
    layers: dict[str, Any] = json.loads(DIGESTS.read_text())["layers"]
    return layers


KEYS = list(recorded())


def case_of(key: str) -> Case:
    _, name, share = key.split("/")
    size, rank = share.removeprefix("tp").split("-rank")
    layer = BY_NAME[name]
    return Case(layer, MoeLayout.trtllm(gated=layer.gated), (int(size), int(rank)), recorded()[key])


def test_what_is_recorded() -> None:
    """Both servers; padded, non-gated and Kimi-sized layers; ranks."""
    for server in ("vllm", "sglang"):
        names = {key.split("/")[1] for key in KEYS if key.startswith(server)}
        assert {"gated-e1-h7168-i2048", "nongated-e4-h256-i128", "gated-e4-h256-i128-unequal"} <= names
    padded = {key.split("/")[1] for key in KEYS if key.startswith("vllm")}
    assert {"gated-e4-h320-i352", "nongated-e3-h320-i64", "nongated-e1-h2688-i1856", "gated-e2-h16-i16"} <= padded
    assert sum("tp1" not in key for key in KEYS) > 20


@pytest.mark.parametrize("key", KEYS)
def test_prepared_bytes_equal_the_servers(key: str) -> None:
    case = case_of(key)
    for tensor in PreparedTensor:
        assert_recorded(prepared(case, tensor, case.tp), case.record[tensor.value])


@pytest.mark.parametrize("key", [key for key in KEYS if "/tp1-" not in key])
def test_share_of_the_prepared_whole_equals_the_servers_preparation_of_the_share(key: str) -> None:
    case = case_of(key)
    size, rank = case.tp
    if size not in case.layout.tp_sizes(case.dims, limit=size):
        case = replace(case, layout=case.layout.for_moe_tp(size))
    for tensor in PreparedTensor:
        share = take_rank(case.layout, tensor, prepared(case, tensor, (1, 0)), case.dims, rank, size)
        assert_recorded(share, case.record[tensor.value])


@pytest.mark.parametrize("key", [key for key in KEYS if "/tp1-" in key])
def test_a_cutedsl_file_converted_inside_tiles_equals_the_servers(key: str) -> None:
    case = case_of(key)
    cutedsl = replace(case, layout=MoeLayout.cutedsl(gated=case.layout.gated))
    for tensor in PreparedTensor:
        have = prepared(cutedsl, tensor, (1, 0)).contiguous()
        relayout_tiles(tensor, have, cutedsl.layout, case.layout, out=have)
        assert_recorded(have, case.record[tensor.value])


@pytest.mark.parametrize("tensor", list(PreparedTensor))
def test_digests_see_one_exchanged_row(tensor: PreparedTensor) -> None:
    case = case_of("vllm/gated-e4-h256-i128/tp1-rank0")
    made = prepared(case, tensor, (1, 0)).clone()
    made[0, [0, 1]] = made[0, [1, 0]]
    with pytest.raises(AssertionError):
        assert_recorded(made, case.record[tensor.value])


def test_layer_that_needs_hidden_padding_is_vllms_alone() -> None:
    """SGLang pads H nowhere: a padded file is not what it would make."""
    assert "vllm/gated-e4-h336-i128/tp1-rank0" in KEYS
    assert "sglang/gated-e4-h336-i128/tp1-rank0" not in KEYS
    assert MoeLayout.trtllm(gated=True).padded_hidden(MoeDims(4, 128, 336).hidden) == 512
