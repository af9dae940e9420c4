"""Tiny Open-Sora 1.2 checkpoints: the publisher's denoiser and VAE, and DeepFloyd's T5 in sharded pickles.

The names are written down from the publisher's ``opensora`` package, independently of the package's tables; the real
model's key lists come from the same functions. The VAE's spatial part is diffusers' own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from . import write_json, write_shards, write_word_tokenizer
from .videocrafter import layer
from .wan_shapes import Shapes, fill

LAYOUTS = ("beside each other", "denoiser outside, sharded")
SIZE = (24, 16, 18)

DENOISER, VAE, TEXT = "OpenSora-STDiT-v3", "OpenSora-VAE-v1.2", "t5-v1_1-xxl"

NETWORK = {"width": 1152, "depth": 28, "heads": 16, "caption": 4096, "tokens": 300}
TEMPORAL = {"filters": 128, "multiples": (1, 2, 2, 4), "blocks": 4}
SPATIAL = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
TINY_NETWORK = {"width": 32, "depth": 2, "heads": 2, "caption": 24, "tokens": 8}
TINY_TEMPORAL = {"filters": 32, "multiples": (1, 1, 1, 1), "blocks": 1}
TINY_SPATIAL = {"block_out_channels": (32, 32), "layers_per_block": 1}


def network_shapes(*, width: int, depth: int, heads: int, caption: int, tokens: int) -> Shapes:
    """``STDiT3``'s tensors: 4 latent channels in, 8 out, patches of 2x2."""
    shapes = layer("x_embedder.proj", width, 4, 1, 2, 2) | layer("t_block.1", 6 * width, width)
    for name in ("t_embedder", "fps_embedder"):
        shapes |= layer(f"{name}.mlp.0", width, 256) | layer(f"{name}.mlp.2", width, width)
    shapes |= layer("y_embedder.y_proj.fc1", width, caption) | layer("y_embedder.y_proj.fc2", width, width)
    shapes |= {"y_embedder.y_embedding": (tokens, caption), "rope.freqs": (width // heads // 2,)}
    for kind in ("spatial_blocks", "temporal_blocks"):
        for number in range(depth):
            block = f"{kind}.{number}"
            shapes |= {f"{block}.attn.{part}.weight": (width // heads,) for part in ("q_norm", "k_norm")}
            shapes |= layer(f"{block}.attn.qkv", 3 * width, width) | layer(f"{block}.attn.proj", width, width)
            shapes |= layer(f"{block}.cross_attn.q_linear", width, width)
            shapes |= layer(f"{block}.cross_attn.kv_linear", 2 * width, width)
            shapes |= layer(f"{block}.cross_attn.proj", width, width)
            shapes |= layer(f"{block}.mlp.fc1", 4 * width, width) | layer(f"{block}.mlp.fc2", width, 4 * width)
            shapes[f"{block}.scale_shift_table"] = (6, width)
    return shapes | layer("final_layer.linear", 4 * 8, width) | {"final_layer.scale_shift_table": (2, width)}


def temporal_shapes(*, filters: int, multiples: tuple[int, ...], blocks: int) -> Shapes:
    """``VAE_Temporal``'s tensors: time halves behind the second and the third level."""

    def residual(name: str, into: int, out: int) -> Shapes:
        found = layer(f"{name}.norm1", into) | layer(f"{name}.norm2", out)
        found |= {f"{name}.conv1.conv.weight": (out, into, 3, 3, 3), f"{name}.conv2.conv.weight": (out, out, 3, 3, 3)}
        return found if into == out else found | {f"{name}.conv3.conv.weight": (out, into, 1, 1, 1)}

    last, width = len(multiples) - 1, filters
    shapes: Shapes = {"encoder.conv_in.conv.weight": (filters, 4, 3, 3, 3)}
    for level, multiple in enumerate(multiples):
        for number in range(blocks):
            shapes |= residual(f"encoder.block_res_blocks.{level}.{number}", width, multiple * filters)
            width = multiple * filters
        if 0 < level < last:
            shapes |= layer(f"encoder.conv_blocks.{level}.conv", width, width, 3, 3, 3)
    for half in ("encoder", "decoder"):
        for number in range(blocks):
            shapes |= residual(f"{half}.res_blocks.{number}", width, width)
    shapes |= layer("encoder.norm1", width) | layer("encoder.conv2.conv", 8, width, 1, 1, 1)
    shapes |= layer("quant_conv.conv", 8, 8, 1, 1, 1) | layer("post_quant_conv.conv", 4, 4, 1, 1, 1)
    shapes |= layer("decoder.conv1.conv", width, 4, 3, 3, 3)
    for level in reversed(range(len(multiples))):
        for number in range(blocks):
            shapes |= residual(f"decoder.block_res_blocks.{level}.{number}", width, multiples[level] * filters)
            width = multiples[level] * filters
        if level > 1:
            shapes |= layer(f"decoder.conv_blocks.{level - 1}.conv", 2 * width, width, 3, 3, 3)
    return shapes | layer("decoder.norm1", width) | layer("decoder.conv_out.conv", 4, width, 3, 3, 3)


def vae_shapes(temporal: Shapes, spatial: Mapping) -> Shapes:
    """``VideoAutoencoderPipeline``'s tensors."""
    from diffusers import AutoencoderKL

    levels = len(spatial["block_out_channels"])
    with torch.device("meta"):
        module = AutoencoderKL(
            **spatial,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
        )
    shapes = {f"spatial_vae.module.{name}": tuple(t.shape) for name, t in module.state_dict().items()}
    shapes |= {f"temporal_vae.{name}": shape for name, shape in temporal.items()}
    return shapes | {"scale": (1, 4, 1, 1, 1), "shift": (1, 4, 1, 1, 1)}


def write(folder: Path, layout: str) -> None:
    """Fill a folder; see ``LAYOUTS``."""
    outside = layout.startswith("denoiser outside")
    _write_denoiser(folder if outside else folder / DENOISER, sharded=outside)
    vae = fill(vae_shapes(temporal_shapes(**TINY_TEMPORAL), TINY_SPATIAL), 2, 0.1)
    vae |= {name: torch.tensor(values).view(1, 4, 1, 1, 1) for name, values in _normalisation().items()}
    config = {"model_type": "VideoAutoencoderPipeline", "micro_frame_size": 17, "cal_loss": False}
    write_json(folder / VAE / "config.json", config | _normalisation())
    save_file(vae, folder / VAE / "model.safetensors")
    _write_text(folder / TEXT)


def open_files(folder: Path) -> Path:
    """The denoiser's folder, wherever it lies."""
    return folder / DENOISER if (folder / DENOISER).is_dir() else folder


def _normalisation() -> dict[str, list[float]]:
    return {"scale": [3.85, 2.32, 2.33, 3.06], "shift": [-0.1, 0.34, 0.27, 0.98]}


def _write_denoiser(folder: Path, *, sharded: bool) -> None:
    sizes = TINY_NETWORK
    config = {"model_type": "STDiT3", "architectures": ["STDiT3"], "depth": sizes["depth"], "num_heads": sizes["heads"]}
    config |= {"hidden_size": sizes["width"], "caption_channels": sizes["caption"], "in_channels": 4, "mlp_ratio": 4.0}
    config |= {"model_max_length": sizes["tokens"], "patch_size": [1, 2, 2], "input_size": [None, None, None]}
    config |= {"qk_norm": True, "pred_sigma": True, "input_sq_size": 512, "enable_flash_attn": True}
    config |= {"only_train_temporal": False, "skip_y_embedder": False, "class_dropout_prob": 0.1, "drop_path": 0.0}
    write_json(folder / "config.json", config)
    tensors = fill(network_shapes(**sizes), 1)
    half = sizes["width"] // sizes["heads"] // 2
    tensors["rope.freqs"] = 10000 ** -(torch.arange(half) / half)
    if sharded:
        write_shards(folder, "model", tensors)
    else:
        save_file(tensors, folder / "model.safetensors")


def _write_text(folder: Path) -> None:
    """Encoder alone, in two pickles, as DeepFloyd publishes it."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(3)
    config = T5Config(
        vocab_size=13, d_model=TINY_NETWORK["caption"], d_kv=8, d_ff=32, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip
    config.save_pretrained(folder)
    write_word_tokenizer(folder)
    tensors: dict[str, Tensor] = T5EncoderModel(config).state_dict()
    files = [f"pytorch_model-{n:05d}-of-00002.bin" for n in (1, 2)]
    place = {name: files[i % 2] for i, name in enumerate(sorted(tensors))}
    for file in files:
        torch.save({name: t.clone() for name, t in tensors.items() if place[name] == file}, folder / file)
    write_json(folder / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": place})
