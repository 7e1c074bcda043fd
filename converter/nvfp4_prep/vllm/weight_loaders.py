"""The ``load_weights`` of prepared layers in vLLM.

Models with a loop over names end in ``param.weight_loader(param, tensor)``; models with AutoWeightsLoader end in
``RoutedExperts.load_weights``, which drops names that it does not know in silence and is therefore replaced on the
layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

from nvfp4_prep.serving.prepared_weights import PreparedWeights

__all__ = ["load_into"]

Weights = Iterable[tuple[str, torch.Tensor]]


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
