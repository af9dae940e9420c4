"""Tiny Wan checkpoints: Wan2.1 and Wan2.2 in the folders of publisher and diffusers, and in ComfyUI's single files."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from reward_lora.video_models import ModelFiles
from safetensors.torch import save_file
from torch import Tensor

from . import WORDS, write_json, write_shards, write_word_tokenizer
from .wan_shapes import (
    TINY,
    TINY_CLIP,
    TINY_SINGLE,
    TINY_TEXT,
    TINY_VAE,
    TINY_VAE_22,
    clip_shapes,
    fill,
    text_shapes,
    transformer_shapes,
    vae_22_shapes,
    vae_shapes,
)

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
    "2.1 files i2v",
    "2.2 files ti2v",
    "2.2 files t2v pair",
)

VAE_FILE, VAE_FILE_22, TEXT_FILE = "Wan2.1_VAE", "Wan2.2_VAE", "models_t5_umt5-xxl-enc-bf16"
IMAGE_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14"


def write(folder: Path, layout: str) -> None:
    """Fill a folder; see ``LAYOUTS``."""
    _, kind, *variant = layout.split()
    writer = {"original": _write_original, "diffusers": _write_diffusers, "files": _write_files}[kind]
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


FOLDERS = ("diffusion_models", "text_encoders", "vae", "clip_vision")
"""ComfyUI's, of the layouts in single files."""


def open_files(folder: Path) -> Path | ModelFiles:
    """What to load: the folder, or the single files in ComfyUI's folders below it, the high-noise expert first."""
    if not (folder / FOLDERS[0]).is_dir():
        return folder
    diffusion, (text,), (vae,), clip = (sorted((folder / name).glob("*.safetensors")) for name in FOLDERS)
    return ModelFiles(diffusion[0], text, vae, *diffusion[1:] or [None], *clip)


def _write_files(folder: Path, variant: str, *, pair: bool) -> None:
    """As ComfyUI's repackaged files: 16 bits, and the pair with its text encoder in scaled float8."""
    for name in FOLDERS:
        (folder / name).mkdir()
    diffusion, text, vae, clip = (folder / name for name in FOLDERS)
    sizes = TINY_SINGLE | {"i2v": {"in_dim": 36}, "ti2v": {"in_dim": 48, "out_dim": 48}}.get(variant, {})
    seeds = (
        {"wan2.2_t2v_high_noise_fp8_scaled": 1, "wan2.2_t2v_low_noise_fp8_scaled": 11}
        if pair
        else {f"wan_{variant}_fp16": 1}
    )
    image = {"image_dim": TINY_CLIP["dim"]} if variant == "i2v" else {}
    for name, seed in seeds.items():
        tensors = fill(transformer_shapes(**sizes, **image), seed)
        tensors = {f"model.diffusion_model.{key}": tensor for key, tensor in tensors.items()} if pair else tensors
        packed = _float8(tensors, "model.diffusion_model.") if pair else _half(tensors)
        save_file(packed, diffusion / f"{name}.safetensors")
    words = _umt5_of_transformers()
    save_file(
        _float8(words) if pair else _half(words),
        text / f"umt5_xxl_{'fp8_e4m3fn_scaled' if pair else 'fp16'}.safetensors",
    )
    if variant == "ti2v":
        save_file(_half(fill(vae_22_shapes(**TINY_VAE_22), 2)), vae / "wan2.2_vae.safetensors")
    else:
        save_file(_half(fill(vae_shapes(**TINY_VAE), 2)), vae / "wan_2.1_vae.safetensors")
    if image:
        save_file(_half(_clip_of_transformers()), clip / "clip_vision_h.safetensors")


def _half(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def _float8(tensors: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Matrices in float8 with a factor each, the rest in 16 bits, and the mark that tells it."""
    packed = {f"{prefix}scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and tensor.is_floating_point() and "embedding" not in name:
            scale = tensor.abs().max() / 448
            packed[name] = (tensor / scale).to(torch.float8_e4m3fn)
            packed[name.removesuffix("weight") + "scale_weight"] = scale
        else:
            packed |= _half({name: tensor})
    return packed


def _umt5_of_transformers() -> dict[str, Tensor]:
    """UMT5 in transformers' names, the embedding once, with a SentencePiece model of our words inside."""
    import sentencepiece
    from transformers import UMT5Config, UMT5EncoderModel

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(WORDS)] * 4), model_writer=model, vocab_size=40, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    torch.manual_seed(3)
    words = {"vocab_size": 40, "d_model": 24, "d_kv": 12, "d_ff": 40, "num_layers": 2, "num_heads": 2}
    tensors = UMT5EncoderModel(UMT5Config(**words, feed_forward_proj="gated-gelu")).state_dict()
    del tensors["encoder.embed_tokens.weight"]
    return tensors | {"spiece_model": torch.frombuffer(bytearray(model.getvalue()), dtype=torch.uint8)}


def _clip_of_transformers() -> dict[str, Tensor]:
    """CLIP's visual half in the names of transformers 4, with the projection that nobody needs here."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(4)
    sizes = {"hidden_size": 160, "intermediate_size": 320, "num_hidden_layers": 2, "num_attention_heads": 2}
    tensors = CLIPVisionModel(CLIPVisionConfig(**sizes, patch_size=14)).state_dict()
    named = {f"vision_model.{name.removeprefix('vision_model.')}": tensor for name, tensor in tensors.items()}
    return named | {"visual_projection.weight": torch.zeros(8, 160)}
