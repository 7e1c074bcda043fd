"""The loaders of prepared layers in vLLM.

Models with a loop over names end in ``param.weight_loader(param, tensor)``; models with AutoWeightsLoader end in
``RoutedExperts.load_weights``, which drops names that it does not know in silence and is therefore replaced on the
layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

from nvfp4_prep.errors import ServingError
from nvfp4_prep.serving.prepared_weights import PreparedWeights
from nvfp4_prep.vllm.compat import is_placeholder

__all__ = ["LayerWeights", "load_into"]

Weights = Iterable[tuple[str, torch.Tensor]]


class LayerWeights(PreparedWeights):
    """Loaders that refuse tensors without bytes: what is copied later would pass by the check that all arrived."""

    def fill(self, name: str, param: torch.Tensor, stored: torch.Tensor) -> None:
        """Copy the rank's share of a stored tensor into its parameter.

        Raises:
            ServingError: if the tensor is a placeholder of the transfer engine ``sharded_rdt``.
        """
        if is_placeholder(stored):
            raise ServingError(
                f"the transfer engine sharded_rdt cannot load prepared experts: {name} came as a placeholder",
                where=self.placement.layer_name,
                next_step="Start the server again, because vLLM has taken its parameters apart, and send only the other"
                " tensors by sharded_rdt, or all by nccl or ipc.",
            )
        super().fill(name, param, stored)


def load_into(layer: torch.nn.Module, prepared: PreparedWeights) -> Callable[[Weights], Iterator[str]]:
    """Return the ``load_weights`` of one layer; it yields the names of the parameters that it filled."""

    def load_weights(weights: Weights) -> Iterator[str]:
        for full_name, tensor in weights:
            name = full_name.removeprefix("routed_experts.")
            if name not in prepared.names:
                raise prepared.foreign(repr(full_name))
            param = getattr(layer, name)
            param.weight_loader(param, tensor)
            yield name

    return load_weights
