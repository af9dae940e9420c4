"""Several rewards as one: weighted, each on its own scale, with gradients of equal say where that is wished.

Public trainers add rewards with hand-made constants (VADER: ``(aesthetic + 15 * hps) / 2``), because their scales
and their gradients differ by orders of magnitude. Here a term may instead be counted in standard deviations of what
was seen so far (``normalised``), and its gradient at the frames may be brought to the norm of the others
(``balanced``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .protocol import Reward

Combination = Literal["sum", "mean", "min", "softmin"]
WARM_UP = 8
"""Values a term must have been seen with before it is normalised; until then it counts raw."""
LEAST_DEVIATION = 1e-5
"""Of the mean's size: smaller differences between clips are the noise of float32, and are not blown up."""


@dataclass(frozen=True)
class MixtureSettings:
    """How terms become one score.

    Attributes:
        combine: ``sum`` of weight times term; ``mean``: that over the sum of the weights' sizes; ``min`` of weight
            times term: only the worst term is pushed; ``softmin``: smooth between ``min`` and the plain mean.
        temperature: Of ``softmin``, above 0, in the unit of the terms: near 0 it is ``min``, far above the terms'
            differences it is their plain mean.
        normalised: Count every term in standard deviations from its mean, both over all steps so far.
        balanced: Bring the gradients of all terms at a sample's frames to one norm, the mean of their norms.

    Raises:
        ValueError: An unknown combination, or a temperature that is not above 0.
    """

    combine: Combination = "sum"
    temperature: float = 0.5
    normalised: bool = False
    balanced: bool = False

    def __post_init__(self) -> None:
        if self.combine not in get_args(Combination):
            raise ValueError(f"combine must be one of {', '.join(get_args(Combination))}, got {self.combine!r}")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature must be above 0, got {self.temperature}")

    def spell(self, terms: str) -> str:
        """The mixture of terms as it is written on the command line."""
        settings = [f"temperature={self.temperature:g}"] if self.combine == "softmin" else []
        settings += [name for name in ("normalised", "balanced") if getattr(self, name)]
        if self.combine == "sum" and not settings:
            return terms
        return f"{self.combine}({', '.join([terms, *settings])})"


class Mixture:
    """A reward made of rewards.

    A sample's score depends on its own terms alone, and on the statistics of ``normalised``, which only
    :meth:`observe` moves: a trainer calls it once a step with the terms of that step, and keeps :meth:`state` in its
    checkpoints, so that a resumed run repeats the uninterrupted one.

    Args:
        rewards: The terms; none may be a mixture itself.
        weights: One a term, finite; a negative one pushes the term down.
        settings: How they become one score.

    Attributes:
        terms: What each term said in the last call of :meth:`score`, raw: name to ``[B]``, without gradient.

    Raises:
        ValueError: No terms, a mixture among them, or weights that do not fit.
    """

    def __init__(
        self, rewards: Sequence[Reward], weights: Sequence[float], settings: MixtureSettings | None = None
    ) -> None:
        if not rewards or len(rewards) != len(weights):
            raise ValueError(f"a mixture needs one weight a reward, got {len(rewards)} and {len(weights)}")
        for reward, weight in zip(rewards, weights, strict=True):
            if isinstance(reward, Mixture):
                raise ValueError(f"{reward.name} is a mixture already; give its rewards one by one")
            if not math.isfinite(weight) or weight == 0:
                raise ValueError(f"the weight of {reward.name} must be a number other than 0, got {weight}")
        self.rewards, self.weights = tuple(rewards), tuple(map(float, weights))
        self.settings = settings or MixtureSettings()
        self.labels = _labels([reward.name for reward in rewards])
        self.name = self.settings.spell(
            "+".join(
                label if weight == 1 else f"{label}*{weight:g}"
                for label, weight in zip(self.labels, self.weights, strict=True)
            )
        )
        self.differentiable = all(reward.differentiable for reward in rewards)
        self.needs = frozenset().union(*(reward.needs for reward in rewards))
        self.per_frame = all(getattr(reward, "per_frame", True) for reward in rewards)
        self.terms: dict[str, Tensor] = {}
        self.load_state({})

    def score(self, frames: Tensor, prompts: Sequence[str], *, reference: Tensor | None = None) -> Tensor:
        """See :class:`.protocol.Reward`. Not normalised, the scale is that of the terms."""
        balanced = self.settings.balanced and self.differentiable and torch.is_grad_enabled() and frames.requires_grad
        values, gradients = [], []
        for reward in self.rewards:
            if balanced:
                value, gradient = _value_and_gradient(reward, frames, prompts, reference)
                gradients.append(gradient)
            else:
                value = reward.score(frames, prompts, reference=reference)
            values.append(value.to(frames.device))
        raw = torch.stack(values)
        self.terms = {label: value.detach() for label, value in zip(self.labels, raw, strict=True)}
        mean, deviation = self._scale(raw)
        terms = (raw - mean) / deviation
        if balanced:
            terms = _balance(frames, terms, [g / d for g, d in zip(gradients, deviation, strict=True)])
        return self._combine(terms)

    def _combine(self, terms: Tensor) -> Tensor:
        """``[terms, B]`` to ``[B]``."""
        weighted = terms * terms.new_tensor(self.weights)[:, None]
        if self.settings.combine == "min":
            return weighted.amin(0)
        if self.settings.combine == "softmin":
            tau = self.settings.temperature
            return -tau * ((-weighted / tau).logsumexp(0) - math.log(len(self.weights)))
        total = weighted.sum(0)
        return total / sum(map(abs, self.weights)) if self.settings.combine == "mean" else total

    def _scale(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation by which each term is normalised, ``[terms, 1]`` each; 0 and 1 if it is not."""
        if not self.settings.normalised or self._count < WARM_UP:
            return like.new_zeros(len(like), 1), like.new_ones(len(like), 1)
        deviation = (self._squares / self._count).sqrt().maximum(LEAST_DEVIATION * self._mean.abs()).clamp_min(1e-8)
        return self._mean.to(like)[:, None], deviation.to(like)[:, None]

    def observe(self, terms: Mapping[str, Tensor]) -> None:
        """Take the terms of one step into mean and deviation. Samples with a term that is not finite are left out.

        Args:
            terms: As in :attr:`terms`, of all samples of the step: name to ``[N]``.
        """
        values = torch.stack([terms[label].detach().double().cpu() for label in self.labels])
        values = values[:, values.isfinite().all(0)]
        count = values.shape[1]
        if not count:
            return
        # Chan, Golub and LeVeque's update: exact whatever the sizes of the parts.
        mean = values.mean(1)
        shift, total = mean - self._mean, self._count + count
        self._squares = (
            self._squares + (values - mean[:, None]).square().sum(1) + shift**2 * (self._count * count / total)
        )
        self._mean = self._mean + shift * (count / total)
        self._count = total

    def state(self) -> dict[str, Tensor]:
        """What :meth:`observe` has gathered, for a checkpoint: ``count`` and, a term, ``mean`` and ``squares``."""
        return {"count": torch.tensor(self._count), "mean": self._mean.clone(), "squares": self._squares.clone()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of :meth:`state`; nothing begins anew.

        Raises:
            ValueError: The state of a mixture with another number of terms.
        """
        zeros = torch.zeros(len(self.rewards), dtype=torch.float64)
        mean, squares = state.get("mean", zeros), state.get("squares", zeros)
        if mean.shape != zeros.shape or squares.shape != zeros.shape:
            raise ValueError(f"the state is that of {mean.numel()} rewards, and {self.name} has {len(self.rewards)}")
        self._mean, self._squares, self._count = mean.clone(), squares.clone(), int(state.get("count", 0))

    def to(self, device: torch.device | str) -> Mixture:
        """Move every term that can be moved; returns itself."""
        for reward in self.rewards:
            if hasattr(reward, "to"):
                reward.to(device)
        return self


def _labels(names: Sequence[str]) -> tuple[str, ...]:
    """Names, the second of its kind as ``name#2``."""
    labels: list[str] = []
    for index, name in enumerate(names):
        before = list(names[:index]).count(name)
        labels.append(f"{name}#{before + 1}" if before else name)
    return tuple(labels)


class _Known(torch.autograd.Function):
    """A value ``[B]`` whose gradient at the frames is known already."""

    @staticmethod
    def forward(ctx: Any, frames: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return upstream.view(-1, *[1] * (gradient.ndim - 1)) * gradient, None, None


def _value_and_gradient(
    reward: Reward, frames: Tensor, prompts: Sequence[str], reference: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``[B]`` and, because a score knows no neighbours, every sample's own gradient in one pass."""
    inner = frames.detach().requires_grad_()
    value = reward.score(inner, prompts, reference=reference)
    if not value.requires_grad:  # a term may have nothing to say of these clips
        return value, torch.zeros_like(inner)
    (gradient,) = torch.autograd.grad(value.sum(), inner, materialize_grads=True, allow_unused=True)
    return value.detach(), gradient


def _balance(frames: Tensor, terms: Tensor, gradients: Sequence[Tensor]) -> Tensor:
    """The terms, their gradients at a sample's frames brought to one norm: the mean over those that have any."""
    norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients])  # [terms, B]
    common = norms.sum(0) / (norms > 0).sum(0).clamp_min(1)
    factors = torch.where(norms > 0, common / norms, 0.0)
    shape = (-1, *[1] * (frames.ndim - 1))
    parts = zip(terms, gradients, factors, strict=True)
    return torch.stack([_Known.apply(frames, term, gradient * factor.view(shape)) for term, gradient, factor in parts])
