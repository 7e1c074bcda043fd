"""Loaders of prepared parameters, and the record of what arrived."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from nvfp4_prep.errors import ServingError
from nvfp4_prep.serving.placement import Placement

__all__ = ["PreparedWeights"]


class PreparedWeights:
    """Loaders of one layer's parameters, with the names of those that arrived.

    Attributes:
        placement: the rank's share.
        names: of the layer's tensors.
        arrived: names of tensors loaded since the last :meth:`finish`. A loader that fills parameters by itself adds
            their names.
        in_use: the parameters by name that a kernel reads, in servers that load into others and copy afterwards. What
            a kernel derived from them would not follow a tensor that was loaded over them: that is refused.
    """

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self.names = placement.names
        self.arrived: set[str] = set()
        self.in_use: dict[str, torch.nn.Parameter] = {}

    def loader(self, name: str) -> Callable[..., None]:
        """Return the weight_loader of one parameter.

        It takes the tensor as the file holds it, ``[E, …]``, whatever the rank. Further arguments are those with which
        a server passes a single expert's original tensor, and refused.
        """

        def prepared_weight_loader(
            param: torch.nn.Parameter, loaded_weight: torch.Tensor, *args: Any, **kw: Any
        ) -> None:
            if args or kw:
                raise self.foreign(f"an original tensor for {name}")
            if self.is_running(name, param):
                raise self.running(name)
            self.fill(name, param.data, loaded_weight)
            self.arrived.add(name)

        return prepared_weight_loader

    def is_running(self, name: str, param: torch.nn.Parameter) -> bool:
        """Return whether a kernel reads a parameter, and no update of it is going on."""
        return self.in_use.get(name) is param

    def fill(self, name: str, param: torch.Tensor, stored: torch.Tensor) -> None:
        """Copy the rank's share of a stored tensor into its parameter; servers with other shapes override this."""
        self.placement.fill(name, param, stored)

    def finish(self) -> None:
        """Raise :class:`ServingError` if a tensor did not arrive; else forget what did."""
        missing = [name for name in self.names if name not in self.arrived]
        self.arrived.clear()
        if missing:
            raise ServingError(
                f"{len(missing)} of {len(self.names)} tensors of prepared experts did not arrive: {', '.join(missing)}",
                where=self.placement.layer_name,
                next_step="A file is missing, not in model.safetensors.index.json, or named for another model: run"
                " `nvfp4-prep verify` on the directory.",
            )

    def foreign(self, what: str) -> ServingError:
        """Return the error for a tensor that no prepared layer has."""
        return ServingError(
            f"{what} came for a layer that the stamp says is prepared",
            where=self.placement.layer_name,
            expected=", ".join(self.names),
            next_step="The directory mixes a prepared checkpoint and its source: run `nvfp4-prep verify` on it.",
        )

    def running(self, name: str) -> ServingError:
        """Return the error for a tensor that was to be loaded over one that a kernel reads."""
        return ServingError(
            f"{name} came for a running kernel's parameter, outside of the server's reload",
            where=self.placement.layer_name,
            next_step="Update the whole model by the server's own reload. What is served now may be a mixture of two"
            " checkpoints: reload the former one, or start the server again.",
        )
