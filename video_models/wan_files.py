"""Loading Wan from a diffusers folder, or from the folder its publisher (or VideoX-Fun's) ships."""

from __future__ import annotations

from pathlib import Path

import torch

from . import wan_encoder_keys, wan_keys, wan_vae_keys
from .files import WeightFileError, find_weights, read_json
from .loading import (
    Loader,
    build_clip_vision,
    build_t5,
    component,
    load_tokenizer,
    read_options,
    text_files,
)
from .wan import WanModel
from .wan_parts import EXPERTS, FLOAT32_PARTS, Parts, assemble, build_transformer, build_vae

LAYOUTS = (
    "model_index.json of a diffusers WanPipeline or WanImageToVideoPipeline",
    "Wan's own config.json (or high_noise_model and low_noise_model), diffusion_pytorch_model.safetensors and VAE",
)
"""What :func:`detect` looks for, for messages."""

PIPELINES = ("WanPipeline", "WanImageToVideoPipeline")
DIFFUSION_FILE = "diffusion_pytorch_model"
VAE_FILES = ("Wan2.1_VAE", "Wan2.2_VAE")
"""Of TI2V the second; of all others, Wan2.2's too, the first."""
TEXT_FILE = "models_t5_umt5-xxl-enc-bf16"
IMAGE_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14"
TOKENIZERS = ("google/umt5-xxl", "umt5-xxl", "tokenizer")


def detect(folder: Path) -> bool:
    """Whether a folder holds a Wan model in one of the two layouts."""
    if (folder / "model_index.json").is_file():
        return read_json(folder / "model_index.json").get("_class_name") in PIPELINES
    configs = [path / "config.json" for path in (folder, *_expert_folders(folder)) if (path / "config.json").is_file()]
    vae = any(find_weights(folder, file) is not None for file in VAE_FILES)
    return bool(configs) and (vae or read_json(configs[0]).get("_class_name") == "WanModel")


def load(
    folder: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", text: bool = True
) -> WanModel:
    """Load what :func:`detect` recognised.

    A file ``reward_lora.json`` in the folder may override the model's defaults: ``name``, ``width``, ``height``,
    ``frames``, ``steps``, ``guidance_scale``, ``fps``, ``lora_targets``, ``recipe``, ``shift``, ``text_tokens``, and
    ``boundary``, the sigma from which on the expert for high noise works.

    Args:
        folder: The model's folder.
        dtype: Of every network. None chooses float32 for small networks and the VAE, else bfloat16.
        device: Where the networks go, of two experts the first; the CLIP image encoder is loaded to the CPU at the
            first image.
        text: Whether to load the text encoder and its tokenizer.

    Raises:
        WeightFileError: A file is missing, damaged, or of another model.
    """
    parts = _diffusers_parts(folder) if (folder / "model_index.json").is_file() else _original_parts(folder)
    options = read_options(folder, shift=(int, float), text_tokens=int, boundary=(int, float))
    return assemble(parts, folder.resolve().name, options, dtype=dtype, device=device, text=text)


def _expert_folders(folder: Path) -> list[Path]:
    return [folder / f"{expert}_noise_model" for expert in EXPERTS]


def _diffusers_parts(folder: Path) -> Parts:
    places = folder / "model_index.json", folder / "scheduler" / "scheduler_config.json"
    index, scheduler = map(read_json, places)
    names, second = {"transformer": "transformer"}, index.get("transformer_2")
    if isinstance(second, list) and second[:1] not in ([], [None]):
        names = dict(zip(EXPERTS, ("transformer", "transformer_2"), strict=True))
    shift = scheduler.get("flow_shift", scheduler.get("shift"))
    boundary = index.get("boundary_ratio")
    for path, name, value, most in zip(places, ("boundary_ratio", "shift"), (boundary, shift), (1, 1000), strict=True):
        if value is not None and not (isinstance(value, (int, float)) and 0 < value <= most):
            raise WeightFileError(f"the {name} in {path} must lie above 0 and at most at {most}, got {value!r}")
    return Parts(
        denoisers={
            expert: component(folder / name, DIFFUSION_FILE, build_transformer, keep_float32=FLOAT32_PARTS)
            for expert, name in names.items()
        },
        vae=component(folder / "vae", DIFFUSION_FILE, build_vae),
        text_encoder=component(folder / "text_encoder", "model", build_t5),
        image_encoder=component(folder / "image_encoder", "model", build_clip_vision),
        tokenizer=lambda: load_tokenizer(folder / "tokenizer"),
        text_files=text_files(find_weights(folder / "text_encoder", "model"), folder / "tokenizer"),
        shift=None if shift is None else float(shift),
        boundary=boundary,
        start_in_latents=bool(index.get("expand_timesteps")),
    )


def _original_parts(folder: Path) -> Parts:
    tokenizer = next((folder / name for name in TOKENIZERS if (folder / name).is_dir()), folder / TOKENIZERS[0])
    places = {"transformer": folder}
    if not (folder / "config.json").is_file():
        places = dict(zip(EXPERTS, _expert_folders(folder), strict=True))
    ti2v = len(places) == 1 and read_json(folder / "config.json").get("model_type") == "ti2v"
    return Parts(
        denoisers={
            expert: original_transformer(place, DIFFUSION_FILE, place / "config.json")
            for expert, place in places.items()
        },
        vae=original_vae(folder, VAE_FILES[ti2v]),
        text_encoder=component(
            folder,
            TEXT_FILE,
            build_t5,
            read_config=wan_encoder_keys.umt5_config,
            convert=wan_encoder_keys.convert_umt5,
        ),
        image_encoder=component(
            folder,
            IMAGE_FILE,
            build_clip_vision,
            read_config=wan_encoder_keys.clip_config,
            convert=wan_encoder_keys.convert_clip,
        ),
        tokenizer=lambda: load_tokenizer(tokenizer),
        text_files=text_files(find_weights(folder, TEXT_FILE), tokenizer),
        start_in_latents=ti2v,
    )


def original_transformer(folder: Path, stem: str, config: Path | None = None) -> Loader:
    """How to load a transformer in its publisher's names, with its ``config.json`` if there is one."""
    return component(
        folder,
        stem,
        build_transformer,
        read_config=lambda tensors: wan_keys.transformer_config(tensors, {} if config is None else read_json(config)),
        convert=wan_keys.convert_transformer,
        keep_float32=FLOAT32_PARTS,
    )


def original_vae(folder: Path, stem: str) -> Loader:
    """How to load a VAE in its publisher's names."""
    return component(
        folder,
        stem,
        build_vae,
        read_config=wan_vae_keys.vae_config,
        convert=wan_vae_keys.convert_vae,
    )
