"""Loading CogVideoX and CogVideoX-Fun InP; both come as the folder of a diffusers pipeline."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .cogvideox import CogVideoXModel, CogVideoXSpec, resize_positions
from .files import WeightFileError, find_weights, fingerprint, read_json
from .loading import OPTIONS_FILE, build_t5, component, diffusers, load_tokenizer, read_options, text_files
from .solvers import Ddim

LAYOUTS = ("transformer/config.json of a CogVideoXTransformer3DModel, beside vae, text_encoder, tokenizer, scheduler",)
"""What :func:`detect` looks for, for messages."""

TRANSFORMER = "CogVideoXTransformer3DModel"
IMAGE_PIPELINE = "CogVideoXImageToVideoPipeline"
DIFFUSION = "diffusion_pytorch_model"


def detect(folder: Path) -> bool:
    """Whether a folder holds a CogVideoX pipeline; CogVideoX-Fun's may lack ``model_index.json``."""
    config, index = folder / "transformer" / "config.json", folder / "model_index.json"
    if index.is_file() and str(read_json(index).get("_class_name")).startswith("CogVideoX"):
        return True
    return config.is_file() and read_json(config).get("_class_name") == TRANSFORMER


def load(
    folder: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", text: bool = True
) -> CogVideoXModel:
    """Load what :func:`detect` recognised.

    A file ``reward_lora.json`` in the folder may override the model's defaults: ``name``, ``width``, ``height``,
    ``frames``, ``steps``, ``guidance_scale``, ``fps``, ``lora_targets`` and ``snr_shift_scale``.

    Args:
        folder: The model's folder.
        dtype: Of every network. None chooses float32 for small networks and the VAE, else bfloat16.
        device: Where the networks go.
        text: Whether to load the text encoder and its tokenizer.

    Raises:
        WeightFileError: A file is missing, damaged, or of another model.
    """
    config = read_json(folder / "transformer" / "config.json")
    variant = _variant(folder, config)
    options = read_options(folder, snr_shift_scale=(int, float))
    solver = read_solver(folder / "scheduler" / "scheduler_config.json", variant, options.pop("snr_shift_scale", None))
    transformer = component(folder / "transformer", DIFFUSION, build_transformer)(dtype, device)
    if variant != "text":
        resize_positions(transformer)
    vae = component(folder / "vae", DIFFUSION, diffusers("AutoencoderKLCogVideoX"))(dtype or torch.float32, device)
    text_encoder = tokenizer = None
    if text:
        text_encoder = component(folder / "text_encoder", "model", build_t5)(dtype, device)
        tokenizer = load_tokenizer(folder / "tokenizer")
    decisive = text_files(find_weights(folder / "text_encoder", "model"), folder / "tokenizer")
    text_fingerprint = f"{fingerprint(decisive)}:{dtype or 'auto'}" if decisive else ""
    spec = dataclasses.replace(describe(folder.resolve().name, transformer, vae), **options)
    return CogVideoXModel(spec, transformer, vae, solver, text_encoder, tokenizer, text_fingerprint)


def _variant(folder: Path, config: Mapping[str, Any]) -> str:
    """``text``, ``image`` or ``inp``.

    Raises:
        WeightFileError: A relative we cannot run.
    """
    if config.get("patch_size_t") is not None or config.get("ofs_embed_dim") is not None:
        raise WeightFileError(
            f"{folder} is a CogVideoX 1.5 model, whose patches span two latent frames; supported are CogVideoX "
            "2B, 5B, 5B-I2V and CogVideoX-Fun V1 and V1.1 InP"
        )
    channels, out = config.get("in_channels", 16), config.get("out_channels", 16)
    if type(channels) is not int or type(out) is not int:
        raise WeightFileError(f"{folder / 'transformer'} has {channels!r} input and {out!r} output channels; they must "
                              "be whole numbers: download it again")  # fmt: skip
    index = folder / "model_index.json"
    for_images = index.is_file() and read_json(index).get("_class_name") == IMAGE_PIPELINE
    variants = {out: "text", 2 * out + 1: "inp"} | ({2 * out: "image"} if for_images else {})
    if channels not in variants:
        raise WeightFileError(
            f"{folder / 'transformer'} takes {channels} input channels; supported are {out} (text to video), "
            f"{2 * out} (image to video, not control) and {2 * out + 1} (CogVideoX-Fun InP)"
        )
    return variants[channels]


def read_solver(path: Path, variant: str, snr_shift_scale: float | None = None) -> Ddim:
    """DDIM on the schedule of a ``scheduler_config.json``, at trailing timesteps as the publishers sample.

    The InP models are trained, and their reward LoRAs too, with diffusers' plain ``DDIMScheduler``, which does not
    know the ``snr_shift_scale`` that the 2B's file still names: they have none.

    Raises:
        WeightFileError: A schedule there is no linear solver for.
    """
    config = read_json(path)
    if variant == "inp":
        config["snr_shift_scale"] = 1.0
    if snr_shift_scale is not None:
        if snr_shift_scale <= 0:
            raise WeightFileError(f"snr_shift_scale must be above 0 in {OPTIONS_FILE}, got {snr_shift_scale}")
        config["snr_shift_scale"] = snr_shift_scale
    try:
        return Ddim.from_config({**config, "timestep_spacing": "trailing"})
    except ValueError as error:
        raise WeightFileError(f"{path}: {error}") from None


def build_transformer(config: Mapping[str, Any]) -> nn.Module:
    """diffusers' transformer, with its computed position table on the CPU, and VideoX-Fun's one option more."""
    known = {"add_noise_in_inpaint_model": False, **config}
    extra = {"add_noise_in_inpaint_model": known.pop("add_noise_in_inpaint_model")}
    module = diffusers(TRANSFORMER)(known)
    module.register_to_config(**extra)
    patch = module.patch_embed
    if patch.use_positional_embeddings and not patch.use_learned_positional_embeddings:
        with torch.device("cpu"):
            patch.pos_embedding = patch._get_positional_embeddings(
                patch.sample_height, patch.sample_width, patch.sample_frames
            )
    return module


def describe(name: str, transformer: nn.Module, vae: nn.Module) -> CogVideoXSpec:
    """What the model is and does, from its networks."""
    config = transformer.config
    spatial = 2 ** (len(vae.config.block_out_channels) - 1)
    inp = config.in_channels == 2 * config.out_channels + 1
    size = "2b" if not config.use_rotary_positional_embeddings else "5b"
    return CogVideoXSpec(
        family="cogvideox",
        name=name,
        latent_channels=vae.config.latent_channels,
        temporal_stride=int(vae.config.temporal_compression_ratio),
        spatial_stride=spatial,
        size_multiple=spatial * config.patch_size,
        image_to_video=config.in_channels != config.out_channels,
        lora_targets=("all-linear",),  # as VideoX-Fun trains its reward LoRAs
        width=config.sample_width * spatial,
        height=config.sample_height * spatial,
        frames=config.sample_frames,
        steps=50,
        guidance_scale=6.0,
        fps=8,
        solver="DDIM",
        recipe=f"cogvideox-fun-v1.1-{size}-inp" if inp else "",
        most_frames=config.sample_frames,
    )
