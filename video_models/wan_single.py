"""Loading Wan from single files as ComfyUI keeps them: diffusion model, text encoder, VAE, and CLIP for images.

The transformer and the VAE have their publisher's names, UMT5 and CLIP those of transformers, or their publisher's too.
UMT5's file carries its tokenizer: ``spiece_model``, a SentencePiece model as bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..files import existing
from . import wan_encoder_keys
from .files import WeightFileError, read_weights
from .loading import Loader, ModelFiles, build_clip_vision, build_t5, component
from .sentence_pieces import SentencePiece
from .wan import WanModel
from .wan_files import original_transformer, original_vae
from .wan_parts import EXPERTS, Parts, assemble


def load_files(
    files: ModelFiles, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", text: bool = True
) -> WanModel:
    """Load a model called like its (first) diffusion file.

    Args:
        files: Where its parts lie.
        dtype: Of every network. None chooses float32 for small networks and the VAE, else bfloat16; so float8 files
            become bfloat16.
        device: Where the networks go, of two experts the first; the CLIP image encoder is loaded to the CPU at the
            first image.
        text: Whether to load the text encoder and its tokenizer.

    Raises:
        WeightFileError: A file is missing, damaged, or of another model.
    """
    given = {field.name: getattr(files, field.name) for field in fields(files)}
    paths = {name: existing(Path(path)) for name, path in given.items() if path}
    denoisers = {"transformer": paths["diffusion"]}
    if "diffusion_low" in paths:
        denoisers = dict(zip(EXPERTS, (paths["diffusion"], paths["diffusion_low"]), strict=True))
    parts = Parts(
        denoisers={expert: original_transformer(path.parent, path.name) for expert, path in denoisers.items()},
        vae=original_vae(paths["vae"].parent, paths["vae"].name),
        text_encoder=component(
            paths["text"].parent,
            paths["text"].name,
            build_t5,
            read_config=wan_encoder_keys.umt5_config,
            convert=wan_encoder_keys.convert_umt5,
        ),
        image_encoder=_image_encoder(paths.get("clip_vision"), paths["diffusion"]),
        tokenizer=partial(tokenizer_inside, paths["text"]),
        text_files=(paths["text"],),
    )
    return assemble(parts, paths["diffusion"].stem, {}, dtype=dtype, device=device, text=text)


def _image_encoder(path: Path | None, diffusion: Path) -> Loader:
    if path is not None:
        return component(
            path.parent,
            path.name,
            build_clip_vision,
            read_config=wan_encoder_keys.clip_config,
            convert=wan_encoder_keys.convert_clip,
        )

    def load(dtype: torch.dtype | None, device: torch.device | str) -> nn.Module:
        raise WeightFileError(f"{diffusion.name} sees a start image through CLIP; give clip_vision_h.safetensors too")

    return load


def tokenizer_inside(path: Path) -> SentencePiece:
    """The tokenizer that a text encoder's file carries.

    Raises:
        WeightFileError: It carries none.
    """
    packed: Mapping[str, Tensor] = read_weights(path)
    if "spiece_model" not in packed:
        raise WeightFileError(
            f"{path} has no tokenizer inside (spiece_model); take ComfyUI's umt5_xxl_fp16.safetensors or fp8_e4m3fn"
        )
    try:
        return SentencePiece(packed["spiece_model"].numpy().tobytes())
    except RuntimeError:
        raise WeightFileError(f"the tokenizer inside {path} is damaged; download the file again") from None
