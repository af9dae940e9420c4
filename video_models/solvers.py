"""Single-step solvers as pure functions. Only such solvers can be trained through."""

from __future__ import annotations

import torch
from torch import Tensor


def flow_match_sigmas(steps: int, shift: float) -> Tensor:
    """Noise levels of flow matching with a shifted linear schedule.

    ``linspace(1, 1/steps, steps)`` mapped by ``shift * s / (1 + (shift - 1) * s)``, then 0: what
    diffusers' ``FlowMatchEulerDiscreteScheduler`` gives for these explicit sigmas. (Its own default
    shifts ``sigma_min`` twice and ends with an almost empty step, which starves last-step training.)

    Args:
        steps: Number of solver steps, at least 1.
        shift: The model's time shift; 1 leaves the schedule linear.

    Returns:
        ``[steps + 1]`` float64.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    linear = torch.linspace(1.0, 1.0 / steps, steps, dtype=torch.float64)
    shifted = shift * linear / (1 + (shift - 1) * linear)
    return torch.cat([shifted, shifted.new_zeros(1)])


def euler_step(x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """``x + (sigma_next - sigma) * velocity``; to ``sigma_next = 0`` this is the one-step x0."""
    return x + (sigma_next - sigma).to(x.device, x.dtype) * velocity
