"""Sampling without training: what the generate node, the command line and evaluations share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..video_models.protocol import Conditioning, Tick, VideoModel
from .gradient import Walk, rollout, silent
from .schedule import Plan


@torch.no_grad()
def sample(
    model: VideoModel,
    conditioning: Conditioning,
    seeds: Sequence[int],
    latent_shape: Sequence[int],
    steps: int,
    guidance_scale: float,
    *,
    batched_guidance: bool = True,
    tick: Tick = silent,
) -> Tensor:
    """Videos ``[B, 3, T, H, W]`` in 0..1, one a seed; a video depends on its own seed and prompt alone."""
    walk = Walk(model, conditioning, guidance_scale, batched_guidance, tick)
    noise = model.initial_latents(latent_shape, seeds)
    latents, _ = rollout(walk, noise, Plan(model.sigmas(steps), ()))
    tick("decode")
    return model.decode(latents).float()
