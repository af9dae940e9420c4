"""Tiny ModelScope checkpoints: as ``ali-vilab/text-to-video-ms-1.7b`` was saved by diffusers 0.15, and the publisher's.

For the first the classes write their own names, which are the published ones but for the VAE's attention. For the
second the names are written down from ``video_synthesis/unet_sd.py`` of modelscope/modelscope, in what it differs
from VideoCrafter2's; the VAE lies in a whole Stable Diffusion checkpoint, the text encoder in OpenCLIP's.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import save_file

from . import WORDS, videocrafter, write_json, write_shards
from .wan_shapes import Shapes, fill

LAYOUTS = ("diffusers", "diffusers fp16, sharded", "original")
SIZE = (32, 48, 3)
TINY_UNET = {"base": 32, "multiples": (1, 2), "blocks": 1, "attention": (1,), "head": 8, "context": 32}
OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def unet_shapes(**sizes) -> Shapes:
    """``UNetSD``'s tensors; the sizes are named as VideoCrafter2's."""
    shapes: Shapes = {}
    for name, shape in videocrafter.unet_shapes(**sizes).items():
        if name.startswith("fps_embedding."):
            continue
        name = re.sub(r"^init_attn\.0\.", "input_blocks.0.1.", name)
        name = re.sub(r"^(input_blocks\.\d+)\.0\.op\.", r"\1.op.", name)
        if re.search(r"(_blocks\.\d+|middle_block)\.2\.proj_(in|out)\.weight$", name):
            shape = (*shape, 1)  # temporal attention is entered and left by convolutions over one frame
        shapes[name] = shape
    return shapes


def write(folder: Path, layout: str) -> None:
    """Fill a folder; see ``LAYOUTS``."""
    if layout == "original":
        _write_original(folder)
    else:
        _write_diffusers(folder, half="fp16" in layout)


def _write_original(folder: Path) -> None:
    write_json(folder / "configuration.json", {"framework": "pytorch", "task": "text-to-video-synthesis"})
    torch.save(videocrafter.filled(unet_shapes(**TINY_UNET), 0), folder / "text2video_pytorch_model.pth")
    vae = videocrafter.filled(videocrafter.vae_shapes(widths=(32,) * 4, blocks=1), 1)
    whole = {f"first_stage_model.{name}": tensor for name, tensor in vae.items()}
    whole |= {"model.diffusion_model.out.2.bias": torch.zeros(4), "betas": torch.zeros(1000)}
    torch.save({"state_dict": whole, "global_step": 3}, folder / "VQGAN_autoencoder.pth")
    text = videocrafter.filled(videocrafter.text_shapes(width=32, layers=2), 2)
    seeing = {"visual.class_embedding": torch.zeros(8), "visual.transformer.resblocks.0.ln_1.bias": torch.zeros(8)}
    torch.save(text | seeing, folder / "open_clip_pytorch_model.bin")


def _write_diffusers(folder: Path, *, half: bool) -> None:
    from diffusers import AutoencoderKL, UNet3DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    unet = UNet3DConditionModel(
        sample_size=32, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=12,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(4, 8, 8, 8), norm_num_groups=2, latent_channels=4, layers_per_block=1, sample_size=256,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(_vocabulary()[0]), hidden_size=12, intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=11, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip
    parts = {"unet": unet, "vae": vae, "text_encoder": text}
    for seed, (name, module) in enumerate(parts.items()):
        tensors = fill({key: tuple(value.shape) for key, value in module.state_dict().items()}, seed)
        if name == "vae":
            tensors = {re.sub(r"(?<=attentions\.0\.)to_(q|k|v|out\.0)", _old, key): t for key, t in tensors.items()}
        if half:
            tensors = {key: tensor.half() for key, tensor in tensors.items()}
        stem = ("model" if name == "text_encoder" else "diffusion_pytorch_model") + (".fp16" if half else "")
        if half and name == "unet":
            write_shards(folder / name, stem, tensors)
        else:
            (folder / name).mkdir(parents=True)
            save_file(tensors, folder / name / f"{stem}.safetensors")
    unet.save_config(folder / "unet")
    vae.save_config(folder / "vae")
    text.config.save_pretrained(folder / "text_encoder")
    scheduler = {"_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
    scheduler |= {"beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "prediction_type": "epsilon"}
    scheduler |= {"set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None}
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    index = {name: [type(module).__module__.partition(".")[0], type(module).__name__] for name, module in parts.items()}
    index |= {"scheduler": ["diffusers", "DDIMScheduler"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    write_json(folder / "model_index.json", {"_class_name": "TextToVideoSDPipeline", **index})
    _write_tokenizer(folder / "tokenizer")


def _old(match: re.Match) -> str:
    return OLD_ATTENTION[match[0]]


def _vocabulary() -> tuple[list[str], list[str]]:
    """Byte-pair pieces and merges that build each word letter by letter."""
    pieces, merges = ["!", "<|startoftext|>", "<|endoftext|>"], []
    for word in WORDS:
        letters = [*word[:-1], f"{word[-1]}</w>"]
        pieces += letters
        for count in range(1, len(letters)):
            merges.append(f"{''.join(letters[:count])} {letters[count]}")
            pieces.append("".join(letters[: count + 1]))
    return list(dict.fromkeys(pieces)), merges


def _write_tokenizer(folder: Path) -> None:
    """CLIP's layout."""
    pieces, merges = _vocabulary()
    write_json(folder / "vocab.json", {piece: i for i, piece in enumerate(pieces)})
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 11, "pad_token": "!", "do_lower_case": True}
    settings |= {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    write_json(folder / "tokenizer_config.json", settings)
