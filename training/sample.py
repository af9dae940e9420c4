"""Sampling without training: what the generate node, the command line and evaluations share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..video_models.protocol import Conditioning, Tick, VideoModel
from .gradient import Walk, check_interval, rollout, silent
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
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    batched_guidance: bool = True,
    tick: Tick = silent,
) -> Tensor:
    """Videos ``[B, 3, T, H, W]`` in 0..1, one a seed; a video depends on its own seed and prompt alone."""
    walk = Walk(model, conditioning, guidance_scale, batched_guidance, tick, seeds, guidance_interval)
    noise = model.initial_latents(latent_shape, seeds)
    latents, _ = rollout(walk, noise, Plan(model.sigmas(steps), ()))
    tick("decode")
    return model.decode(latents).float()


def sample_prompt(
    model: VideoModel,
    prompt: str,
    seed: int,
    *,
    negative_prompt: str = "",
    width: int = 0,
    height: int = 0,
    frames: int = 0,
    steps: int = 0,
    guidance_scale: float = 0.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    start_image: Tensor | None = None,
    end_image: Tensor | None = None,
    tick: Tick = silent,
) -> Tensor:
    """One video ``[1, 3, T, H, W]`` of one prompt; 0 takes the model's default for any number.

    Raises:
        ValueError: A size or frame count the model does not have, naming the nearest it has; or no interval.
    """
    check_interval(guidance_interval)
    spec = model.spec
    shape = spec.latent_shape(width or spec.width, height or spec.height, frames or spec.frames)
    scale = guidance_scale or spec.guidance_scale
    tick("text")
    positive = model.encode_text([prompt])
    negative = model.encode_text([negative_prompt]) if scale != 1 else None
    tick("rollout")  # the denoiser is where the conditioning shall be
    conditioning = model.conditioning(positive, negative, shape, start_image=start_image, end_image=end_image)
    return sample(model, conditioning, [seed], shape, steps or spec.steps, scale, guidance_interval=guidance_interval,
                  tick=tick)  # fmt: skip
