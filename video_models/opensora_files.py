"""Loading Open-Sora 1.2 from the three folders its publisher names: denoiser, VAE, T5."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import opensora_vae
from .base_models import BASE_MODELS
from .files import WeightFileError, find_weights, fingerprint, read_json
from .loading import build_t5, component, load_tokenizer, read_options, text_files
from .opensora import OpenSoraModel, OpenSoraSpec
from .opensora_transformer import STDiT3, STDiT3Config
from .opensora_vae import MICRO_FRAMES, OpenSoraVae, TemporalConfig

DENOISER = "OpenSora-STDiT-v3"
VAE = "OpenSora-VAE-v1.2"
TEXT = "t5-v1_1-xxl"

LAYOUTS = (f"Open-Sora 1.2's {DENOISER} (config.json of an STDiT3), with {VAE} and {TEXT} in it or beside it",)
"""What :func:`detect` looks for, for messages."""

NETWORK = {"qk_norm": True, "only_train_temporal": False, "skip_y_embedder": False}
"""Switches of the publisher's network that Open-Sora 1.2 has so and not otherwise."""


def detect(folder: Path) -> bool:
    """Whether a folder holds Open-Sora 1.2's denoiser, itself or in a folder of the publisher's name."""
    config = _denoiser(folder) / "config.json"
    return config.is_file() and read_json(config).get("model_type") == "STDiT3"


def _denoiser(folder: Path) -> Path:
    return folder / DENOISER if (folder / DENOISER).is_dir() else folder


def load(
    folder: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", text: bool = True
) -> OpenSoraModel:
    """Load what :func:`detect` recognised.

    A file ``reward_lora.json`` in the folder may override the model's defaults: ``name``, ``width``, ``height``,
    ``frames``, ``steps``, ``guidance_scale``, ``fps`` (also told to the network) and ``lora_targets``.

    Args:
        folder: The denoiser's folder, or one that holds all three.
        dtype: Of every network. None chooses float32 for small networks and the VAE, else bfloat16.
        device: Where the networks go.
        text: Whether to load T5 and its tokenizer.

    Raises:
        WeightFileError: A folder or file is missing, damaged, or of another model.
    """
    denoiser = _denoiser(folder)
    options = read_options(folder)
    transformer = component(denoiser, "model", _build_transformer, keep_float32=("rope",))(dtype, device)
    vae_folder = _part(folder, VAE)
    micro_frames = read_json(vae_folder / "config.json").get("micro_frame_size") or MICRO_FRAMES
    vae = component(
        vae_folder,
        "model",
        _build_vae,
        read_config=lambda tensors: {**_vae_config(tensors), "micro_frames": micro_frames},
        keep_float32=("scale", "shift"),
    )(dtype or torch.float32, device)
    text_encoder = tokenizer = None
    text_folder = _part(folder, TEXT, needed=text)
    stem = "model" if find_weights(text_folder, "model") else "pytorch_model"
    if text:
        text_encoder = component(text_folder, stem, build_t5)(dtype, device)
        tokenizer = load_tokenizer(text_folder)
    files = text_files(find_weights(text_folder, stem), text_folder)
    spec = dataclasses.replace(describe(folder.resolve().name, transformer, vae), **options)
    return OpenSoraModel(
        spec, transformer, vae, text_encoder, tokenizer, f"{fingerprint(files)}:{dtype or 'auto'}" if files else ""
    )


def _part(folder: Path, name: str, *, needed: bool = True) -> Path:
    """The folder called ``name`` in the model's folder or beside it."""
    places = (folder / name, folder.resolve().parent / name)
    found = next((place for place in places if place.is_dir()), None)
    if found is None and needed:
        repository = next(part for part in BASE_MODELS[DENOISER].parts if part.endswith(f"/{name}"))
        raise WeightFileError(
            f"{name}, which belongs to Open-Sora 1.2, is neither in {folder} nor beside it; "
            f"download https://huggingface.co/{repository} into {places[0]}"
        )
    return found or places[0]


def network_config(published: Mapping[str, Any]) -> STDiT3Config:
    """The denoiser's sizes out of the publisher's configuration.

    Raises:
        ValueError: An option with which the network would not be Open-Sora 1.2's.
    """
    for option, value in NETWORK.items():
        if bool(published.get(option, value)) != value:
            raise ValueError(f"{option} must be {value} in Open-Sora 1.2, got {published[option]}")
    return STDiT3Config(**_given(STDiT3Config, published))


def temporal_config(published: Mapping[str, Any]) -> TemporalConfig:
    """The sizes of the VAE's temporal part out of the publisher's configuration."""
    return TemporalConfig(**_given(TemporalConfig, published))


def _given(kind: type, published: Mapping[str, Any]) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(kind) if field.name in published]
    return {name: tuple(v) if isinstance(v := published[name], list) else v for name in names}


def _build_transformer(config: Mapping[str, Any]) -> nn.Module:
    return STDiT3(network_config(config))


def _vae_config(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    read: dict[str, Callable[[Mapping[str, Tensor]], Any]]
    read = {"spatial": opensora_vae.spatial_config, "temporal": opensora_vae.temporal_config}
    try:
        return {part: function(tensors) for part, function in read.items()}
    except KeyError as error:
        raise ValueError(f"it lacks {error}; it is probably another model's or an incomplete download") from None


def _build_vae(config: Mapping[str, Any]) -> nn.Module:
    from diffusers import AutoencoderKL

    return OpenSoraVae(AutoencoderKL(**config["spatial"]), config["temporal"], config["micro_frames"])


def describe(name: str, transformer: STDiT3, vae: OpenSoraVae) -> OpenSoraSpec:
    """What the model is and does, from its networks."""
    spatial = 2 ** (len(vae.spatial_vae["module"].config.block_out_channels) - 1)
    return OpenSoraSpec(
        family="opensora",
        name=name,
        latent_channels=transformer.config.in_channels,
        temporal_stride=vae.temporal_vae.config.stride,
        spatial_stride=spatial,
        size_multiple=spatial,
        image_to_video=False,
        lora_targets=("qkv", "q_linear", "kv_linear"),  # as VADER trains
        width=368,
        height=272,
        frames=51,
        steps=30,
        guidance_scale=7.0,
        fps=24,
        solver="rectified-flow Euler",
        recipe="opensora-1.2",
        micro_frames=vae.micro_frames,
    )
