"""The layout package against digests of what vLLM made of the same layers (tests/data/make_vllm_digests.py)."""

from __future__ import annotations

import functools
import hashlib
import json
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data.synthetic_layers import LAYERS, SyntheticLayer
from nvfp4_prep_kernels import MoeDims, MoeLayout, PreparedTensor, take_rank

DIGESTS = Path(__file__).parent / "data" / "vllm_digests.json"
BY_NAME = {layer.name: layer for layer in LAYERS}
LEAF = {True: "weight_scale", False: "weight"}


@functools.cache
def recorded() -> dict[str, Any]:
    layers: dict[str, Any] = json.loads(DIGESTS.read_text())["layers"]
    return layers


KEYS = [key for key in recorded() if key.startswith("synthetic/")]


@dataclass(frozen=True)
class Case:
    """A recorded entry: which layer, which layout, which share of it."""

    layer: SyntheticLayer
    layout: MoeLayout
    tp: tuple[int, int]
    record: dict[str, Any]

    @classmethod
    def of(cls, key: str) -> Case:
        _, name, *variants = key.split("/")
        layer = BY_NAME[name]
        batched = "batched" in variants
        layout = MoeLayout.cutedsl_batched() if batched else MoeLayout.cutedsl(gated=layer.gated)
        size, rank = (variants[-1].removeprefix("tp").split("-rank")) if variants[-1:] > ["tp"] else (1, 0)
        return cls(layer, layout, (int(size), int(rank)), recorded()[key])

    @property
    def dims(self) -> MoeDims:
        return MoeDims(self.layer.experts, self.layer.intermediate, self.layer.hidden)


def source(layer: SyntheticLayer, expert: int, projection: str, leaf: str, tp: tuple[int, int]) -> torch.Tensor:
    """One projection's bytes, the rank's share of I already cut out."""
    made = layer.tensor(expert, projection, leaf)
    matrix = torch.frombuffer(bytearray(made.data), dtype=torch.uint8).reshape(made.shape)
    return matrix.chunk(tp[0], dim=1 if projection == "down_proj" else 0)[tp[1]].contiguous()


def prepared(case: Case, tensor: PreparedTensor, tp: tuple[int, int]) -> torch.Tensor:
    """All experts of one prepared tensor, made from the share ``tp`` of the source."""
    layer = case.layer
    names = [f"{projection}_proj" for projection in case.layout.projections(tensor)]
    leaf = LEAF[tensor.is_scale]
    return torch.stack(
        [case.layout.apply(tensor, *(source(layer, e, name, leaf, tp) for name in names)) for e in range(layer.experts)]
    )


def assert_recorded(made: torch.Tensor, expected: dict[str, Any]) -> None:
    assert list(made.shape) == expected["shape"]
    assert hashlib.sha256(made.contiguous().numpy().tobytes()).hexdigest() == expected["sha256"]


def floats(layer: SyntheticLayer, projections: list[str], leaf: str) -> list[list[float]]:
    return [
        [struct.unpack("<f", layer.tensor(expert, name, leaf).data)[0] for name in projections]
        for expert in range(layer.experts)
    ]


@pytest.mark.parametrize("key", KEYS)
def test_prepared_bytes_equal_vllms(key: str) -> None:
    case = Case.of(key)
    for tensor in PreparedTensor:
        assert_recorded(prepared(case, tensor, case.tp), case.record["tensors"][tensor.value])
    assert case.record["padded_hidden"] == case.layout.padded_hidden(case.dims.hidden)
    share = case.dims.intermediate // case.tp[0]
    assert case.record["padded_intermediate"] == case.layout.padded_intermediate(share)


@pytest.mark.parametrize("key", [key for key in KEYS if "/tp" in key])
def test_share_of_the_prepared_whole_equals_vllms_preparation_of_the_share(key: str) -> None:
    """Where a layout claims to serve a size, a cut of the prepared whole is what vLLM makes of the rank's share."""
    case = Case.of(key)
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
    case = Case.of(key)
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
