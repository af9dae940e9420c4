"""Wan's tensors in the publisher's names, with their shapes as functions of the sizes.

Written down from ``wan/modules/*.py`` of Wan-Video/Wan2.1 and Wan2.2, independently of the package's tables. Tiny
checkpoints and the key lists of the real models come from the same functions.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]

TINY = {"dim": 48, "ffn_dim": 64, "freq_dim": 32, "text_dim": 24, "num_heads": 2, "num_layers": 2}
TINY_SINGLE = TINY | {"dim": 128, "num_heads": 1}
"""Without a config.json heads have 128 channels."""
TINY_VAE = {"dim": 4, "z_dim": 16, "dim_mult": (1, 2, 2, 2), "num_res_blocks": 1, "temporal": (False, True, True)}
TINY_VAE_22 = {
    "dim": 8, "decoder_dim": 4, "z_dim": 48, "dim_mult": (1, 2, 2), "num_res_blocks": 1, "temporal": (True, True),
}  # fmt: skip
TINY_TEXT = {"dim": 24, "heads": 2, "ffn": 40, "layers": 2, "vocabulary": 13}
TINY_CLIP = {"dim": 160, "layers": 2, "mlp": 320}


def transformer_shapes(
    *, dim: int, ffn_dim: int, freq_dim: int, text_dim: int, num_layers: int, in_dim: int = 16, out_dim: int = 16,
    image_dim: int = 0, num_heads: int = 0,
) -> Shapes:  # fmt: skip
    """``WanModel``'s tensors; with ``image_dim`` those of its image-to-video variant."""
    sizes = {"text_embedding.0": (dim, text_dim), "text_embedding.2": (dim, dim)}
    sizes |= {"time_embedding.0": (dim, freq_dim), "time_embedding.2": (dim, dim), "time_projection.1": (6 * dim, dim)}
    sizes |= {"patch_embedding": (dim, in_dim, 1, 2, 2), "head.head": (4 * out_dim, dim)}
    if image_dim:
        sizes |= {"img_emb.proj.0": (image_dim,), "img_emb.proj.1": (image_dim, image_dim)}
        sizes |= {"img_emb.proj.3": (dim, image_dim), "img_emb.proj.4": (dim,)}
    shapes: Shapes = {"head.modulation": (1, 2, dim)}
    for i in range(num_layers):
        block = f"blocks.{i}."
        for kind in ("self_attn", "cross_attn"):
            sizes |= {f"{block}{kind}.{part}": (dim, dim) for part in "qkvo"}
            shapes |= {f"{block}{kind}.norm_{part}.weight": (dim,) for part in "qk"}
        if image_dim:
            sizes |= {f"{block}cross_attn.{part}_img": (dim, dim) for part in "kv"}
            shapes[f"{block}cross_attn.norm_k_img.weight"] = (dim,)
        sizes |= {f"{block}norm3": (dim,), f"{block}ffn.0": (ffn_dim, dim), f"{block}ffn.2": (dim, ffn_dim)}
        shapes[f"{block}modulation"] = (1, 6, dim)
    return shapes | _with_bias(sizes)


def vae_shapes(
    *, dim: int, z_dim: int, dim_mult: tuple[int, ...], num_res_blocks: int, temporal: tuple[bool, ...]
) -> Shapes:
    """``WanVAE_``'s tensors: blocks in one row, down and up."""
    shapes: Shapes = {"conv1.weight": (2 * z_dim, 2 * z_dim, 1, 1, 1), "conv1.bias": (2 * z_dim,)}
    shapes |= {"conv2.weight": (z_dim, z_dim, 1, 1, 1), "conv2.bias": (z_dim,)}
    widths = [dim * m for m in dim_mult]
    shapes |= _conv("encoder.conv1", dim, 3, 3)
    row, width = 0, dim
    for level, out in enumerate(widths):
        for _ in range(num_res_blocks):
            shapes |= _residual(f"encoder.downsamples.{row}", width, out)
            row, width = row + 1, out
        if level < len(widths) - 1:
            shapes |= _resample(f"encoder.downsamples.{row}", out, out if temporal[level] else 0)
            row += 1
    shapes |= _middle("encoder", width) | {"encoder.head.0.gamma": (width, 1, 1, 1)}
    shapes |= _conv("encoder.head.2", 2 * z_dim, width, 3) | _conv("decoder.conv1", width, z_dim, 3)
    shapes |= _middle("decoder", width)
    row = 0
    for level, out in enumerate(reversed(widths)):
        for place in range(num_res_blocks + 1):
            # An upsampler halves the channels, so every level but the first begins with fewer.
            start = width if place == 0 else out
            shapes |= _residual(f"decoder.upsamples.{row}", start, out)
            row += 1
        width = out
        if level < len(widths) - 1:
            name = f"decoder.upsamples.{row}"
            shapes |= {f"{name}.resample.1.weight": (out // 2, out, 3, 3), f"{name}.resample.1.bias": (out // 2,)}
            if temporal[-1 - level]:
                shapes |= {f"{name}.time_conv.weight": (2 * out, out, 3, 1, 1), f"{name}.time_conv.bias": (2 * out,)}
            row, width = row + 1, out // 2
    return shapes | {"decoder.head.0.gamma": (width, 1, 1, 1)} | _conv("decoder.head.2", 3, width, 3)


def vae_22_shapes(
    *,
    dim: int,
    decoder_dim: int,
    z_dim: int,
    dim_mult: tuple[int, ...],
    num_res_blocks: int,
    temporal: tuple[bool, ...],
) -> Shapes:
    """``WanVAE_``'s tensors of Wan2.2: a level is a module; patches of 2x2 pixels go in and come out."""
    shapes: Shapes = {"conv1.weight": (2 * z_dim, 2 * z_dim, 1, 1, 1), "conv1.bias": (2 * z_dim,)}
    shapes |= {"conv2.weight": (z_dim, z_dim, 1, 1, 1), "conv2.bias": (z_dim,)}
    shapes |= _conv("encoder.conv1", dim, 12, 3)
    width, last = dim, len(dim_mult) - 1
    for level, multiple in enumerate(dim_mult):
        name, out = f"encoder.downsamples.{level}.downsamples", dim * multiple
        for place in range(num_res_blocks):
            shapes |= _residual(f"{name}.{place}", width if place == 0 else out, out)
        if level < last:
            shapes |= _resample(f"{name}.{num_res_blocks}", out, out if temporal[level] else 0)
        width = out
    shapes |= _middle("encoder", width) | {"encoder.head.0.gamma": (width, 1, 1, 1)}
    shapes |= _conv("encoder.head.2", 2 * z_dim, width, 3)
    width = decoder_dim * dim_mult[-1]
    shapes |= _conv("decoder.conv1", width, z_dim, 3) | _middle("decoder", width)
    for level, multiple in enumerate(reversed(dim_mult)):
        name, out = f"decoder.upsamples.{level}.upsamples", decoder_dim * multiple
        for place in range(num_res_blocks + 1):
            shapes |= _residual(f"{name}.{place}", width if place == 0 else out, out)
        if level < last:
            shapes |= _resample(f"{name}.{num_res_blocks + 1}", out, 2 * out if temporal[-1 - level] else 0)
        width = out
    return shapes | {"decoder.head.0.gamma": (width, 1, 1, 1)} | _conv("decoder.head.2", 12, width, 3)


def _resample(name: str, width: int, time: int) -> Shapes:
    shapes: Shapes = {f"{name}.resample.1.weight": (width, width, 3, 3), f"{name}.resample.1.bias": (width,)}
    if time:
        shapes |= {f"{name}.time_conv.weight": (time, width, 3, 1, 1), f"{name}.time_conv.bias": (time,)}
    return shapes


def text_shapes(*, dim: int, heads: int, ffn: int, layers: int, vocabulary: int, head_dim: int = 0) -> Shapes:
    """The UMT5 encoder's tensors."""
    inner = heads * (head_dim or dim // heads)
    shapes: Shapes = {"token_embedding.weight": (vocabulary, dim), "norm.weight": (dim,)}
    for i in range(layers):
        block = {"norm1": (dim,), "norm2": (dim,), "ffn.gate.0": (ffn, dim), "ffn.fc1": (ffn, dim)}
        block |= {"ffn.fc2": (dim, ffn), "pos_embedding.embedding": (32, heads), "attn.o": (dim, inner)}
        block |= {f"attn.{name}": (inner, dim) for name in "qkv"}
        shapes |= {f"blocks.{i}.{name}.weight": shape for name, shape in block.items()}
    return shapes


def clip_shapes(*, dim: int, layers: int, mlp: int) -> Shapes:
    """The visual half of the publisher's CLIP, 224 pixels in patches of 14, and a scrap of its text half."""
    shapes: Shapes = {"visual.patch_embedding.weight": (dim, 3, 14, 14), "visual.cls_embedding": (1, 1, dim)}
    shapes |= {"visual.pos_embedding": (1, 257, dim), "visual.head": (dim, 8), "log_scale": ()}
    shapes |= {"textual.token_embedding.weight": (4, 8)}
    sizes: Shapes = {"visual.pre_norm": (dim,), "visual.post_norm": (dim,)}
    for i in range(layers):
        layer = {"norm1": (dim,), "norm2": (dim,), "attn.to_qkv": (3 * dim, dim), "attn.proj": (dim, dim)}
        layer |= {"mlp.0": (mlp, dim), "mlp.2": (dim, mlp)}
        sizes |= {f"visual.transformer.{i}.{name}": size for name, size in layer.items()}
    return shapes | _with_bias(sizes)


def _with_bias(sizes: Shapes) -> Shapes:
    weights = {f"{name}.weight": size for name, size in sizes.items()}
    return weights | {f"{name}.bias": size[:1] for name, size in sizes.items()}


def _conv(name: str, out: int, into: int, kernel: int) -> Shapes:
    return {f"{name}.weight": (out, into, kernel, kernel, kernel), f"{name}.bias": (out,)}


def _residual(name: str, into: int, out: int) -> Shapes:
    shapes = {f"{name}.residual.0.gamma": (into, 1, 1, 1), f"{name}.residual.3.gamma": (out, 1, 1, 1)}
    shapes |= _conv(f"{name}.residual.2", out, into, 3) | _conv(f"{name}.residual.6", out, out, 3)
    return shapes if into == out else shapes | _conv(f"{name}.shortcut", out, into, 1)


def _middle(half: str, width: int) -> Shapes:
    attention = f"{half}.middle.1"
    shapes = _residual(f"{half}.middle.0", width, width) | _residual(f"{half}.middle.2", width, width)
    shapes |= {f"{attention}.norm.gamma": (width, 1, 1)}
    for part, out in (("to_qkv", 3 * width), ("proj", width)):
        shapes |= {f"{attention}.{part}.weight": (out, width, 1, 1), f"{attention}.{part}.bias": (out,)}
    return shapes


def fill(shapes: Mapping[str, tuple[int, ...]], seed: int, scale: float = 0.2) -> dict[str, Tensor]:
    """Random tensors; what multiplies (norms' weights) lies around 1."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) * scale for name, shape in shapes.items()}
    norms = {name for name, v in tensors.items() if "norm" in name and name.endswith("weight") and v.dim() == 1}
    one = [name for name in tensors if name in norms or name.endswith(".gamma")]
    return tensors | {name: tensors[name] + 1 for name in one}
