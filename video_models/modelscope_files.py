"""Loading ModelScope text-to-video from a diffusers folder: ``ali-vilab/text-to-video-ms-1.7b`` and descendants."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .files import WeightFileError, find_weights, fingerprint, read_json
from .loading import build_clip_text, component, diffusers, load_tokenizer, read_options, text_files
from .modelscope import ModelScopeModel
from .protocol import ModelSpec
from .solvers import Ddim

LAYOUTS = ("unet/config.json of a UNet3DConditionModel, beside vae, text_encoder, tokenizer and scheduler",)
"""What :func:`detect` looks for, for messages."""

WEIGHTS = ("diffusion_pytorch_model", "diffusion_pytorch_model.fp16")
TEXT_WEIGHTS = ("model", "model.fp16", "pytorch_model", "pytorch_model.fp16")

ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""What the published VAE calls parts of its attention, and what diffusers calls them since."""


def detect(folder: Path) -> bool:
    """Whether a folder holds ModelScope's text-to-video model."""
    config = folder / "unet" / "config.json"
    return config.is_file() and read_json(config).get("_class_name") == "UNet3DConditionModel"


def load(
    folder: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", text: bool = True
) -> ModelScopeModel:
    """Load what :func:`detect` recognised.

    A file ``reward_lora.json`` in the folder may override the model's defaults: ``name``, ``width``, ``height``,
    ``frames``, ``steps``, ``guidance_scale``, ``fps`` and ``lora_targets``.

    Args:
        folder: The model's folder.
        dtype: Of every network. None chooses float32 for small networks and the VAE, else bfloat16.
        device: Where the networks go.
        text: Whether to load the text encoder and its tokenizer.

    Raises:
        WeightFileError: A file is missing, damaged, or of another model.
    """
    options = read_options(folder)
    unet = component(folder / "unet", _stem(folder / "unet", WEIGHTS), diffusers("UNet3DConditionModel"))(dtype, device)
    vae = component(
        folder / "vae", _stem(folder / "vae", WEIGHTS), diffusers("AutoencoderKL"), convert=_convert_vae
    )(dtype or torch.float32, device)  # fmt: skip
    stem = _stem(folder / "text_encoder", TEXT_WEIGHTS)
    text_encoder = tokenizer = None
    if text:
        text_encoder = component(folder / "text_encoder", stem, build_clip_text)(dtype, device)
        tokenizer = load_tokenizer(folder / "tokenizer")
    files = text_files(find_weights(folder / "text_encoder", stem), folder / "tokenizer")
    mark = f"{fingerprint(files)}:{dtype or 'auto'}" if files else ""
    schedule = folder / "scheduler" / "scheduler_config.json"
    try:
        solver = Ddim.from_config(read_json(schedule))
    except (TypeError, ValueError) as error:
        raise WeightFileError(f"{schedule} cannot be used: {error}") from None
    spec = dataclasses.replace(_spec(folder.resolve().name, unet, vae, solver), **options)
    return ModelScopeModel(spec, unet, vae, solver, text_encoder, tokenizer, mark)


def _stem(folder: Path, stems: tuple[str, ...]) -> str:
    """The first of the names weights are published under that is there, else the first."""
    return next((stem for stem in stems if find_weights(folder, stem) is not None), stems[0])


def _convert_vae(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
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
        recipe="modelscope.yaml",
    )
