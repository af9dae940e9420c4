"""Plain additions to a layer's weight and bias, made while it runs: the layer itself is never changed."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from .weights import Offset


class OffsetHook:
    """Adds ``strength`` times what a layer would give with the offset for its weight and bias.

    Linear layers, convolutions and norms are linear in weight and bias, so the sum is the layer with both added.

    Args:
        layer: Any of these.
        offset: In the shapes of its parameters.
    """

    def __init__(self, layer: nn.Module, offset: Offset) -> None:
        self.strength, self._offset, self._running = 0.0, offset, False
        self._handle = layer.register_forward_hook(self._add, with_kwargs=True)

    def remove(self) -> None:
        """Take the hook out of the layer."""
        self._handle.remove()

    def _add(self, layer: nn.Module, inputs: tuple, named: dict, output: Tensor) -> Tensor | None:
        if not self.strength or self._running:  # the call below comes here again
            return None
        weight, bias = self._offset.weight, self._offset.bias
        if isinstance(layer, nn.Linear):  # its own weight may be stored in a type that knows no arithmetic
            x = (inputs[0] if inputs else named["input"]).float()
            weight, bias = (v if v is None else v.to(x) for v in (weight, bias))
            change = bias if weight is None else F.linear(x, weight, bias)
        else:
            given = {"weight": weight, "bias": bias}
            parameters = {name: torch.zeros_like(value) if given.get(name) is None else given[name].to(value)
                          for name, value in layer.named_parameters(recurse=False)}  # fmt: skip
            self._running = True
            try:
                change = functional_call(layer, parameters, inputs, named)
            finally:
                self._running = False
        return (output + self.strength * change).to(output.dtype)
