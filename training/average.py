"""The moving average of what is trained, which learns slower and wavers less."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """Exponential moving average of parameters.

    Args:
        parameters: By name; where they lie, the averages lie.
        decay: What stays of the average at an update; 0 keeps no average, and nothing here does anything.

    Attributes:
        values: The averages by name; at first the parameters as they are.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self._parameters, self._decay = parameters if decay else {}, decay
        self.values: dict[str, Tensor] = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """After so many updates, counted from 0: a young average forgets faster, ``min(decay, (1 + n) / (10 + n))``,
        as TensorFlow's ``ExponentialMovingAverage``."""
        decay = min(self._decay, (1 + updates) / (10 + updates))
        for name, parameter in self._parameters.items():
            self.values[name].lerp_(parameter, 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the parameters are their averages; after it they are, bit for bit, what they were."""
        kept = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._fill(self.values)
        try:
            yield
        finally:
            self._fill(kept)

    @torch.no_grad()
    def _fill(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])
