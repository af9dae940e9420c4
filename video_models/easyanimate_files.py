"""Loading EasyAnimate V5 and V5.1 from the folders their publisher ships, or from diffusers' of V5.1."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .easyanimate import EasyAnimateModel, TextTower
from .easyanimate_keys import convert_transformer, transformer_config
from .easyanimate_text import MAX_TOKENS, build_bert, build_qwen, convert_qwen, encode_chat, encode_padded
from .files import WeightFileError, find_weights, fingerprint, read_json
from .loading import Build, build_t5, component, diffusers, load_tokenizer, read_options, text_files
from .protocol import ModelSpec
from .solvers import Ddim, FlowMatch

LAYOUTS = ("transformer/config.json of an EasyAnimateTransformer3DModel, beside vae, text_encoder and scheduler",)
"""What :func:`detect` looks for, for messages."""

WEIGHTS = "diffusion_pytorch_model"

ENCODERS: dict[str, Build] = {"bert": build_bert, "t5": build_t5, "mt5": build_t5, "umt5": build_t5}
"""Of V5, by ``model_type``."""


def detect(folder: Path) -> bool:
    """Whether a folder holds EasyAnimate V5 or V5.1."""
    config = folder / "transformer" / "config.json"
    return config.is_file() and read_json(config).get("_class_name") == "EasyAnimateTransformer3DModel"


def load(
    folder: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", text: bool = True
) -> EasyAnimateModel:
    """Load what :func:`detect` recognised.

    A file ``reward_lora.json`` in the folder may override the model's defaults: ``name``, ``width``, ``height``,
    ``frames``, ``steps``, ``guidance_scale``, ``fps``, ``lora_targets`` and ``recipe``.

    Args:
        folder: The model's folder.
        dtype: Of every network. None chooses float32 for small networks and the VAE, else bfloat16.
        device: Where the networks go.
        text: Whether to load the text encoders and their tokenizers.

    Raises:
        WeightFileError: A file is missing, damaged, or of another model.
    """
    options = read_options(folder)
    config = read_json(folder / "transformer" / "config.json")
    transformer = component(
        folder / "transformer",
        WEIGHTS,
        diffusers("EasyAnimateTransformer3DModel"),
        read_config=lambda tensors: transformer_config(tensors, config),
        convert=convert_transformer,
    )(dtype, device)
    vae = component(folder / "vae", WEIGHTS, build_vae)(dtype or torch.float32, device)
    names = ("text_encoder", "text_encoder_2") if transformer.config.text_embed_dim_t5 else ("text_encoder",)
    towers, files = [], []
    for name in names:
        tokenizer = folder / name.replace("text_encoder", "tokenizer")
        towers.append(_tower(folder / name, tokenizer, dtype, device, text))
        files += text_files(find_weights(folder / name, "model"), tokenizer)
    solver = _solver(folder / "scheduler" / "scheduler_config.json")
    spec = dataclasses.replace(_spec(folder.resolve().name, transformer, vae, solver), **options)
    mark = f"{fingerprint(files)}:{dtype or 'auto'}" if files else ""
    return EasyAnimateModel(spec, transformer, vae, towers, solver, mark)


def _tower(
    folder: Path, tokenizer: Path, dtype: torch.dtype | None, device: torch.device | str, text: bool
) -> TextTower:
    """One text encoder; without ``text`` only what is needed to take a cached embedding apart."""
    kind = read_json(folder / "config.json").get("model_type")
    if kind != "qwen2_vl" and kind not in ENCODERS:
        raise WeightFileError(
            f"{folder} holds the text encoder {kind!r}; EasyAnimate V5 has {' or '.join(ENCODERS)}, V5.1 qwen2_vl"
        )
    chat = kind == "qwen2_vl"
    tokens = min(MAX_TOKENS, int(read_json(tokenizer / "tokenizer_config.json").get("model_max_length") or MAX_TOKENS))
    tower = TextTower(tokens, encode_chat if chat else encode_padded)
    if not text:
        return tower
    build, convert = (build_qwen, convert_qwen) if chat else (ENCODERS[kind], None)
    encoder = component(folder, "model", build, convert=convert)(dtype, device)
    return dataclasses.replace(tower, encoder=encoder, tokenizer=load_tokenizer(tokenizer))


def build_vae(config: Mapping[str, Any]) -> nn.Module:
    """diffusers' ``AutoencoderKLMagvit`` from its own configuration or the publisher's."""
    from diffusers import AutoencoderKLMagvit

    known = inspect.signature(AutoencoderKLMagvit).parameters.keys() & config.keys()
    # The publisher's class norms over time too unless told otherwise, diffusers' does not.
    return AutoencoderKLMagvit(**{"spatial_group_norm": False, **{name: config[name] for name in known}})


def _solver(path: Path) -> Ddim | FlowMatch:
    config = read_json(path)
    kind = FlowMatch if "FlowMatch" in str(config.get("_class_name")) else Ddim
    try:
        return kind.from_config(config)
    except (TypeError, ValueError) as error:
        raise WeightFileError(f"{path} cannot be used: {error}") from None


def _spec(name: str, transformer: nn.Module, vae: nn.Module, solver: Ddim | FlowMatch) -> ModelSpec:
    flow, size = isinstance(solver, FlowMatch), "12b" if transformer.config.num_layers >= 48 else "7b"
    return ModelSpec(
        family="easyanimate",
        name=name,
        latent_channels=transformer.config.out_channels,
        temporal_stride=vae.temporal_compression_ratio,
        spatial_stride=vae.spatial_compression_ratio,
        size_multiple=vae.spatial_compression_ratio * transformer.config.patch_size,
        image_to_video=transformer.config.in_channels != transformer.config.out_channels,
        lora_targets=("all-linear",),  # as the publisher trains its reward LoRAs
        width=672,
        height=384,
        frames=49,
        steps=50,
        guidance_scale=6.0,
        fps=8,
        solver="flow-matching Euler" if flow else f"DDIM, {solver.prediction}",
        recipe="easyanimate-v5.1-12b-inp" if flow else f"easyanimate-v5-{size}-inp",
    )
