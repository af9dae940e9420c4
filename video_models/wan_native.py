"""Wan from tensors that another program holds: the networks are copied, the text encoder for as long as it works."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import wan_encoder_keys, wan_keys, wan_vae_keys
from .files import WeightFileError, parameter_count
from .loading import FLOAT32_BELOW, Build, Loader, build_clip_vision, build_t5, diffusers, materialise
from .sentence_pieces import SentencePiece
from .wan import WanModel
from .wan_parts import EXPERTS, FLOAT32_PARTS, Parts, assemble, build_transformer

SAMPLES = 4096
"""Values of a tensor that :func:`digest` looks at."""


@dataclass(frozen=True)
class Weights:
    """A network's tensors in its publisher's names.

    Attributes:
        borrowed: As the other program holds them; read, never written.
        made: Made for us, from quantised weights or with a LoRA in them; taken as they are.
    """

    borrowed: Mapping[str, Tensor]
    made: Mapping[str, Tensor] = field(default_factory=dict)


Read = Callable[[], Weights]
"""Asked when the network is needed, so that nothing made for us is kept beside the copy."""


@dataclass(frozen=True)
class NativeTransformer:
    """A Wan transformer of another program.

    Attributes:
        read: Its tensors, in the publisher's names.
        heads, eps: What no shape tells.
    """

    read: Read
    heads: int
    eps: float


@dataclass(frozen=True)
class NativeText:
    """A UMT5 encoder of another program.

    Attributes:
        read: Its tensors, in transformers' names.
        tokenizer: Its SentencePiece model.
        fingerprint: Changes with its weights.
    """

    read: Read
    tokenizer: bytes
    fingerprint: str


def load_native(
    transformers: Sequence[NativeTransformer],
    vae: Read,
    text: NativeText,
    clip_vision: Read | None,
    *,
    shift: float | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> tuple[WanModel, str]:
    """A model with weights of its own.

    Args:
        transformers: One, or of Wan2.2 the experts for high and for low noise.
        vae: In its publisher's names.
        text: Copied while texts are encoded.
        clip_vision: CLIP's image encoder, copied when the first image arrives.
        shift: Of the flow-matching schedule; None for the published one.
        dtype: Of every network. None chooses float32 for small networks and the VAE, else bfloat16.
        device: Where the networks go.

    Returns:
        The model, and a digest of everything that decides what it paints from a text.

    Raises:
        WeightFileError: The tensors are no Wan model we know, or do not belong together.
    """
    names = EXPERTS if len(transformers) > 1 else ("transformer",)
    parts = Parts(
        denoisers={name: _transformer(one, name) for name, one in zip(names, transformers, strict=True)},
        vae=_part(vae, "the VAE", diffusers("AutoencoderKLWan"), wan_vae_keys.vae_config, wan_vae_keys.convert_vae),
        text_encoder=lambda dtype, _: VisitingEncoder(lambda where: _text_encoder(text)(dtype, where)),
        image_encoder=_image_encoder(clip_vision),
        tokenizer=lambda: SentencePiece(text.tokenizer),
        text_files=(),
        shift=shift,
        text_fingerprint=text.fingerprint,
    )
    model = assemble(parts, "the MODEL", {}, dtype=dtype, device=device, text=True)
    model.spec = replace(model.spec, name=_name(model))
    seen = {name: digest(network.state_dict()) for name, network in model.denoisers.items()}
    seen |= {"vae": digest(model.vae.state_dict()), "text": text.fingerprint, "shift": shift}
    return model, hashlib.sha256(repr(seen).encode()).hexdigest()[:16]


class VisitingEncoder(nn.Module):
    """A text encoder that is copied to where it works when a text comes, and forgotten when it moves.

    Texts are encoded once and their embeddings kept, so a large encoder need not lie twice in main memory.

    Args:
        load: From a device to the encoder.
    """

    def __init__(self, load: Callable[[torch.device], nn.Module]) -> None:
        super().__init__()
        self._load = load
        self.encoder: nn.Module | None = None
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)

    def forward(self, *inputs: Tensor) -> Any:
        if self.encoder is None:
            self.encoder = self._load(self.place.device)
        return self.encoder(*inputs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VisitingEncoder:
        self.encoder = None
        return super()._apply(fn, recurse)


def network_dtype(weights: Mapping[str, Tensor], dtype: torch.dtype | None) -> torch.dtype:
    """The number type that a network of this size gets."""
    return dtype or (torch.float32 if parameter_count(weights) < FLOAT32_BELOW else torch.bfloat16)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A short hash of names, shapes and a part of the values: cheap, and different for different weights."""
    seen = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // SAMPLES)].cpu().contiguous()
        seen.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        seen.update(sample.view(torch.uint8).numpy().tobytes())
    return seen.hexdigest()[:16]


def _transformer(native: NativeTransformer, expert: str) -> Loader:
    said = {"num_heads": native.heads, "eps": native.eps}
    return _part(
        native.read,
        f"the MODEL for {expert} noise" if expert in EXPERTS else "the MODEL",
        build_transformer,
        lambda tensors: wan_keys.transformer_config(tensors, said),
        wan_keys.convert_transformer,
        FLOAT32_PARTS,
    )


def _text_encoder(text: NativeText) -> Loader:
    return _part(text.read, "the CLIP", build_t5, wan_encoder_keys.umt5_config, wan_encoder_keys.convert_umt5)


def _image_encoder(read: Read | None) -> Loader:
    if read is not None:
        keys = wan_encoder_keys
        return _part(read, "the CLIP_VISION", build_clip_vision, keys.clip_config, keys.convert_clip)

    def load(dtype: torch.dtype | None, device: torch.device | str) -> nn.Module:
        raise WeightFileError("this MODEL sees a start image through CLIP; connect Load CLIP Vision with clip_vision_h")

    return load


def _part(
    read: Read,
    source: str,
    build: Build,
    read_config: Callable[[Mapping[str, Tensor]], Mapping[str, Any]],
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    keep_float32: tuple[str, ...] = (),
) -> Loader:
    """How to load one part: as :func:`.loading.component`, but for the place where its tensors lie."""

    def load(dtype: torch.dtype | None, device: torch.device | str) -> nn.Module:
        weights = read()
        tensors = {**weights.borrowed, **weights.made}
        try:
            config, named = read_config(tensors), convert(tensors)
        except ValueError as error:
            raise WeightFileError(f"{source} cannot be used: {error}") from None
        dtype = network_dtype(tensors, dtype)
        return _own(materialise(build, config, named, Path(source), dtype, device, keep_float32), weights.borrowed)

    return load


def _own(module: nn.Module, borrowed: Mapping[str, Tensor]) -> nn.Module:
    """Copy what still lies where it was borrowed, one tensor at a time."""
    places = {tensor.untyped_storage().data_ptr() for tensor in borrowed.values()}
    for parameter in (*module.parameters(), *module.buffers()):
        if parameter.untyped_storage().data_ptr() in places:
            parameter.data = parameter.data.clone()
    return module


def _name(model: WanModel) -> str:
    """Such as ``Wan-T2V-1.4B``, for nobody says which file it was."""
    config = model.transformer.config
    kind = "I2V" if config.in_channels > config.out_channels else "TI2V" if model.spec.image_to_video else "T2V"
    billions = sum(parameter.numel() for parameter in model.transformer.parameters()) / 1e9
    return f"Wan-{kind}-{billions:.1f}B" + ("-pair" if len(model.denoisers) > 1 else "")
