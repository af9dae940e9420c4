"""Single-step solvers as pure functions. Only such solvers can be trained through."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
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


def _number(config: Mapping[str, Any], name: str, default: float) -> float:
    value = config.get(name, default)
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} must be a number, got {value!r}")
    return float(value)


@dataclass(frozen=True)
class FlowMatch:
    """Flow matching with a shifted schedule and Euler steps, asked as :class:`Ddim`.

    Attributes:
        shift: The model's time shift.
    """

    shift: float = 1.0

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> FlowMatch:
        """From the ``scheduler_config.json`` of diffusers' ``FlowMatchEulerDiscreteScheduler``.

        A dynamic shift is taken at ``mu = 1``, that is e, as EasyAnimate's pipelines do.
        """
        return cls(math.e if config.get("use_dynamic_shifting") else _number(config, "shift", 1.0))

    def sigmas(self, steps: int) -> Tensor:
        return flow_match_sigmas(steps, self.shift)

    def timestep(self, sigma: Tensor) -> Tensor:
        return sigma * 1000

    def step(self, x: Tensor, prediction: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        return euler_step(x, prediction, sigma, sigma_next)


@dataclass(frozen=True)
class Ddim:
    """Deterministic DDIM (arXiv 2010.02502) over a discrete noise schedule, walking as diffusers' ``DDIMScheduler``.

    A noise level is ``sigma = sqrt(1 - alpha_bar)``. diffusers always goes down ``T // steps`` timesteps. Where
    ``steps`` does not divide T, ``trailing`` latents arrive one timestep noisier than the next call of the network
    is told; such a level is written as the mean of the two.

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
        count = _number(config, "num_train_timesteps", 1000)
        start, end = _number(config, "beta_start", 1e-4), _number(config, "beta_end", 0.02)
        if not 1 <= count <= 100_000 or not 0 < start <= end < 1:
            raise ValueError(
                "num_train_timesteps must lie in 1..100000, and 0 < beta_start <= beta_end < 1, got "
                f"{count:g}, {start:g} and {end:g}"
            )
        count = int(count)
        kind = config.get("beta_schedule", "linear")
        if kind == "scaled_linear":
            betas = torch.linspace(start**0.5, end**0.5, count, dtype=torch.float64).square()
        elif kind == "linear":
            betas = torch.linspace(start, end, count, dtype=torch.float64)
        else:
            raise ValueError(f"beta_schedule must be linear or scaled_linear, got {kind!r}")
        alphas = (1 - betas).cumprod(0)
        shift = _number(config, "snr_shift_scale", 1.0)
        alphas = alphas / (shift + (1 - shift) * alphas)
        if config.get("rescale_betas_zero_snr"):  # arXiv 2305.08891, algorithm 1
            roots = alphas.sqrt()
            alphas = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])).square()
        return cls(
            alphas,
            last_alpha=1.0 if config.get("set_alpha_to_one", True) else float(alphas[0]),
            prediction=config.get("prediction_type", "epsilon"),
            spacing=config.get("timestep_spacing", "leading"),
            offset=int(_number(config, "steps_offset", 0)),
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
            # numpy's own rounding decides some timesteps of diffusers; it may also add one step too many.
            timesteps = torch.from_numpy(np.arange(count, 0, -count / steps)[:steps]).round() - 1
        else:
            timesteps = torch.linspace(0, count - 1, steps, dtype=torch.float64).round().flip(0)
        asked = timesteps.long().clamp(max=count - 1)
        levels = self._levels()
        end = (1 - levels.new_tensor([self.last_alpha])).sqrt()
        if self.spacing == "linspace":  # the two walks lie too far apart to follow both: to the level asked next
            return torch.cat([levels[asked + 1], end])
        arrived = (asked - count // steps).clamp(min=-1)
        between = (levels[asked[1:] + 1] + levels[arrived[:-1] + 1]) / 2
        last = levels[arrived[-1:] + 1] if arrived[-1] >= 0 else end
        return torch.cat([levels[asked[:1] + 1], between, last])

    def _levels(self) -> Tensor:
        """``sigma`` of the clean video and of every timestep, ``[T + 1]``, rising."""
        return torch.cat([self.alphas.new_zeros(1), (1 - self.alphas).sqrt()])

    def _place(self, sigma: Tensor) -> float:
        """Where ``sigma`` lies in :meth:`_levels`, with the part of the way to the next."""
        levels, value = self._levels(), sigma.detach().to(self.alphas)
        upper = int(torch.searchsorted(levels, value).clamp(1, len(levels) - 1))
        below, above = levels[upper - 1], levels[upper]
        return upper - 1 + float((value - below) / (above - below))

    def timestep(self, sigma: Tensor) -> Tensor:
        """The timestep (a scalar, int64) the network is told at ``sigma``; between two levels, the cleaner."""
        return torch.tensor(min(max(math.floor(self._place(sigma) + 0.25) - 1, 0), len(self.alphas) - 1))

    def step(self, x: Tensor, prediction: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """``sqrt(alpha_next) * x0 + sqrt(1 - alpha_next) * noise``, both told from ``x`` and the prediction."""
        alphas = torch.cat([self.alphas.new_ones(1), self.alphas])
        alpha = alphas[self.timestep(sigma) + 1]
        alpha_next = alphas[min(max(math.ceil(self._place(sigma_next) - 0.25), 0), len(self.alphas))]
        root, root_next, noise, noise_next = (float(v.sqrt()) for v in (alpha, alpha_next, 1 - alpha, 1 - alpha_next))
        if self.prediction == "epsilon":
            return root_next / root * x + (noise_next - root_next * noise / root) * prediction
        return (root_next * root + noise_next * noise) * x + (noise_next * root - root_next * noise) * prediction
