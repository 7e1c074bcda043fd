"""Prepared checkpoints of random bytes for the loader's tests, written by the official safetensors library."""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from nvfp4_prep.checkpoint.filenames import CONFIG, MANIFEST
from nvfp4_prep.formats import Leaf
from nvfp4_prep.moe.activation import Activation, ActivationKind
from nvfp4_prep.moe.layers import MoeLayer, TensorGroup
from nvfp4_prep.options import ConvertOptions, LayoutName
from nvfp4_prep.prepared.manifest import FileRecord, GateUpRecord, LayerRecord, Manifest
from nvfp4_prep_kernels import SCALE_VECTORS, MoeDims, MoeLayout, PreparedTensor, Projection


@dataclass(frozen=True)
class Written:
    """A checkpoint on disk and what is in it: layer number to short name to whole tensor."""

    root: Path
    manifest: Manifest
    layout: MoeLayout
    dims: MoeDims
    tensors: dict[int, dict[str, torch.Tensor]]

    def file(self, layer: int) -> Path:
        return self.root / f"experts-layer-{layer:05d}.safetensors"


def write_checkpoint(
    root: Path,
    dims: MoeDims,
    *,
    gated: bool = True,
    options: ConvertOptions | None = None,
    layers: tuple[int, ...] = (1,),
    seed: int = 0,
) -> Written:
    """Random bytes in the shapes that the layout asks for, expert files, scale vectors, manifest, empty config."""
    options = options or ConvertOptions()
    layout = options.layout_for(gated=gated)
    generator = torch.Generator().manual_seed(seed)
    files: dict[str, FileRecord] = {}
    records, everything, vectors = [], {}, {}
    for number in layers:
        path = f"model.layers.{number}.mlp.experts"
        layer = MoeLayer(path, number, dims, gated, "modelopt", "per-expert", _groups(path, dims, gated))
        digests = {group.key: "0" * 64 for group in layer.groups}
        big, crc32 = {}, {}
        for tensor in PreparedTensor:
            shape = (dims.experts, *layout.expert_shape(tensor, dims))
            data = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
            crc32[tensor.value] = tuple(zlib.crc32(expert.numpy().tobytes()) for expert in data)
            big[tensor.value] = data.view(torch.float8_e4m3fn) if tensor.is_scale else data
        small = {name: torch.rand(dims.experts, generator=generator) for name in SCALE_VECTORS}
        name = f"experts-layer-{number:05d}.safetensors"
        save_file({layer.prepared_name(short): tensor for short, tensor in big.items()}, root / name)
        files[name] = _record(root / name, "experts")
        vectors.update({layer.prepared_name(short): tensor for short, tensor in small.items()})
        activation = Activation(ActivationKind.SILU if gated else ActivationKind.RELU2, "silu", None)
        records.append(LayerRecord(layer, layout, activation, (name,), GateUpRecord(0, 1.0, (), {}), digests, crc32))
        everything[number] = {**big, **small}
    save_file(vectors, root / "expert-scales.safetensors")
    files["expert-scales.safetensors"] = _record(root / "expert-scales.safetensors", "expert-scales")
    manifest = Manifest("0", options, "test", None, {}, {}, tuple(records), {}, files, ())
    (root / MANIFEST).write_bytes(manifest.to_bytes())
    (root / CONFIG).write_text("{}")
    return Written(root, manifest, layout, dims, everything)


def _groups(path: str, dims: MoeDims, gated: bool) -> tuple[TensorGroup, ...]:
    """What a source in ModelOpt's format would have held."""
    groups = []
    for projection in Projection if gated else (Projection.UP, Projection.DOWN):
        rows, cols = dims.intermediate, dims.hidden
        if projection is Projection.DOWN:
            rows, cols = cols, rows
        for leaf, name, dtype, shape in (
            (Leaf.CODES, "weight", "U8", (rows, cols // 2)),
            (Leaf.BLOCK_SCALE, "weight_scale", "F8_E4M3", (rows, cols // 16)),
            (Leaf.GLOBAL_SCALE, "weight_scale_2", "F32", ()),
            (Leaf.INPUT_SCALE, "input_scale", "F32", ()),
        ):
            groups.append(TensorGroup(f"{path}.", f".{projection}_proj.{name}", leaf, (projection,), dtype, shape))
    return tuple(groups)


def _record(path: Path, kind: str) -> FileRecord:
    raw = path.read_bytes()
    return FileRecord(len(raw), hashlib.sha256(raw).hexdigest(), kind)


BATCHED = ConvertOptions(layout=LayoutName.CUTEDSL_BATCHED)
