"""Names of Wan's transformer: the publisher's, and those of diffusers' class.

The publisher's names are those of ``wan/modules/model.py`` in Wan-Video/Wan2.1 and Wan2.2, which VideoX-Fun's
Fun models share. Its VAEs are in ``wan_vae_keys``, its text and image encoders in ``wan_encoder_keys``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

# The publisher's name -> diffusers' name. A block's modules are named below their block.
_TRANSFORMER = {
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    "patch_embedding": "patch_embedding",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
_TRANSFORMER_BLOCK = {
    "self_attn.q": "attn1.to_q",
    "self_attn.k": "attn1.to_k",
    "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0",
    "self_attn.norm_q": "attn1.norm_q",
    "self_attn.norm_k": "attn1.norm_k",
    "cross_attn.q": "attn2.to_q",
    "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v",
    "cross_attn.o": "attn2.to_out.0",
    "cross_attn.norm_q": "attn2.norm_q",
    "cross_attn.norm_k": "attn2.norm_k",
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    "norm1": "norm1",
    "norm3": "norm2",  # the affine norm before cross attention; the other two have no weights
    "norm2": "norm3",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "modulation": "scale_shift_table",
}
_BLOCK = re.compile(r"(blocks\.\d+\.)(.+)")


def rename(name: str, table: dict[str, str]) -> str | None:
    """``name`` with its longest dotted prefix found in ``table`` replaced; None if there is none."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        known = table.get(".".join(parts[:end]))
        if known is not None:
            return ".".join([known, *parts[end:]])
    return None


def _rename_transformer(name: str, top: dict[str, str], block: dict[str, str]) -> str | None:
    match = _BLOCK.fullmatch(name)
    if match is None:
        return rename(name, top)
    inner = rename(match[2], block)
    return None if inner is None else match[1] + inner


_TRANSFORMER_BACK = {new: old for old, new in _TRANSFORMER.items()}
_TRANSFORMER_BLOCK_BACK = {new: old for old, new in _TRANSFORMER_BLOCK.items()}


def original_module_name(name: str) -> str:
    """The publisher's dotted name of a module (or parameter) of diffusers' ``WanTransformer3DModel``.

    ``blocks.0.attn1.to_out.0`` gives ``blocks.0.self_attn.o``. A name without a counterpart, for example
    ``blocks``, comes back as it is.
    """
    return _rename_transformer(name, _TRANSFORMER_BACK, _TRANSFORMER_BLOCK_BACK) or name


NUMBERED = re.compile(r"(.+?\.)(\d+)\.(.+)")


def convert_transformer(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The publisher's ``WanModel`` tensors under the names of diffusers' ``WanTransformer3DModel``.

    Names without a counterpart stay, so that loading can report them.
    """
    tensors = strip_prefix(tensors)
    return {
        _rename_transformer(name, _TRANSFORMER, _TRANSFORMER_BLOCK) or name: tensor for name, tensor in tensors.items()
    }


def transformer_config(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of diffusers' ``WanTransformer3DModel`` for the publisher's tensors.

    Args:
        tensors: In the publisher's names; every size is read from their shapes.
        config: The publisher's ``config.json``, whose sizes must agree; it adds ``num_heads`` (else heads of
            128 channels) and ``eps``.

    Raises:
        ValueError: The tensors are no Wan transformer we know, or ``config`` contradicts them.
    """
    tensors = strip_prefix(tensors)
    needed = ("patch_embedding", "time_embedding.0", "text_embedding.0", "head.head", "blocks.0.ffn.0")
    lacking = [name for name in needed if f"{name}.weight" not in tensors]
    if lacking:
        raise ValueError(f"no Wan transformer: {lacking[0]}.weight is missing")
    dim, in_dim, *patch = tensors["patch_embedding.weight"].shape
    found = {
        "dim": dim,
        "in_dim": in_dim,
        "ffn_dim": tensors["blocks.0.ffn.0.weight"].shape[0],
        "freq_dim": tensors["time_embedding.0.weight"].shape[1],
        "text_dim": tensors["text_embedding.0.weight"].shape[1],
        "out_dim": tensors["head.head.weight"].shape[0] // math.prod(patch),
        "num_layers": len({name.split(".")[1] for name in tensors if name.startswith("blocks.")}),
    }
    for key, value in found.items():
        if config.get(key, value) != value:
            raise ValueError(
                f"config.json says {key} is {config[key]}, the weights say {value}; they do not belong together"
            )
    if in_dim - found["out_dim"] not in (0, 20):
        raise ValueError(
            f"it takes {in_dim} input channels; supported are text-to-video (in = out, here {found['out_dim']}) "
            "and image-to-video or InP (20 more), not the control variants"
        )
    heads = config.get("num_heads", dim // 128)
    if not isinstance(heads, int) or heads < 1 or dim % heads:
        raise ValueError(f"config.json must give num_heads that divide {dim}, got {heads!r}")
    image = tensors.get("img_emb.proj.0.weight")
    position = tensors.get("img_emb.emb_pos")
    return {
        "patch_size": tuple(patch),
        "num_attention_heads": heads,
        "attention_head_dim": dim // heads,
        "in_channels": in_dim,
        "out_channels": found["out_dim"],
        "text_dim": found["text_dim"],
        "freq_dim": found["freq_dim"],
        "ffn_dim": found["ffn_dim"],
        "num_layers": found["num_layers"],
        "cross_attn_norm": "blocks.0.norm3.weight" in tensors,
        "eps": config.get("eps", 1e-6),
        "image_dim": None if image is None else image.shape[0],
        "added_kv_proj_dim": dim if "blocks.0.cross_attn.k_img.weight" in tensors else None,
        "pos_embed_seq_len": None if position is None else position.shape[1],
    }


def strip_prefix(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Tensors without the name of the module around theirs (``model.``, ``model.diffusion_model.``), if all have it."""
    for prefix in ("model.diffusion_model.", "diffusion_model.", "model."):
        if all(name.startswith(prefix) for name in tensors):
            return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors
