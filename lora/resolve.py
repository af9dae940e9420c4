"""LoRAs of different spellings under the names of the network they are for, without that network at hand."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from ..files import WeightFileError
from .guess import family_of, plain_names
from .match import match
from .names import ModuleNames, bare_names
from .weights import LoraFile, MatchedLora

LayerNames = Callable[[str, Collection[str]], Mapping[str, str]]
"""The publisher's name of every layer by ours, of a family of models and the plain names of some of its modules."""


def resolve(loras: Sequence[LoraFile], layer_names: LayerNames) -> tuple[list[MatchedLora], dict[str, str]]:
    """LoRAs under our module names, and the publisher's name of each module.

    Args:
        loras: For one base model.
        layer_names: :func:`..video_models.layer_names.layer_names`.

    Raises:
        WeightFileError: A kind we do not know, or LoRAs of different kinds.
    """
    plain = [set(plain_names(lora.names).values()) for lora in loras]
    families = [family_of(names) for names in plain]
    for lora, family in zip(loras, families, strict=True):
        if family and families[0] and family != families[0]:
            raise WeightFileError(
                f"{loras[0].path.name} is for {families[0]} and {lora.path.name} for {family}; take LoRAs of one model"
            )
    family = next(filter(None, families), "")
    names = dict(layer_names(family, set().union(*plain)))
    spelled = [name for lora in loras for name in lora.names]
    if not names and family and all("." in name for name in spelled):  # their publishers' names are ours
        names = {bare: bare for name in spelled for bare in [min(bare_names(name), key=len)]}
    if not names:
        raise WeightFileError(
            f"{loras[0].path.name} is for a model we cannot name; on the command line give --model its folder"
        )
    finder = ModuleNames(names)
    return [match(lora, names, _shapes(lora, finder)) for lora in loras], names


def _shapes(lora: LoraFile, names: ModuleNames) -> dict[str | None, tuple[int, ...]]:
    """Of each module's weight as the LoRA's own matrices tell it, by our name."""
    shapes = {}
    for name in lora.names:
        module, offset = lora.modules.get(name), lora.offsets.get(name)
        if module is not None:
            shapes[names.find(name)] = module.shape
        else:
            shapes[names.find(name)] = tuple((offset.bias if offset.weight is None else offset.weight).shape)
    return shapes
