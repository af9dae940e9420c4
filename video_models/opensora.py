"""Open-Sora 1.2, text to video, as VADER trains it: our STDiT3 and VAE, T5's text features.

Sources: the publisher's ``opensora`` package at v1.2.0 and VADER (arXiv 2407.08737). One difference is wanted: VADER
gives the sizes as bfloat16, which moves timesteps by up to half a step of 1000; here they are exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .common import check_pairs, draw_noise, freeze, linear_names, move, no_text_encoder, short_hash
from .opensora_text import AESTHETIC_SCORE, clean_caption, with_score
from .opensora_vae import MICRO_FRAMES, frames_of, latents_of
from .protocol import Carried, Conditioning, ModelSpec
from .solvers import flow_match_sigmas

TEXT_TOKENS = 300
IMAGE_FPS = 120
"""What the network is told where there is one frame only."""


@dataclass(frozen=True)
class OpenSoraSpec(ModelSpec):
    """Facts about an Open-Sora model, whose frames come in chunks.

    Attributes:
        micro_frames: Frames of a chunk; the last may be shorter.
    """

    micro_frames: int = MICRO_FRAMES

    frame_rule = "whole chunks of 17 and a rest of 0, 1, 5, 9 or 13"

    def latent_frames(self, frames: int) -> int:
        return latents_of(frames, self.micro_frames, self.temporal_stride)

    def nearest_frames(self, frames: int) -> int:
        around = self.latent_frames(max(1, frames))
        counts = [self.frames_of(latents) for latents in (around - 1, around, around + 1) if latents]
        return min(counts, key=lambda count: abs(count - frames))

    def frames_of(self, latents: int) -> int:
        """Frames of so many latent frames: of a chunk that is not whole the fewest that give them."""
        return frames_of(latents, self.micro_frames, self.temporal_stride)


def time_ratio(height: int, width: int, frames: int) -> float:
    """How much noisier than evenly spaced the walk of a video of this size in pixels is: more for larger ones.

    The publisher counts the latents of whole chunks; where there is none that would be 0, and every latent counts.
    """
    counted = 1 if frames == 1 else frames // MICRO_FRAMES * latents_of(MICRO_FRAMES) or latents_of(frames)
    return math.sqrt(height * width) / 512 * math.sqrt(counted)


def transformed(sigma: Tensor | float, ratio: float) -> Tensor | float:
    """The part of noise, 0..1, at an evenly spaced ``sigma`` (``timestep_transform`` of the publisher)."""
    return ratio * sigma / (1 + (ratio - 1) * sigma)


class OpenSoraModel:
    """Open-Sora 1.2. See :class:`.protocol.VideoModel` for every method.

    ``sigma`` is spaced evenly here; how much noise it means depends on the size of the video, by
    :func:`transformed`.

    Args:
        spec: Facts about the model.
        transformer: :class:`.opensora_transformer.STDiT3`.
        vae: :class:`.opensora_vae.OpenSoraVae`.
        text_encoder, tokenizer: T5 and its tokenizer; may be None when embeddings are given.
        fingerprint: What identifies the text encoder's weights.
    """

    def __init__(
        self,
        spec: OpenSoraSpec,
        transformer: nn.Module,
        vae: nn.Module,
        text_encoder: nn.Module | None = None,
        tokenizer: Any = None,
        fingerprint: str = "",
    ) -> None:
        self.spec = spec
        self.denoisers = {"transformer": transformer}
        self.vae, self.text_encoder, self.tokenizer = vae, text_encoder, tokenizer
        self._fingerprint = fingerprint
        freeze(transformer, vae, text_encoder)

    @property
    def transformer(self) -> nn.Module:
        return self.denoisers["transformer"]

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.x_embedder.proj.weight.dtype  # the table of angles stays float32

    def lora_names(self, expert: str) -> dict[str, str]:
        return linear_names(self.denoisers[expert])

    def text_fingerprint(self) -> str:
        return short_hash("opensora", AESTHETIC_SCORE, self._fingerprint)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> list[Tensor]:
        """T5's view of the cleaned prompt, up to 300 tokens. An empty prompt is no token at all: ``[0, D]``.

        A prompt that names no aesthetic score asks for 6.5, as the publisher's do.
        """
        if self.text_encoder is None:
            raise no_text_encoder(self.spec)
        parameter = next(self.text_encoder.parameters())
        embeddings = []
        for prompt in prompts:  # one by one: a prompt's embedding must not depend on its neighbours
            if not prompt.strip():
                embeddings.append(parameter.new_zeros(0, self.text_encoder.config.d_model))
                continue
            text = clean_caption(with_score(prompt))
            tokens = self.tokenizer(text, truncation=True, max_length=TEXT_TOKENS).input_ids
            ids = torch.tensor([tokens], device=parameter.device)
            embeddings.append(self.text_encoder(ids, torch.ones_like(ids)).last_hidden_state[0])
        return embeddings

    def conditioning(
        self,
        positive: Sequence[Tensor],
        negative: Sequence[Tensor] | None,
        latent_shape: Sequence[int],
        *,
        start_image: Tensor | None = None,
        end_image: Tensor | None = None,
    ) -> Conditioning:
        """As in the protocol. No token at all stands for the caption the network has learnt for none.

        As published, an unwanted branch without a caption has as many tokens of it as the wanted branch of its text.
        """
        if start_image is not None or end_image is not None:
            raise ValueError(f"{self.spec.name} is used as a text-to-video model and takes no start or end image")
        check_pairs(positive, negative)
        none = self.transformer.y_embedder.y_embedding
        wanted = [text if len(text) else none for text in positive]
        unwanted = [
            text if len(text) else none[: len(other)] for text, other in zip(negative or [], wanted, strict=False)
        ]
        longest = max(len(text) for text in wanted + unwanted)
        fps = torch.full((len(wanted),), IMAGE_FPS if latent_shape[1] == 1 else self.spec.fps, device=self.device)

        def branch(texts: Sequence[Tensor]) -> dict[str, Tensor]:
            padded = [F.pad(text.to(self.device, self.dtype), (0, 0, 0, longest - len(text))) for text in texts]
            mask = torch.stack([torch.arange(longest, device=self.device) < len(text) for text in texts])
            return {"text": torch.stack(padded), "mask": mask, "fps": fps}

        return Conditioning(branch(wanted), None if negative is None else branch(unwanted))

    def initial_latents(self, latent_shape: Sequence[int], seeds: Sequence[int]) -> Tensor:
        return draw_noise(latent_shape, seeds, self.device)

    def sigmas(self, steps: int) -> Tensor:
        return flow_match_sigmas(steps, shift=1.0)

    def _size(self, x: Tensor) -> tuple[int, int]:
        return x.shape[3] * self.spec.spatial_stride, x.shape[4] * self.spec.spatial_stride

    def _noise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The part of noise in latents ``x`` at a ``sigma``, float64."""
        return transformed(sigma.double(), time_ratio(*self._size(x), self.spec.frames_of(x.shape[2])))

    def predict(self, x: Tensor, sigma: Tensor, branch: Mapping[str, Tensor]) -> Tensor:
        timestep = (1000 * self._noise(x, sigma)).to(x.device, x.dtype).expand(x.shape[0])
        output = self.transformer(
            x.to(self.dtype), timestep, branch["text"], branch["mask"], branch["fps"], self._size(x)
        )
        return output[:, : x.shape[1]].to(x.dtype)

    def step(
        self, x: Tensor, prediction: Tensor, sigma: Tensor, sigma_next: Tensor, noise: Tensor | None = None
    ) -> Tensor:
        return flow_step(x, prediction, self._noise(x, sigma), self._noise(x, sigma_next))

    def decode(self, latents: Tensor) -> Tensor:
        return torch.cat([self.decode_chunk(part)[0] for part in latents.split(self.chunks(latents.shape[2]), 2)], 2)

    def chunks(self, latent_frames: int) -> list[int]:
        chunk = self.spec.latent_frames(self.spec.micro_frames)
        return [chunk] * (latent_frames // chunk) + [latent_frames % chunk] * (latent_frames % chunk > 0)

    def decode_chunk(
        self, latents: Tensor, carried: Carried = (), *, save_memory: bool = False
    ) -> tuple[Tensor, Carried]:
        """As in the protocol. Nothing is carried: a chunk of the temporal VAE knows nothing of the others."""
        parameter = next(self.vae.parameters())
        pixels = self.vae.decode(latents.to(parameter.device, parameter.dtype), save_memory=save_memory)
        return (pixels.to(latents.dtype) / 2 + 0.5).clamp(0, 1), ()

    def to(self, device: torch.device | str, *parts: str) -> None:
        modules = {"text": self.text_encoder, "denoiser": self.transformer, "vae": self.vae}
        move(modules, device, parts)


def flow_step(x: Tensor, velocity: Tensor, noise: Tensor, noise_next: Tensor) -> Tensor:
    """Euler's step along a velocity that points from noise to data."""
    return x + (noise - noise_next).to(x.device, x.dtype) * velocity
