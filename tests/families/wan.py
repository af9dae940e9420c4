"""Tiny Wan checkpoints: every published layout, in the publisher's own key names.

The names are written down here from ``wan/modules/*.py`` of Wan-Video/Wan2.1 and Wan2.2, independently of the
package's tables, with the shapes as functions of the sizes; the real models' key lists come from the same functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from . import write_json, write_shards, write_word_tokenizer

LAYOUTS = (
    "2.1 original t2v",
    "2.1 original inp",
    "2.1 diffusers t2v",
    "2.1 diffusers i2v",
    "2.2 original i2v pair",
    "2.2 original t2v pair",
    "2.2 original ti2v",
    "2.2 diffusers i2v pair",
    "2.2 diffusers ti2v",
)

VAE_FILE, VAE_FILE_22, TEXT_FILE = "Wan2.1_VAE", "Wan2.2_VAE", "models_t5_umt5-xxl-enc-bf16"
IMAGE_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14"

Shapes = dict[str, tuple[int, ...]]

TINY = {"dim": 48, "ffn_dim": 64, "freq_dim": 32, "text_dim": 24, "num_heads": 2, "num_layers": 2}
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


def write(folder: Path, layout: str) -> None:
    """Fill a folder; see ``LAYOUTS``."""
    _, kind, *variant = layout.split()
    writer = _write_original if kind == "original" else _write_diffusers
    writer(folder, variant[0], pair="pair" in variant)


def _write_original(folder: Path, variant: str, *, pair: bool) -> None:
    """Wan2.1 in one or two files, Wan2.2's pair in two folders of shards, TI2V with its own VAE."""
    ti2v, image = variant == "ti2v", variant in ("inp", "i2v")
    sizes = TINY | {"image": {"in_dim": 36}, "ti2v": {"in_dim": 48, "out_dim": 48}}.get(
        "image" if image else variant, {}
    )
    clip = {"image_dim": TINY_CLIP["dim"]} if image and not pair else {}
    config = {
        "_class_name": "WanModel",
        "model_type": "i2v" if image else variant,
        "eps": 1e-6,
        "text_len": 512,
        **sizes,
    }
    experts = {"high_noise_model": 1, "low_noise_model": 11} if pair else {"": 1}
    for place, seed in experts.items():
        write_json(folder / place / "config.json", config)
        transformer = fill(transformer_shapes(**sizes, **clip), seed)
        if pair or image or ti2v:
            write_shards(folder / place, "diffusion_pytorch_model", transformer)
        else:
            save_file(transformer, folder / "diffusion_pytorch_model.safetensors")
    if clip:
        torch.save(fill(clip_shapes(**TINY_CLIP), 4, 0.1), folder / f"{IMAGE_FILE}.pth")
    if ti2v:
        torch.save(fill(vae_22_shapes(**TINY_VAE_22), 2), folder / f"{VAE_FILE_22}.pth")
    else:
        torch.save(fill(vae_shapes(**TINY_VAE), 2), folder / f"{VAE_FILE}.pth")
    torch.save(fill(text_shapes(**TINY_TEXT), 3), folder / f"{TEXT_FILE}.pth")
    write_word_tokenizer(folder / "google" / "umt5-xxl")


def _write_diffusers(folder: Path, variant: str, *, pair: bool) -> None:
    """As ``save_pretrained`` of a diffusers pipeline writes it, by diffusers' and transformers' own classes."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
    from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

    torch.manual_seed(7)
    ti2v, image = variant == "ti2v", variant == "i2v"
    channels = {"in_channels": 36 if image else 48 if ti2v else 16, "out_channels": 48 if ti2v else 16}
    if image and not pair:
        channels |= {"image_dim": TINY_CLIP["dim"], "added_kv_proj_dim": TINY["dim"]}
    sizes = {"num_attention_heads": 2, "attention_head_dim": 24, "text_dim": 24, "freq_dim": 32, "ffn_dim": 64}
    names = ("transformer", "transformer_2") if pair else ("transformer",)
    parts: dict[str, Any] = {name: WanTransformer3DModel(**sizes, **channels, num_layers=2) for name in names}
    vae = {"base_dim": 4, "z_dim": 16, "dim_mult": [1, 2, 2, 2], "temperal_downsample": [False, True, True]}
    if ti2v:
        vae = {"base_dim": 8, "decoder_base_dim": 4, "z_dim": 48, "dim_mult": [1, 2, 2], "is_residual": True}
        vae |= {"in_channels": 12, "out_channels": 12, "patch_size": 2, "temperal_downsample": [True, True]}
        vae |= {"latents_mean": [0.1] * 48, "latents_std": [0.7] * 48, "scale_factor_spatial": 8}
    parts["vae"] = AutoencoderKLWan(**vae, num_res_blocks=1)
    words = {"vocab_size": 13, "d_model": 24, "d_kv": 12, "d_ff": 40, "num_layers": 2, "num_heads": 2}
    parts["text_encoder"] = UMT5EncoderModel(UMT5Config(**words, feed_forward_proj="gated-gelu"))
    if image and not pair:
        clip = {"hidden_size": 160, "intermediate_size": 320, "num_hidden_layers": 2, "num_attention_heads": 2}
        parts["image_encoder"] = CLIPVisionModel(CLIPVisionConfig(**clip, patch_size=14))
    index: dict[str, Any] = {"_class_name": "WanImageToVideoPipeline" if image else "WanPipeline"}
    index |= {"transformer_2": [None, None], "boundary_ratio": 0.9 if pair else None, "expand_timesteps": ti2v}
    for name, module in parts.items():
        module.save_pretrained(folder / name, max_shard_size="50KB" if pair else "5GB")
        index[name] = [type(module).__module__.partition(".")[0], type(module).__name__]
    write_json(folder / "model_index.json", index)
    scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=5.0)
    scheduler.save_pretrained(folder / "scheduler")
    write_word_tokenizer(folder / "tokenizer")
