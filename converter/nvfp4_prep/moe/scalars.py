"""The per-expert scalars of a layer: what they mean, and the float32 vectors that the kernel gets."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from nvfp4_prep.errors import UnsupportedCheckpointError
from nvfp4_prep.formats import Leaf, QuantFormat, formats
from nvfp4_prep.moe.layers import MoeLayer
from nvfp4_prep.options import GateUpPolicy
from nvfp4_prep_kernels import UP_SCALE_VECTOR, MoeLayout, Projection

__all__ = ["LayerScalars", "expert_scale_vectors", "interpret_scalars", "known_format"]


@dataclass(frozen=True)
class LayerScalars:
    """The scalars of one layer.

    Attributes:
        raw: source bytes of each scalar group by :attr:`TensorGroup.key`, little-endian, one float32 an expert (one in
            all where shared).
        gate_scale_2, up_scale_2, w2_scale_2: global scales as multipliers, one an expert; ``gate_scale_2`` is ``None``
            for experts without gate.
        w13_input_scale, w2_input_scale: multipliers, the maximum over the layer.
    """

    raw: Mapping[str, bytes]
    gate_scale_2: tuple[float, ...] | None
    up_scale_2: tuple[float, ...]
    w2_scale_2: tuple[float, ...]
    w13_input_scale: float
    w2_input_scale: float

    @property
    def differing(self) -> tuple[int, ...]:
        """Experts whose gate and up projections have different global scales."""
        if self.gate_scale_2 is None:
            return ()
        pairs = zip(self.gate_scale_2, self.up_scale_2, strict=True)
        return tuple(expert for expert, (gate, up) in enumerate(pairs) if gate != up)

    @property
    def worst_ratio(self) -> float:
        """Largest ratio of an expert's two scales, the larger to the smaller; pairs with a 0 have none."""
        pairs = zip(self.gate_scale_2 or (), self.up_scale_2, strict=self.gate_scale_2 is not None)
        return max((max(pair) / min(pair) for pair in pairs if min(pair) > 0), default=1.0)


def known_format(layer: MoeLayer) -> QuantFormat:
    """Return the format of a layer, which a prepared checkpoint has by name.

    Raises:
        UnsupportedCheckpointError: if the package that provides it is not installed.
    """
    try:
        return formats()[layer.format]
    except KeyError:
        raise UnsupportedCheckpointError(
            f"is in the quantization format {layer.format!r}, which is not known here",
            where=layer.experts_path,
            expected=" or ".join(formats()),
            next_step="Install the package that provides it (docs/adding-a-format.md).",
        ) from None


def _multipliers(layer: MoeLayer, raw: Mapping[str, bytes], leaf: Leaf, projection: Projection) -> torch.Tensor | None:
    """Return the multipliers ``float32 [E]`` of one scalar leaf; ``None`` where the layer has none.

    Reciprocal formats are inverted in float32 before anything else is done with the values.
    """
    groups = layer.groups_of(leaf, (projection,))
    if not groups:
        return None
    group = groups[0]
    stored = torch.frombuffer(bytearray(raw[group.key]), dtype=torch.float32)
    if group.scalars_per_expert > 1:
        stored = stored.view(-1, group.scalars_per_expert)[:, group.projections.index(projection)].contiguous()
    format_ = known_format(layer)
    convert = format_.global_scale_multiplier if leaf is Leaf.GLOBAL_SCALE else format_.input_scale_multiplier
    return convert(stored).expand(layer.dims.experts) if stored.numel() == 1 else convert(stored)


def expert_scale_vectors(
    layer: MoeLayer, layout: MoeLayout, policy: GateUpPolicy, scalars: LayerScalars, sides: Mapping[int, str]
) -> dict[str, bytes]:
    """Return the float32 ``[E]`` vectors of a prepared layer, by prepared name.

    Args:
        layer: the layer.
        layout: of the prepared side; names the vectors.
        policy: where gate and up have different scales; ``vllm`` takes gate's for both.
        scalars: the layer's scalars.
        sides: for each reconciled expert the side (``gate`` or ``up``) whose block scales changed; the other side's
            global scale is the common one. Where nothing was reconciled, gate's scale is taken, as vLLM does; where
            the layout has a vector for up's, that one is up's own.
    """
    experts = layer.dims.experts
    gate = scalars.gate_scale_2 or scalars.up_scale_2
    vectors = {
        "w13_weight_scale_2": [
            scalars.up_scale_2[expert] if sides.get(expert) == "gate" else gate[expert] for expert in range(experts)
        ],
        "w2_weight_scale_2": list(scalars.w2_scale_2),
        "w13_input_scale": [scalars.w13_input_scale] * experts,
        "w2_input_scale": [scalars.w2_input_scale] * experts,
        UP_SCALE_VECTOR: list(gate if policy is GateUpPolicy.VLLM else scalars.up_scale_2),
    }
    return {layer.prepared_name(name): _float32_bytes(vectors[name]) for name in layout.scale_vectors}


def _float32_bytes(values: Sequence[float]) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def interpret_scalars(layer: MoeLayer, raw: Mapping[str, bytes]) -> LayerScalars:
    """Return the multipliers of a layer from the source's scalars.

    Raises:
        UnsupportedCheckpointError: if a scale is negative, infinite or not a number, or all input scales of a layer
            are 0.
    """

    def values(leaf: Leaf, projection: Projection) -> torch.Tensor:
        found = _multipliers(layer, raw, leaf, projection)
        if found is None:
            raise UnsupportedCheckpointError(f"no {leaf.value} of {projection.value}", where=layer.experts_path)
        bad = ~(found.isfinite() & (found >= 0))
        if bool(bad.any()):
            expert = int(bad.nonzero()[0])
            raise UnsupportedCheckpointError(
                f"{leaf.value} of the {projection.value} projection of expert {expert} is not a usable scale",
                where=layer.experts_path,
                expected="a finite number, not negative",
                actual=float(found[expert]),
                next_step="The quantizer wrote a broken checkpoint: quantize again.",
            )
        return found

    def input_scale(*projections: Projection) -> float:
        largest = float(torch.stack([values(Leaf.INPUT_SCALE, projection) for projection in projections]).max())
        if largest == 0.0:
            raise UnsupportedCheckpointError(
                f"all input scales of the {'/'.join(projections)} projections are 0",
                where=layer.experts_path,
                next_step="The model was quantized without calibration data: calibrate and quantize again.",
            )
        return largest

    w13 = (Projection.GATE, Projection.UP) if layer.gated else (Projection.UP,)
    gate = tuple(values(Leaf.GLOBAL_SCALE, Projection.GATE).tolist()) if layer.gated else None
    return LayerScalars(
        raw=raw,
        gate_scale_2=gate,
        up_scale_2=tuple(values(Leaf.GLOBAL_SCALE, Projection.UP).tolist()),
        w2_scale_2=tuple(values(Leaf.GLOBAL_SCALE, Projection.DOWN).tolist()),
        w13_input_scale=input_scale(*w13),
        w2_input_scale=input_scale(Projection.DOWN),
    )
