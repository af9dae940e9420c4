"""A LoRA file against a real model: which of its modules are there, and do they fit?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..files import WeightFileError
from .guess import cogvideox_version, guess_base
from .names import ModuleNames
from .network import layer_names, layer_shapes
from .weights import LoraFile, LoraModule, MatchedLora, Offset


def fit(file: LoraFile, model, expert: str) -> MatchedLora:
    """:func:`match` against a network of a video model (anything with ``denoisers`` and ``lora_names``)."""
    linear, network = model.lora_names(expert), model.denoisers[expert]
    matched = match(file, layer_names(network, linear), layer_shapes(network))
    mine, theirs = cogvideox_version(linear), cogvideox_version(file.names)
    if mine != theirs and mine and theirs:
        raise WeightFileError(
            f"{file.path.name} was made for CogVideoX {theirs}, and {model.spec.name} is {mine}: the names agree, but "
            f"the networks do not; use a LoRA made for this model"
        )
    return matched


def match(file: LoraFile, original_names: Mapping[str, str], shapes: Mapping[str, Sequence[int]]) -> MatchedLora:
    """Resolve a file's modules against a model.

    Args:
        file: What :func:`read_lora` returned.
        original_names: The publisher's name of each LoRA-capable module, by our name.
        shapes: Of each module's weight, by our name: ``(out, in)`` for a linear layer. A module without an entry
            counts as not there.

    Raises:
        WeightFileError: No module matches, one matches twice, or one has other sizes: the LoRA was made for
            another model.
    """
    names = ModuleNames({ours: original for ours, original in original_names.items() if ours in shapes})
    modules: dict[str, LoraModule] = {}
    offsets: dict[str, Offset] = {}
    unmatched = []
    spelling: dict[str, str] = {}
    for spelled in file.names:
        ours = names.find(spelled)
        if ours is None:
            unmatched.append(spelled)
            continue
        if ours in spelling:
            raise WeightFileError(
                f"{file.path.name} speaks twice of one module, as {spelling[ours]} and as {spelled}; get a sound file"
            )
        spelling[ours] = spelled
        shape, offset = tuple(shapes[ours]), file.offsets.get(spelled, Offset())
        if offset.weight is not None:
            _same(file, f"{spelled}.diff", tuple(offset.weight.shape), shape)
        if offset.bias is not None:
            _same(file, f"{spelled}.diff_b", tuple(offset.bias.shape), shape[:1])
        if spelled in file.modules:
            module = file.modules[spelled]
            given = module.shape
            _same(file, spelled, given, (shape[0], math.prod(shape[1:])) if len(shape) > 1 else shape)
            if len(shape) == 2:
                modules[ours] = module
            else:  # a convolution: its weights are few, so the product is added as it is
                delta = module.delta().reshape(shape)
                offset = replace(offset, weight=delta if offset.weight is None else delta + offset.weight.float())
        if offset.weight is not None or offset.bias is not None:
            offsets[ours] = offset
    if not spelling:
        raise WeightFileError(
            f"{file.path.name} was made for another model: none of its {len(file.names)} modules is in this one "
            f"(the first is {unmatched[0]}){_made_for(file)}"
        )
    return MatchedLora(modules, tuple(unmatched), file.path.name, offsets)


def _same(file: LoraFile, what: str, given: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if given != expected:
        sizes = ["x".join(map(str, size)) for size in (given, expected)]
        raise WeightFileError(
            f"{file.path.name} was made for another model: {what} is {sizes[0]} in it and {sizes[1]} here"
            + _made_for(file)
        )


def _made_for(file: LoraFile) -> str:
    guess = guess_base(file)
    return f"; it seems to be for {guess.base} ({guess.reason})" if guess.base else ""
