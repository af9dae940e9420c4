"""The module names of the model a LoRA is for, with or without that model at hand."""

from __future__ import annotations

from collections.abc import Sequence

from ..lora.files import LoraFile, MatchedLora, match
from ..lora.network import layer_shapes
from ..lora.resolve import resolve as resolve_by_kind
from ..video_models.layer_names import layer_names, original_name
from .shared import open_model


def resolve(loras: Sequence[LoraFile], model: str = "") -> tuple[list[MatchedLora], dict[str, str]]:
    """LoRAs under the module names of the model they are for, and the publisher's name of each module.

    Args:
        loras: For one base model.
        model: Its folder; empty takes the names of their kind of network.

    Raises:
        WeightFileError: A kind we do not know, or a LoRA for another model.
    """
    if not model:
        return resolve_by_kind(loras, layer_names)
    loaded = open_model(model, text=False)
    expert = next(iter(loaded.denoisers))
    shapes, original = layer_shapes(loaded.denoisers[expert]), original_name(loaded.spec.family)
    names = {name: original(name) for name in shapes} | loaded.lora_names(expert)
    return [match(lora, names, shapes) for lora in loras], names
