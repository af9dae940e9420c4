"""VideoCrafter2's diffusion: DDIM on noise predictions, with signals that shrink where the noise is strong.

A noisy latent is ``sqrt(a_t) * scale_t * x0 + sqrt(1 - a_t) * noise``. DDIM: arXiv 2010.02502; the scale is the
``use_scale`` of the publisher's ``lvdm/models/ddpm3d.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Diffusion:
    """The noise of every timestep.

    Attributes:
        alphas: Cumulative products ``[N]`` of ``1 - beta``, float64; the share of the signal's variance.
        scales: What the signal is multiplied with besides, ``[N]`` float64.
    """

    alphas: Tensor = field(repr=False)
    scales: Tensor = field(repr=False)

    @property
    def levels(self) -> Tensor:
        """``sigma = sqrt(1 - alpha)`` of each timestep, ascending."""
        return (1 - self.alphas).sqrt()

    def timestep(self, sigma: Tensor | float) -> int:
        """The timestep whose noise level is nearest."""
        return int((self.levels - float(sigma)).abs().argmin())


def scaled_diffusion(
    start: float = 0.00085,
    end: float = 0.012,
    timesteps: int = 1000,
    scale_start: float = 1.0,
    scale_end: float = 0.7,
    scale_steps: int = 400,
) -> Diffusion:
    """VideoCrafter2's diffusion, or one like it.

    Args:
        start, end: First and last beta; their square roots are spaced evenly.
        timesteps: How many there are.
        scale_start, scale_end, scale_steps: The signal's scale falls evenly from start to end in this many
            timesteps and stays there.
    """
    betas = torch.linspace(start**0.5, end**0.5, timesteps, dtype=torch.float64) ** 2
    falling = torch.linspace(scale_start, scale_end, scale_steps, dtype=torch.float64)
    staying = falling.new_full((timesteps,), scale_end)
    alphas, scales = (1 - betas).cumprod(0), torch.cat([falling, staying])[:timesteps]
    return Diffusion(alphas.float().double(), scales.float().double())  # the publisher keeps them in float32


def ddim_timesteps(diffusion: Diffusion, steps: int) -> list[int]:
    """The timesteps of a walk, descending: every ``N // steps``-th, plus one, as published.

    Where ``steps`` does not divide the number of timesteps, there are a few more of them.

    Raises:
        ValueError: ``steps`` is not within 1..N.
    """
    count = len(diffusion.alphas)
    if not 1 <= steps <= count:
        raise ValueError(f"steps must lie in 1..{count}, got {steps}")
    # The publisher's sampler fails where the last one would lie behind the end; without it, it works.
    return [t for t in range(1, count + 1, count // steps) if t < count][::-1]


def ddim_sigmas(diffusion: Diffusion, steps: int) -> Tensor:
    """Noise levels to walk, float64: those of :func:`ddim_timesteps`, then timestep 0, where the walk ends."""
    return diffusion.levels[[*ddim_timesteps(diffusion, steps), 0]]


def ddim_factors(
    diffusion: Diffusion, sigma: Tensor | float, sigma_next: Tensor | float, eta: float
) -> tuple[float, float, float, float, float]:
    """Factors of one step: of the sample and the prediction in x0, then of x0, prediction and noise in the result."""
    now = diffusion.timestep(sigma)
    alpha, scale = float(diffusion.alphas[now]), float(diffusion.scales[now])
    alpha_next, scale_next = 1.0, 1.0
    if float(sigma_next) > 0:
        after = diffusion.timestep(sigma_next)
        alpha_next, scale_next = float(diffusion.alphas[after]), float(diffusion.scales[after])
    noise = eta * math.sqrt((1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next))
    to_x0 = 1 / (math.sqrt(alpha) * scale)
    direction = math.sqrt(max(0.0, 1 - alpha_next - noise**2))
    return to_x0, -math.sqrt(1 - alpha) * to_x0, math.sqrt(alpha_next) * scale_next, direction, noise


def ddim_step(
    diffusion: Diffusion,
    x: Tensor,
    prediction: Tensor,
    sigma: Tensor | float,
    sigma_next: Tensor | float,
    eta: float,
    noise: Tensor | None = None,
) -> Tensor:
    """One step: linear in sample and prediction, plus ``noise`` times its factor. To ``sigma_next = 0`` this is x0.

    Args:
        diffusion: The noise of every timestep.
        x: Noisy latents.
        prediction: The predicted noise, guided.
        sigma, sigma_next: Noise levels, of :func:`ddim_sigmas` or 0.
        eta: Share of fresh noise: 0 is DDIM, 1 is ancestral sampling.
        noise: Standard normal, shaped like ``x``; None adds none.
    """
    x_to_x0, prediction_to_x0, from_x0, direction, fresh = ddim_factors(diffusion, sigma, sigma_next, eta)
    result = from_x0 * (x_to_x0 * x + prediction_to_x0 * prediction) + direction * prediction
    return result if noise is None else result + fresh * noise
