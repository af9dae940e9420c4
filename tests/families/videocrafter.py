"""Tiny VideoCrafter2 checkpoints: one pickle that holds UNet, VAE and text encoder, as PyTorch Lightning left it.

The names are written down from the publisher's ``lvdm`` package and OpenCLIP, independently of the package's tables;
the real model's key list comes from the same functions.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .wan_shapes import Shapes, fill

LAYOUTS = ("original",)
SIZE = (16, 8, 3)

UNET = {"base": 320, "multiples": (1, 2, 4, 4), "blocks": 2, "attention": (1, 2, 4), "head": 64, "context": 1024}
VAE = {"widths": (128, 256, 512, 512), "blocks": 2}
TEXT = {"width": 1024, "layers": 24}
TINY_UNET = {"base": 32, "multiples": (1, 2), "blocks": 1, "attention": (1,), "head": 8, "context": 32}
TINY_VAE = {"widths": (32, 32), "blocks": 1}
TINY_TEXT = {"width": 32, "layers": 2}
TOKENS = 49408
"""Of OpenCLIP's vocabulary, which the tokenizer fixes."""


def layer(name: str, *shape: int) -> Shapes:
    """A weight and a bias of its first size."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def unet_shapes(
    *, base: int, multiples: tuple[int, ...], blocks: int, attention: tuple[int, ...], head: int, context: int
) -> Shapes:
    """``UNetModel``'s tensors, with transformers of one block."""
    time = 4 * base
    shapes = layer("time_embed.0", time, base) | layer("time_embed.2", time, time)
    shapes |= layer("fps_embedding.0", time, base) | layer("fps_embedding.2", time, time)
    shapes |= layer("input_blocks.0.0", base, 4, 3, 3) | _transformer("init_attn.0", base, 8 * head, None, (1,))
    index, width, skips = 0, base, [base]

    def residual(name: str, into: int, out: int) -> Shapes:
        found = layer(f"{name}.in_layers.0", into) | layer(f"{name}.in_layers.2", out, into, 3, 3)
        found |= layer(f"{name}.emb_layers.1", out, time)
        found |= layer(f"{name}.out_layers.0", out) | layer(f"{name}.out_layers.3", out, out, 3, 3)
        if into != out:
            found |= layer(f"{name}.skip_connection", out, into, 1, 1)
        for number in (1, 2, 3, 4):
            temporal = f"{name}.temopral_conv.conv{number}"
            found |= layer(f"{temporal}.0", out) | layer(f"{temporal}.{2 if number == 1 else 3}", out, out, 3, 1, 1)
        return found

    def both(name: str, first: int, width: int) -> Shapes:
        return _transformer(f"{name}.{first}", width, width, context) | _transformer(
            f"{name}.{first + 1}", width, width, None
        )

    for level, multiple in enumerate(multiples):
        for _ in range(blocks):
            index += 1
            shapes |= residual(f"input_blocks.{index}.0", width, multiple * base)
            width = multiple * base
            skips.append(width)
            if 2**level in attention:
                shapes |= both(f"input_blocks.{index}", 1, width)
        if level < len(multiples) - 1:
            index += 1
            shapes |= layer(f"input_blocks.{index}.0.op", width, width, 3, 3)
            skips.append(width)
    shapes |= residual("middle_block.0", width, width) | both("middle_block", 1, width)
    shapes |= residual("middle_block.3", width, width)
    index = 0
    for level in reversed(range(len(multiples))):
        for number in range(blocks + 1):
            shapes |= residual(f"output_blocks.{index}.0", width + skips.pop(), multiples[level] * base)
            width, there = multiples[level] * base, 1
            if 2**level in attention:
                shapes |= both(f"output_blocks.{index}", 1, width)
                there = 3
            if level and number == blocks:
                shapes |= layer(f"output_blocks.{index}.{there}.conv", width, width, 3, 3)
            index += 1
    return shapes | layer("out.0", base) | layer("out.2", 4, base, 3, 3)


def _transformer(name: str, width: int, inner: int, context: int | None, kernel: tuple[int, ...] = ()) -> Shapes:
    shapes = layer(f"{name}.norm", width)
    shapes |= layer(f"{name}.proj_in", inner, width, *kernel) | layer(f"{name}.proj_out", width, inner, *kernel)
    block = f"{name}.transformer_blocks.0"
    for attention, other in (("attn1", inner), ("attn2", context or inner)):
        sizes = {"to_q": inner, "to_k": other, "to_v": other}
        shapes |= {f"{block}.{attention}.{part}.weight": (inner, size) for part, size in sizes.items()}
        shapes |= layer(f"{block}.{attention}.to_out.0", inner, inner)
    shapes |= layer(f"{block}.ff.net.0.proj", 8 * inner, inner) | layer(f"{block}.ff.net.2", inner, 4 * inner)
    for norm in ("norm1", "norm2", "norm3"):
        shapes |= layer(f"{block}.{norm}", inner)
    return shapes


def vae_shapes(*, widths: tuple[int, ...], blocks: int) -> Shapes:
    """The latent-diffusion code base's ``AutoencoderKL``: latents of 4 channels."""

    def residual(name: str, into: int, out: int) -> Shapes:
        found = layer(f"{name}.norm1", into) | layer(f"{name}.conv1", out, into, 3, 3)
        found |= layer(f"{name}.norm2", out) | layer(f"{name}.conv2", out, out, 3, 3)
        return found if into == out else found | layer(f"{name}.nin_shortcut", out, into, 1, 1)

    def middle(half: str, width: int) -> Shapes:
        found = residual(f"{half}.mid.block_1", width, width) | residual(f"{half}.mid.block_2", width, width)
        found |= layer(f"{half}.mid.attn_1.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            found |= layer(f"{half}.mid.attn_1.{part}", width, width, 1, 1)
        return found

    width, last = widths[0], len(widths) - 1
    shapes = layer("encoder.conv_in", width, 3, 3, 3) | layer("quant_conv", 8, 8, 1, 1)
    for level, out in enumerate(widths):
        for number in range(blocks):
            shapes |= residual(f"encoder.down.{level}.block.{number}", width, out)
            width = out
        if level < last:
            shapes |= layer(f"encoder.down.{level}.downsample.conv", out, out, 3, 3)
    shapes |= middle("encoder", width) | layer("encoder.norm_out", width) | layer("encoder.conv_out", 8, width, 3, 3)
    shapes |= layer("post_quant_conv", 4, 4, 1, 1) | layer("decoder.conv_in", width, 4, 3, 3) | middle("decoder", width)
    for level in reversed(range(len(widths))):
        for number in range(blocks + 1):
            shapes |= residual(f"decoder.up.{level}.block.{number}", width, widths[level])
            width = widths[level]
        if level:
            shapes |= layer(f"decoder.up.{level}.upsample.conv", width, width, 3, 3)
    return shapes | layer("decoder.norm_out", width) | layer("decoder.conv_out", 3, width, 3, 3)


def text_shapes(*, width: int, layers: int) -> Shapes:
    """The text half of OpenCLIP's ``CLIP``."""
    shapes: Shapes = {"positional_embedding": (77, width), "token_embedding.weight": (TOKENS, width)}
    shapes |= {"text_projection": (width, width), "logit_scale": ()}
    for number in range(layers):
        block = f"transformer.resblocks.{number}"
        shapes |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
        shapes |= layer(f"{block}.attn.out_proj", width, width)
        shapes |= layer(f"{block}.mlp.c_fc", 4 * width, width) | layer(f"{block}.mlp.c_proj", width, 4 * width)
        shapes |= layer(f"{block}.ln_1", width) | layer(f"{block}.ln_2", width)
    return shapes | layer("ln_final", width)


def filled(shapes: Shapes, seed: int) -> dict[str, Tensor]:
    """Random tensors; norms, of which many are only numbered here, multiply by about 1."""
    tensors = fill(shapes, seed, 0.1)
    unnamed = [name for name, t in tensors.items() if t.dim() == 1 and name.endswith("weight") and "norm" not in name]
    return tensors | {name: tensors[name] + 1 for name in unnamed}


def write(folder: Path, layout: str) -> None:
    """Fill a folder; see ``LAYOUTS``."""
    parts = {
        "model.diffusion_model.": unet_shapes(**TINY_UNET),
        "first_stage_model.": vae_shapes(**TINY_VAE),
        "cond_stage_model.model.": text_shapes(**TINY_TEXT),
    }
    tensors = {"betas": torch.zeros(1000), "scale_arr": torch.ones(1400)}
    for seed, (prefix, shapes) in enumerate(parts.items()):
        tensors |= {prefix + name: tensor for name, tensor in filled(shapes, seed).items()}
    lightning = {"epoch": 3, "global_step": 7, "pytorch-lightning_version": "1.9.3", "callbacks": {}}
    torch.save(lightning | {"state_dict": tensors}, folder / "model.ckpt")
