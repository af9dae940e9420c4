"""A causal decoder as a row of stations, each a pure function of its input and of what it carried from its last call.

The libraries keep what causal convolutions carry inside their modules, so that a clip can only be decoded in one
graph. As stations, a decoder takes and gives it: one chunk of the clip can be repeated alone, with its exact gradient,
and a station can be checkpointed without meeting the state of another call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .protocol import Carried

Station = Callable[..., tuple]
"""``(x, *carried) -> (x, *carried)``; at the first chunk nothing is carried."""


def pass_through(
    stations: Sequence[Station],
    x: Tensor,
    carried: Carried,
    context: Callable[[], AbstractContextManager],
    save_memory: bool,
) -> tuple[Tensor, Carried]:
    """Run a chunk through all stations.

    Args:
        stations: In order.
        x: What the first gets.
        carried: What the call before returned; empty at the first chunk.
        context: Makes the context in which a station runs.
        save_memory: Keep each station's input alone for the backward pass, and compute the rest again.
    """
    lengths, before = (carried[0], list(carried[1:])) if carried else ([0] * len(stations), [])
    new_lengths, after = [], []
    for station, length in zip(stations, lengths, strict=True):
        mine, before = before[:length], before[length:]
        if save_memory and torch.is_grad_enabled():
            x, *new = checkpoint(station, x, *mine, use_reentrant=False, context_fn=lambda: (context(), context()))
        else:
            with context():
                x, *new = station(x, *mine)
        new_lengths.append(len(new))
        after += new
    return x, (tuple(new_lengths), *after)


def remembering(block: nn.Module, attribute: str) -> Station:
    """A block whose modules keep in ``attribute`` what they carry, None at the first chunk.

    Convolutions look at it; anything else only asks whether it is there, and carries a mark.
    """
    keepers = [module for module in block.modules() if hasattr(module, attribute)]

    def run(x: Tensor, *before: Any) -> tuple:
        try:
            for keeper, value in zip(keepers, before or [None] * len(keepers), strict=True):
                setattr(keeper, attribute, value)
            x = block(x)
            kept = [getattr(keeper, attribute) for keeper in keepers]
            marks = [True if value is not None else None for value in kept]
            pairs = zip(keepers, kept, marks, strict=True)
            return (x, *(value if isinstance(keeper, nn.Conv3d) else mark for keeper, value, mark in pairs))
        finally:
            for keeper in keepers:
                setattr(keeper, attribute, None)

    return run


def with_tree(block: Callable[[Tensor, Any], tuple[Tensor, Any]]) -> Station:
    """A block that takes and gives nested dictionaries of what it carries, None at the first chunk."""

    def run(x: Tensor, *before: Any) -> tuple:
        x, tree = block(x, _unfold(before[0], before[1:]) if before else None)
        leaves = list(_leaves(tree, ()))
        return (x, tuple(path for path, _ in leaves), *(leaf for _, leaf in leaves))

    return run


def _leaves(tree: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    if isinstance(tree, Tensor):
        yield path, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, (*path, key))


def _unfold(paths: Sequence[tuple[str, ...]], leaves: Sequence[Tensor]) -> Any:
    tree: dict[str, Any] = {}
    for path, leaf in zip(paths, leaves, strict=True):
        if not path:
            return leaf
        place = tree
        for key in path[:-1]:
            place = place.setdefault(key, {})
        place[path[-1]] = leaf
    return tree
