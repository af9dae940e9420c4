"""The layers of a family's network by name, read off a tiny one of its class: no weights are needed."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

from . import easyanimate_keys, wan_keys


def original_name(family: str) -> Callable[[str], str]:
    """From the name of a layer in our class to its publisher's.

    Args:
        family: Such as ``wan``; where both agree, or it is none we know, names stay.
    """
    keys = {"wan": wan_keys, "easyanimate": easyanimate_keys}.get(family)
    return keys.original_module_name if keys else str


def layer_names(family: str, plain: Collection[str]) -> dict[str, str]:
    """The publisher's name of every layer that has a weight, by our name; empty for another family.

    Args:
        family: ``Wan``, ``CogVideoX`` or ``EasyAnimate``.
        plain: Names of modules without prefixes and with underscores: they tell how many blocks there are, and
            which variant of the network it is.
    """
    import diffusers

    blocks = 1 + max((int(n) for name in plain for n in re.findall(r"(?<![a-z])blocks_(\d+)_", name)), default=0)
    small = {"num_attention_heads": 1, "attention_head_dim": 24, "num_layers": blocks}
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
    else:
        return {}
    original = original_name(family.lower())
    named = (name for name, module in network.named_modules() if getattr(module, "weight", None) is not None)
    return {name: original(name) for name in named}
