"""Names of Wan's modules: the publisher's, and those of the classes in diffusers and transformers.

The publisher's names are those of ``wan/modules/{model,vae,t5,clip}.py`` in Wan-Video/Wan2.1, which
VideoX-Fun's Fun models share.
"""

from __future__ import annotations

import re

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


def _rename(name: str, table: dict[str, str]) -> str | None:
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
        return _rename(name, top)
    inner = _rename(match[2], block)
    return None if inner is None else match[1] + inner


_TRANSFORMER_BACK = {new: old for old, new in _TRANSFORMER.items()}
_TRANSFORMER_BLOCK_BACK = {new: old for old, new in _TRANSFORMER_BLOCK.items()}


def original_module_name(name: str) -> str:
    """The publisher's dotted name of a module (or parameter) of diffusers' ``WanTransformer3DModel``.

    ``blocks.0.attn1.to_out.0`` gives ``blocks.0.self_attn.o``. A name without a counterpart, for example
    ``blocks``, comes back as it is.
    """
    return _rename_transformer(name, _TRANSFORMER_BACK, _TRANSFORMER_BLOCK_BACK) or name
