"""Loading ModelScope text-to-video, from a diffusers folder or from the one its publisher ships."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .files import WeightFileError, find_weights, fingerprint, read_json
from .loading import (
    Loader,
    build_clip_text,
    component,
    diffusers,
    load_tokenizer,
    open_clip_tokenizer,
    read_options,
    text_files,
)
from .modelscope import ModelScopeModel
from .modelscope_keys import VAE_PREFIX, convert_unet, unet_config
from .protocol import ModelSpec
from .solvers import Ddim
from .videocrafter_keys import convert_text, convert_vae, text_config, vae_config

LAYOUTS = (
    "unet/config.json of a UNet3DConditionModel, beside vae, text_encoder, tokenizer and scheduler",
    "ModelScope's text2video_pytorch_model.pth, VQGAN_autoencoder.pth and open_clip_pytorch_model.bin",
)
"""What :func:`detect` looks for, for messages."""

WEIGHTS = ("diffusion_pytorch_model", "diffusion_pytorch_model.fp16")
TEXT_WEIGHTS = ("model", "model.fp16", "pytorch_model", "pytorch_model.fp16")

UNET_FILE = "text2video_pytorch_model"
VAE_FILE = "VQGAN_autoencoder"
TEXT_FILE = "open_clip_pytorch_model"
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULE |= {"set_alpha_to_one": False, "steps_offset": 1}
"""The publisher's ``linear_sd`` and ``ddim_sample_loop``."""

ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""What the diffusers folder's VAE calls parts of its attention, and what diffusers calls them since."""


def detect(folder: Path) -> bool:
    """Whether a folder holds ModelScope's text-to-video model in one of the two layouts."""
    config = folder / "unet" / "config.json"
    if config.is_file():
        return read_json(config).get("_class_name") == "UNet3DConditionModel"
    return find_weights(folder, UNET_FILE) is not None


def load(
    folder: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", text: bool = True
) -> ModelScopeModel:
    """Load what :func:`detect` recognised.

    A file ``reward_lora.json`` in the folder may override the model's defaults: ``name``, ``width``, ``height``,
    ``frames``, ``steps``, ``guidance_scale``, ``fps``, ``lora_targets`` and ``recipe``.

    Args:
        folder: The model's folder.
        dtype: Of every network. None chooses float32 for small networks and the VAE, else bfloat16.
        device: Where the networks go.
        text: Whether to load the text encoder and its tokenizer.

    Raises:
        WeightFileError: A file is missing, damaged, or of another model.
    """
    options = read_options(folder)
    parts = _diffusers_parts(folder) if (folder / "unet").is_dir() else _original_parts(folder)
    unet, vae = parts.unet(dtype, device), parts.vae(dtype or torch.float32, device)
    text_encoder = tokenize = None
    if text:
        text_encoder = parts.text_encoder(dtype, device)
        tokenize = parts.tokenizer(text_encoder.config.max_position_embeddings)
    mark = f"{fingerprint(parts.text_files)}:{dtype or 'auto'}" if parts.text_files else ""
    try:
        solver = Ddim.from_config(parts.schedule)
    except (TypeError, ValueError) as error:
        raise WeightFileError(f"the scheduler of {folder} cannot be used: {error}") from None
    spec = dataclasses.replace(_spec(folder.resolve().name, unet, vae, solver), **options)
    return ModelScopeModel(spec, unet, vae, solver, text_encoder, tokenize, mark)


@dataclasses.dataclass(frozen=True)
class _Parts:
    """How to load each part of a model; the same for both layouts."""

    unet: Loader
    vae: Loader
    text_encoder: Loader
    tokenizer: Callable[[int], Callable[[str], Sequence[int]]]
    text_files: tuple[Path, ...]
    schedule: Mapping[str, Any]


def _diffusers_parts(folder: Path) -> _Parts:
    unet, vae, text = (folder / name for name in ("unet", "vae", "text_encoder"))
    stem = _stem(text, TEXT_WEIGHTS)

    def tokenizer(tokens: int) -> Callable[[str], Sequence[int]]:
        vocabulary = load_tokenizer(folder / "tokenizer")
        padded = {"padding": "max_length", "max_length": tokens, "truncation": True}
        return lambda prompt: vocabulary(prompt, **padded).input_ids

    return _Parts(
        unet=component(unet, _stem(unet, WEIGHTS), diffusers("UNet3DConditionModel")),
        vae=component(vae, _stem(vae, WEIGHTS), diffusers("AutoencoderKL"), convert=rename_attention),
        text_encoder=component(text, stem, build_clip_text),
        tokenizer=tokenizer,
        text_files=text_files(find_weights(text, stem), folder / "tokenizer"),
        schedule=read_json(folder / "scheduler" / "scheduler_config.json"),
    )


def _original_parts(folder: Path) -> _Parts:
    def tokenizer(tokens: int) -> Callable[[str], Sequence[int]]:
        tokenize = open_clip_tokenizer(tokens)
        return lambda prompt: tokenize([prompt])[0].tolist()

    text = find_weights(folder, TEXT_FILE)
    return _Parts(
        unet=component(
            folder, UNET_FILE, diffusers("UNet3DConditionModel"), read_config=unet_config, convert=convert_unet
        ),
        vae=component(
            folder,
            VAE_FILE,
            diffusers("AutoencoderKL"),
            read_config=_told(lambda tensors: vae_config(_first_stage(tensors))),
            convert=lambda tensors: convert_vae(_first_stage(tensors)),
        ),
        text_encoder=component(
            folder, TEXT_FILE, build_clip_text, read_config=_told(text_config), convert=convert_text
        ),
        tokenizer=tokenizer,
        text_files=() if text is None else (text,),
        schedule=SCHEDULE,
    )


def _told(read: Callable[[Mapping[str, Tensor]], dict[str, Any]]) -> Callable[[Mapping[str, Tensor]], dict[str, Any]]:
    """The same reader of a configuration, with a sentence for what is missing."""

    def checked(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        try:
            return read(tensors)
        except KeyError as error:
            raise ValueError(f"{error} is missing; it is probably another kind of model") from None

    return checked


def _first_stage(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The VAE out of a whole Stable Diffusion checkpoint, which the published file is, or alone as it may be."""
    mine = {n.removeprefix(VAE_PREFIX): tensor for n, tensor in tensors.items() if n.startswith(VAE_PREFIX)}
    return mine or dict(tensors)


def _stem(folder: Path, stems: tuple[str, ...]) -> str:
    """The first of the names weights are published under that is there, else the first."""
    return next((stem for stem in stems if find_weights(folder, stem) is not None), stems[0])


def rename_attention(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A VAE's tensors under the names diffusers has today."""

    def rename(name: str) -> str:
        match = re.fullmatch(r"(.+\.attentions\.\d+\.)(\w+)(\.\w+)", name)
        return f"{match[1]}{ATTENTION.get(match[2], match[2])}{match[3]}" if match else name

    return {rename(name): tensor for name, tensor in tensors.items()}


def _spec(name: str, unet: nn.Module, vae: nn.Module, solver: Ddim) -> ModelSpec:
    spatial = 2 ** (len(vae.config.block_out_channels) - 1)
    return ModelSpec(
        family="modelscope",
        name=name,
        latent_channels=unet.config.in_channels,
        temporal_stride=1,  # every frame is a latent: any number of them
        spatial_stride=spatial,
        size_multiple=spatial,
        image_to_video=False,
        lora_targets=("all-linear",),  # VADER trains these and the convolutions
        width=256,
        height=256,
        frames=16,
        steps=25,
        guidance_scale=9.0,
        fps=8,
        solver=f"DDIM, {solver.prediction}",
        recipe="modelscope",
    )
