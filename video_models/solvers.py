"""Single-step solvers as pure functions. Only such solvers can be trained through."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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


@dataclass(frozen=True)
class Ddim:
    """Deterministic DDIM (arXiv 2010.02502) over a discrete noise schedule.

    A noise level is ``sigma = sqrt(1 - alpha_bar)``. A step leads to the level that the next call of the
    network gets; diffusers always goes down ``T // steps`` timesteps, which is the same where ``steps`` divides T.

    Attributes:
        alphas: ``alpha_bar`` of every timestep, ``[T]`` float64, decreasing.
        last_alpha: ``alpha_bar`` after the last step.
        prediction: What the network gives: ``epsilon`` or ``v_prediction``.
        spacing: Which timesteps are visited: ``leading``, ``trailing`` or ``linspace``.
        offset: Added to the timesteps of ``leading``.
    """

    alphas: Tensor = field(repr=False)
    last_alpha: float = 1.0
    prediction: str = "epsilon"
    spacing: str = "leading"
    offset: int = 0

    def __post_init__(self) -> None:
        allowed = {"prediction": ("epsilon", "v_prediction"), "spacing": ("leading", "trailing", "linspace")}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be one of {', '.join(values)}, got {getattr(self, name)!r}")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Ddim:
        """From a ``scheduler_config.json`` of diffusers' ``DDIMScheduler``, ``CogVideoXDDIMScheduler`` and relatives.

        Raises:
            ValueError: A schedule or an option there is no linear solver for.
        """
        for name in ("clip_sample", "thresholding", "trained_betas"):
            if config.get(name):
                raise ValueError(f"the scheduler's {name} must be off; a clipped or foreign schedule is not supported")
        count = int(config.get("num_train_timesteps", 1000))
        start, end = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
        kind = config.get("beta_schedule", "linear")
        if kind == "scaled_linear":
            betas = torch.linspace(start**0.5, end**0.5, count, dtype=torch.float64).square()
        elif kind == "linear":
            betas = torch.linspace(start, end, count, dtype=torch.float64)
        else:
            raise ValueError(f"beta_schedule must be linear or scaled_linear, got {kind!r}")
        alphas = (1 - betas).cumprod(0)
        shift = float(config.get("snr_shift_scale", 1.0))
        alphas = alphas / (shift + (1 - shift) * alphas)
        if config.get("rescale_betas_zero_snr"):  # arXiv 2305.08891, algorithm 1
            roots = alphas.sqrt()
            alphas = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])).square()
        return cls(
            alphas,
            last_alpha=1.0 if config.get("set_alpha_to_one", True) else float(alphas[0]),
            prediction=config.get("prediction_type", "epsilon"),
            spacing=config.get("timestep_spacing", "leading"),
            offset=int(config.get("steps_offset", 0)),
        )

    def sigmas(self, steps: int) -> Tensor:
        """The ``steps + 1`` noise levels, float64, decreasing."""
        count = len(self.alphas)
        if not 1 <= steps <= count:
            raise ValueError(f"steps must lie in 1..{count}, got {steps}")
        place = torch.arange(steps, dtype=torch.float64)
        if self.spacing == "leading":
            timesteps = (place * (count // steps)).flip(0) + self.offset
        elif self.spacing == "trailing":
            timesteps = (count - place * (count / steps)).round() - 1
        else:
            timesteps = torch.linspace(0, count - 1, steps, dtype=torch.float64).round().flip(0)
        alphas = self.alphas[timesteps.long().clamp(max=count - 1)]
        return (1 - torch.cat([alphas, alphas.new_tensor([self.last_alpha])])).sqrt()

    def timestep(self, sigma: Tensor) -> Tensor:
        """The timestep (a scalar, int64) whose noise level is nearest to ``sigma``."""
        return ((1 - self.alphas).sqrt() - sigma.to(self.alphas)).abs().argmin()

    def step(self, x: Tensor, prediction: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """``sqrt(1 - sigma_next^2) * x0 + sigma_next * noise``, both told from ``x`` and the prediction."""
        sigma, sigma_next = (value.to("cpu", torch.float64) for value in (sigma, sigma_next))
        root, root_next = ((1 - value.square()).sqrt() for value in (sigma, sigma_next))
        if self.prediction == "epsilon":
            of_x, of_prediction = root_next / root, sigma_next - root_next * sigma / root
        else:
            of_x = root_next * root + sigma_next * sigma
            of_prediction = sigma_next * root - root_next * sigma
        return float(of_x) * x + float(of_prediction) * prediction
