"""The module names of the model a LoRA is for, with or without that model at hand."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from ..files import WeightFileError
from ..lora.files import LoraFile, MatchedLora, match
from ..lora.guess import family_of, plain_names
from ..lora.names import ModuleNames, bare_names
from ..lora.network import layer_shapes
from ..video_models import easyanimate_keys, wan_keys
from .shared import open_model


def resolve(loras: Sequence[LoraFile], model: str = "") -> tuple[list[MatchedLora], dict[str, str]]:
    """LoRAs under the module names of the model they are for, and the publisher's name of each module.

    Args:
        loras: For one base model.
        model: Its folder; empty builds a network of their kind without weights, for its names alone.

    Raises:
        WeightFileError: A kind we do not know, or a LoRA for another model.
    """
    if model:
        loaded = open_model(model, text=False)
        expert = next(iter(loaded.denoisers))
        shapes, original = layer_shapes(loaded.denoisers[expert]), _original_name(loaded.spec.family)
        names = {name: original(name) for name in shapes} | loaded.lora_names(expert)
        return [match(lora, names, shapes) for lora in loras], names
    names = _network_names(loras)
    finder, matched = ModuleNames(names), []
    for lora in loras:
        shapes = {}
        for name in lora.names:
            module, offset = lora.modules.get(name), lora.offsets.get(name)
            if module is not None:
                shapes[finder.find(name)] = (module.up.shape[0], module.down.shape[1])
            else:
                shapes[finder.find(name)] = tuple((offset.bias if offset.weight is None else offset.weight).shape)
        matched.append(match(lora, names, shapes))
    return matched, names


def _network_names(loras: Sequence[LoraFile]) -> dict[str, str]:
    """The publisher's name of every layer, by our name, read off a tiny network of the class the LoRAs are for."""
    import diffusers

    spelled = [name for lora in loras for name in lora.names]
    plain = set(plain_names(spelled).values())
    blocks = 1 + max((int(n) for name in plain for n in re.findall(r"(?<![a-z])blocks_(\d+)_", name)), default=0)
    small = {"num_attention_heads": 1, "attention_head_dim": 24, "num_layers": blocks}
    family = family_of(plain)
    if family == "Wan":
        network = diffusers.WanTransformer3DModel(
            **small, text_dim=4, freq_dim=4, ffn_dim=4, image_dim=4, added_kv_proj_dim=24
        )
    elif family == "CogVideoX":
        patch = {"patch_size_t": 2} if "patch_embed_proj" in plain else {}
        network = diffusers.CogVideoXTransformer3DModel(
            **small, time_embed_dim=4, text_embed_dim=4, use_rotary_positional_embeddings=True, **patch
        )
    elif family == "EasyAnimate":
        network = diffusers.EasyAnimateTransformer3DModel(
            **small, mmdit_layers=blocks, in_channels=4, out_channels=4, patch_size=2, time_embed_dim=4,
            text_embed_dim=4, text_embed_dim_t5=4, add_norm_text_encoder="text_proj_1" in plain,
        )  # fmt: skip
    elif family and all("." in name for name in spelled):  # their publishers' names are ours
        return {bare: bare for name in spelled for bare in [min(bare_names(name), key=len)]}
    else:
        raise WeightFileError(f"{loras[0].path.name} is for a model we cannot name; give --model its folder")
    original = _original_name(family.lower())
    named = (name for name, module in network.named_modules() if getattr(module, "weight", None) is not None)
    return {name: original(name) for name in named}


def _original_name(family: str) -> Callable[[str], str]:
    """From the name of a layer in our class to its publisher's."""
    keys = {"wan": wan_keys, "easyanimate": easyanimate_keys}.get(family)
    return keys.original_module_name if keys else str
