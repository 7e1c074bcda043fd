"""Reading the stamp: what a prepared checkpoint's quantization_config says about its experts and its source."""

from __future__ import annotations

import copy
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from nvfp4_prep.checkpoint.filenames import FORMAT_VERSION
from nvfp4_prep.errors import ServingError
from nvfp4_prep.layouts import LAYOUTS, LayoutName, layout_of_backend
from nvfp4_prep.prepared.manifest_values import sha256, text, whole
from nvfp4_prep.prepared.stamp import QUANT_METHOD
from nvfp4_prep_kernels import MoeLayout
from nvfp4_prep_kernels.fingerprint import fingerprint

__all__ = ["STAMP_KEY", "Stamp", "is_stamped", "stamp_in"]

STAMP_KEY = "nvfp4_prep_stamp"
"""Where the stamp goes once the source's own quantization_config has taken its place in memory."""
_SWIZZLE = "128x4"


@dataclass(frozen=True)
class Stamp:
    """A stamp that this version understands.

    Attributes:
        layout: name of the layout.
        gate_up_block, moe_tp: parameters of the layout.
        hidden_alignment: what the layout of this name pads H to; another one is refused.
        fingerprint: digest of a fixed small layer in this layout.
        source: the original quantization_config.
    """

    layout: LayoutName
    gate_up_block: int
    hidden_alignment: int
    moe_tp: int
    fingerprint: str
    source: Mapping[str, Any]

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> Stamp:
        """Read a stamp.

        Raises:
            ServingError: if it is incomplete or was written by a newer nvfp4-prep.
        """
        version = config.get("format_version")
        if type(version) is not int or version != FORMAT_VERSION:
            raise ServingError(
                "prepared checkpoint in a format that this version of nvfp4-prep does not know",
                where="config.json, quantization_config.format_version",
                expected=FORMAT_VERSION,
                actual=version,
                next_step="Install the version of nvfp4-prep that wrote it (see nvfp4_prep.json), or convert again.",
            )
        try:
            layout, source = config["layout"], config["source"]
            name = layout_of_backend(text(layout["name"], "name"))
            stamp = cls(
                layout=name or LayoutName.CUTEDSL,
                gate_up_block=whole(layout["gate_up_block"], "gate_up_block", 1),
                hidden_alignment=whole(layout["hidden_alignment"], "hidden_alignment", 1),
                moe_tp=whole(layout["moe_tp"], "moe_tp", 1),
                fingerprint=sha256(layout["fingerprint"], "fingerprint"),
                source=copy.deepcopy(dict(source)),
            )
            if not isinstance(stamp.source.get("quant_method", ""), str):
                raise TypeError("the source's quant_method is not a string")
            moe_layout = stamp.moe_layout(gated=True)
            known = name is not None and layout["scale_swizzle"] == _SWIZZLE
            known = known and stamp.hidden_alignment == moe_layout.hidden_alignment
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise ServingError(
                f"stamp is incomplete or damaged ({type(error).__name__}: {error})",
                where="config.json, quantization_config",
                next_step="Run `nvfp4-prep verify` on the directory.",
            ) from error
        if not known:
            raise ServingError(
                "unknown layout in the stamp",
                where="config.json, quantization_config.layout",
                expected=f"name {' or '.join(facts.stamp_name for facts in LAYOUTS.values())},"
                f" hidden_alignment {moe_layout.hidden_alignment}, scale_swizzle {_SWIZZLE}",
                actual=dict(layout),
                next_step="Install the version of nvfp4-prep that wrote the checkpoint.",
            )
        return stamp

    @property
    def layout_name(self) -> str:
        """The layout's name in the stamp."""
        return LAYOUTS[self.layout].stamp_name

    @property
    def batched(self) -> bool:
        """Whether the file is for the batched kernel."""
        return self.layout is LayoutName.CUTEDSL_BATCHED

    def moe_layout(self, *, gated: bool) -> MoeLayout:
        """Return the layout of a layer in this checkpoint.

        Raises:
            LayoutError: if the stamp's parameters make no layout.
        """
        return MoeLayout.named(self.layout, gated=gated, gate_up_block=self.gate_up_block, moe_tp=self.moe_tp)

    def check_fingerprint(self, *, gated: bool) -> None:
        """Raise :class:`ServingError` unless our layout of this name gives the bytes that the writer's gave."""
        own = fingerprint(self.moe_layout(gated=gated))
        if self.fingerprint == own:
            return
        raise ServingError(
            "layout fingerprint does not match: the checkpoint was written with another layout than its name says",
            where="config.json, quantization_config.layout.fingerprint",
            expected=own,
            actual=self.fingerprint,
            next_step="Install the version of nvfp4-prep that wrote it (see nvfp4_prep.json), or convert again.",
        )


def is_stamped(config: Any) -> TypeGuard[MutableMapping[str, Any]]:
    """Return whether this is a ``quantization_config`` with a stamp that was not yet replaced."""
    return isinstance(config, MutableMapping) and config.get("quant_method") == QUANT_METHOD


def stamp_in(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the stamp in a ``config.json`` as it is on disk: the model's, or its language model's."""
    for holder in (config, config.get("text_config")):
        found = holder.get("quantization_config") if isinstance(holder, Mapping) else None
        if is_stamped(found):
            return found
    return None
