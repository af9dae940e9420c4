"""Names and sizes of EasyAnimate's transformer: the publisher's, and those of diffusers' class.

The publisher's names are those of ``easyanimate/models/transformer3d.py`` in aigc-apps/EasyAnimate. There the text
of a block has an attention module of its own, ``attn2``; diffusers keeps it inside ``attn1``. All other names agree.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

_TEXT_ATTENTION = {
    "to_q": "add_q_proj",
    "to_k": "add_k_proj",
    "to_v": "add_v_proj",
    "to_out.0": "to_add_out",
    "norm_q": "norm_added_q",
    "norm_k": "norm_added_k",
}
_BACK = {new: old for old, new in _TEXT_ATTENTION.items()}
_ATTENTION = re.compile(r"(.+\.)attn([12])\.(to_out\.0|\w+)(.*)")


def convert_transformer(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The publisher's tensors under the names of diffusers' ``EasyAnimateTransformer3DModel``; its own stay."""

    def rename(name: str) -> str:
        match = _ATTENTION.fullmatch(name)
        if match is None or match[2] != "2" or match[3] not in _TEXT_ATTENTION:
            return name
        return f"{match[1]}attn1.{_TEXT_ATTENTION[match[3]]}{match[4]}"

    return {rename(name): tensor for name, tensor in tensors.items()}


def original_module_name(name: str) -> str:
    """The publisher's dotted name of a module of diffusers' class.

    ``transformer_blocks.0.attn1.add_q_proj`` gives ``transformer_blocks.0.attn2.to_q``.
    """
    match = _ATTENTION.fullmatch(name)
    if match is None or match[3] not in _BACK:
        return name
    return f"{match[1]}attn2.{_BACK[match[3]]}{match[4]}"


def transformer_config(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of diffusers' ``EasyAnimateTransformer3DModel``.

    Args:
        tensors: In either spelling; every size is read from their shapes.
        config: The publisher's or diffusers' ``config.json``, whose sizes must agree. Defaults of its other
            entries are the publisher's, which differ from diffusers'.

    Raises:
        ValueError: The tensors are no EasyAnimate V5 or V5.1 transformer, or ``config`` contradicts them.
    """
    block = "transformer_blocks.0."
    normed = "text_proj.1.weight" in tensors
    text, text_t5 = (f"{name}{'.1' if normed else ''}.weight" for name in ("text_proj", "text_proj_t5"))
    query = f"{block}attn1.norm_q.weight"
    needed = ("proj.weight", "proj_out.weight", "time_embedding.linear_1.weight", text, query)
    lacking = [name for name in needed if name not in tensors]
    if lacking:
        raise ValueError(f"no EasyAnimate V5 transformer: {lacking[0]} is missing")
    inner, channels, patch, _ = tensors["proj.weight"].shape
    head = len(tensors[query])
    if inner % head:
        raise ValueError(f"heads of {head} channels do not divide {inner}; the weights are damaged")
    blocks = {name.split(".")[1] for name in tensors if name.startswith("transformer_blocks.")}
    own_text = {name.split(".")[1] for name in tensors if ".txt_ff." in name}
    found = {
        "num_attention_heads": inner // head,
        "attention_head_dim": head,
        "in_channels": channels,
        "out_channels": len(tensors["proj_out.weight"]) // patch**2,
        "patch_size": patch,
        "num_layers": len(blocks),
        "time_embed_dim": len(tensors["time_embedding.linear_1.weight"]),
        "text_embed_dim": tensors[text].shape[1],
    }
    for key, value in found.items():
        if config.get(key, value) != value:
            raise ValueError(
                f"config.json says {key} is {config[key]}, the weights say {value}; they do not belong together"
            )
    out = found["out_channels"]
    if channels not in (out, 2 * out + 1):
        raise ValueError(
            f"it takes {channels} input channels; supported are text-to-video ({out}) and InP ({2 * out + 1}), "
            "not the control variants"
        )
    return {
        **found,
        "mmdit_layers": len(own_text),
        "text_embed_dim_t5": tensors[text_t5].shape[1] if text_t5 in tensors else None,
        "add_norm_text_encoder": normed,
        "after_norm": f"{block}norm3.weight" in tensors,
        "norm_elementwise_affine": f"{block}norm1.norm.weight" in tensors,
        "norm_eps": config.get("norm_eps", 1e-5),
        "activation_fn": config.get("activation_fn", "gelu-approximate"),
        "timestep_activation_fn": config.get("timestep_activation_fn", "silu"),
        "flip_sin_to_cos": config.get("flip_sin_to_cos", True),
        "freq_shift": config.get("freq_shift", 0),
        "add_noise_in_inpaint_model": config.get("add_noise_in_inpaint_model", False),
    }
