"""Names of Wan's text and image encoders: the publisher's, and those of transformers' classes.

The publisher's names are those of ``wan/modules/{t5,clip}.py`` in Wan-Video/Wan2.1. ComfyUI's files have transformers'.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .files import count_numbered
from .wan_keys import NUMBERED, rename, strip_prefix

# The publisher's name -> transformers' name, below a block, and outside of the blocks.
_UMT5_BLOCK = {
    "norm1": "layer.0.layer_norm",
    "attn": "layer.0.SelfAttention",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}
_UMT5 = {"token_embedding": "shared", "norm": "encoder.final_layer_norm"}
_CLIP_LAYER = {
    "norm1": "layer_norm1",
    "attn.proj": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
}
_CLIP = {
    "patch_embedding": "embeddings.patch_embedding",
    "pre_norm": "pre_layrnorm",  # transformers spells it so
    "post_norm": "post_layernorm",
}


def convert_umt5(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The publisher's (or ComfyUI's) UMT5 encoder as transformers' ``UMT5EncoderModel``; a tokenizer inside goes."""
    converted = {}
    for name, tensor in tensors.items():
        match = NUMBERED.fullmatch(name)
        if match and match[1] == "blocks.":
            converted[f"encoder.block.{match[2]}.{rename(match[3], _UMT5_BLOCK) or match[3]}"] = tensor
        elif name != "spiece_model":
            converted[rename(name, _UMT5) or name] = tensor
    return converted


def umt5_config(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of ``UMT5Config``, read from the tensors.

    Raises:
        ValueError: The tensors are no UMT5 encoder.
    """
    tensors, layer = convert_umt5(tensors), "encoder.block.0.layer."
    names = ("shared", f"{layer}0.SelfAttention.relative_attention_bias", f"{layer}0.SelfAttention.q")
    names += (f"{layer}1.DenseReluDense.wi_1",)
    lacking = [name for name in names if f"{name}.weight" not in tensors]
    if lacking:
        raise ValueError(f"no UMT5 encoder: {lacking[0]}.weight is missing")
    embedding, position, query, ffn = (tensors[f"{name}.weight"].shape for name in names)
    return {
        "vocab_size": embedding[0],
        "d_model": embedding[1],
        "d_kv": query[0] // position[1],
        "d_ff": ffn[0],
        "num_layers": count_numbered(tensors, "encoder.block."),
        "num_heads": position[1],
        "relative_attention_num_buckets": position[0],
        "feed_forward_proj": "gated-gelu",
    }


def convert_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The visual half of the publisher's XLM-RoBERTa CLIP as transformers' ``CLIPVisionModel``; the text half goes."""
    tensors = strip_prefix(tensors)
    if not any(name.startswith("visual.") for name in tensors):  # transformers' names already
        return {name.removeprefix("vision_model."): tensor for name, tensor in tensors.items()}
    converted = {}
    for name, tensor in tensors.items():
        half, _, rest = name.partition(".")
        if half != "visual" or rest == "head":
            continue
        match = NUMBERED.fullmatch(rest)
        if rest == "cls_embedding":
            converted["embeddings.class_embedding"] = tensor.flatten()
        elif rest == "pos_embedding":
            converted["embeddings.position_embedding.weight"] = tensor[0]
        elif match and match[1] == "transformer.":
            layer = f"encoder.layers.{match[2]}."
            if match[3].startswith("attn.to_qkv."):
                kind = match[3].rpartition(".")[2]
                for part, chunk in zip("qkv", tensor.chunk(3), strict=True):
                    converted[f"{layer}self_attn.{part}_proj.{kind}"] = chunk
            else:
                converted[layer + (rename(match[3], _CLIP_LAYER) or match[3])] = tensor
        else:
            converted[rename(rest, _CLIP) or rest] = tensor
    return converted


def clip_config(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of ``CLIPVisionConfig``, read from the tensors; heads have 80 channels as in ViT-H.

    Raises:
        ValueError: The tensors are no such CLIP.
    """
    tensors = convert_clip(tensors)
    names = ("embeddings.patch_embedding", "embeddings.position_embedding", "encoder.layers.0.mlp.fc1")
    lacking = [name for name in names if f"{name}.weight" not in tensors]
    if lacking:
        raise ValueError(f"no CLIP image encoder: {lacking[0]}.weight is missing")
    patch, position, mlp = (tensors[f"{name}.weight"].shape for name in names)
    return {
        "hidden_size": patch[0],
        "intermediate_size": mlp[0],
        "num_hidden_layers": count_numbered(tensors, "encoder.layers."),
        "num_attention_heads": patch[0] // 80,
        "image_size": math.isqrt(position[0] - 1) * patch[2],
        "patch_size": patch[2],
        "hidden_act": "gelu",
    }
