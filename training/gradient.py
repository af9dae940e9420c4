"""Rollout and replay: with the judge between them, the exact reward gradient at the memory of one denoiser step.

The rollout keeps only the latents that enter trained steps. The judge (:mod:`.judge`) returns
``g = d loss / d x_final``. The replay walks back: a trained step is recomputed once with gradient,
everything else is the solver's own linear map. DRaFT (arXiv 2309.17400), AlignProp (2310.03739), DRTune
(2405.00760) and ReFL (2304.05977) are settings of the same walk; see :class:`.schedule.BackpropSchedule`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..lora.adapter import at_input_precision, at_step
from ..video_models.protocol import Conditioning, Tick, VideoModel
from .schedule import Branch, Plan
from .seeds import seed_for


def silent(phase: str) -> None: ...


def check_interval(interval: Sequence[float]) -> None:
    """Raise ``ValueError`` unless these are two noise levels between which guidance may work."""
    if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
        given = " ".join(map(str, interval))
        raise ValueError(f"guidance_interval must be two noise levels with 0 <= low < high <= 1, got {given}")


@dataclass(frozen=True)
class Walk:
    """How to walk from noise to video: everything a rollout and its replay share.

    Attributes:
        model: The video model, with its LoRA injected.
        conditioning: Of the whole batch.
        guidance_scale: Weight of classifier-free guidance; 1 leaves the negative branch out.
        batched_guidance: Both branches in one call of the rollout, or one after the other. The replay always
            takes them one after the other: the gradient is linear in them, and one needs half the memory.
        tick: Called before every call of a large model.
        seeds: One a sample, for solvers that add noise at every step.
        guidance_interval: Noise levels ``(low, high]`` with guidance; at others the prompt's branch walks alone, at
            half the cost (Kynkäänniemi et al., arXiv 2404.07724).
    """

    model: VideoModel
    conditioning: Conditioning
    guidance_scale: float
    batched_guidance: bool = True
    tick: Tick = silent
    seeds: Sequence[int] = ()
    guidance_interval: tuple[float, float] = (0.0, 1.0)

    def branches(self, sigma: Tensor) -> list[tuple[float, Mapping[str, Tensor]]]:
        """Guidance branches with their weights in ``u + s * (c - u)``; one alone at scale 1 or outside the interval."""
        scale, conditioning, (low, high) = self.guidance_scale, self.conditioning, self.guidance_interval
        guided = low < float(sigma) <= high + 1e-9  # a solver's 1 may be one by rounding
        if conditioning.negative is None or scale == 1 or not guided:
            return [(1.0, conditioning.positive)]
        return [(1 - scale, conditioning.negative), (scale, conditioning.positive)]

    def predict(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The guided prediction."""
        branches = self.branches(sigma)
        if not self.batched_guidance or len(branches) == 1:
            return sum(weight * self.model.predict(x, sigma, branch) for weight, branch in branches)
        joined = {key: torch.cat([branch[key] for _, branch in branches]) for key in branches[0][1]}
        parts = self.model.predict(torch.cat([x] * len(branches)), sigma, joined).chunk(len(branches))
        return sum(weight * part for (weight, _), part in zip(branches, parts, strict=True))

    def step(self, x: Tensor, prediction: Tensor, plan: Plan, index: int) -> Tensor:
        """One solver step, with its noise where the solver adds any."""
        sigma, sigma_next = plan.sigmas[index], plan.sigmas[index + 1]
        if not self.model.spec.step_noise:
            return self.model.step(x, prediction, sigma, sigma_next)
        generators = [torch.Generator().manual_seed(seed_for("step", seed, index)) for seed in self.seeds]
        noise = torch.stack([torch.randn(x.shape[1:], generator=generator) for generator in generators])
        return self.model.step(x, prediction, sigma, sigma_next, noise.to(x))


@torch.no_grad()
def rollout(walk: Walk, x: Tensor, plan: Plan, first: int = 0) -> tuple[Tensor, dict[int, Tensor]]:
    """Sample as inference would, with LoRAs in the precision of the layers they change.

    Args:
        walk: Model and conditioning.
        x: ``[B, C, t, h, w]`` noise, or the latents that enter ``first``.
        plan: Noise levels, and the steps to be trained.
        first: The step to begin with.

    Returns:
        The final latents, and the latents that entered each trained step.
    """
    kept = {}
    with at_input_precision(walk.model):
        for i in range(first, len(plan.sigmas) - 1):
            walk.tick("rollout")
            at_step(walk.model, i, len(plan.sigmas) - 1)
            if i in plan.trained:
                kept[i] = x
            x = walk.step(x, walk.predict(x, plan.sigmas[i]), plan, i)
    return x, kept


def _solver_vjp(model: VideoModel, like: Tensor, sigma: Tensor, sigma_next: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of one solver step to its sample and to its prediction. It is linear but for its noise: zeros do."""
    x, prediction = (torch.zeros_like(like, requires_grad=True) for _ in range(2))
    with torch.enable_grad():
        return torch.autograd.grad(model.step(x, prediction, sigma, sigma_next), (x, prediction), g)


@dataclass(frozen=True)
class Anchor:
    """Keeps the LoRA near the base model: a loss on the distance of its predictions at the trained steps.

    IPRO (arXiv 2510.14255) and ROLL add it to the reward's loss. The base model's prediction is a constant.

    Attributes:
        weight: Of the mean over trained steps and entries of the squared distance.
        without_lora: A context in which the denoiser is the base model.
        by_sigma: Divide a step's distance by ``2 sigma^2``, as ROLL does.
    """

    weight: float
    without_lora: Callable[[], AbstractContextManager]
    by_sigma: bool = False

    def pull(self, walk: Walk, x: Tensor, sigma: Tensor, prediction: Tensor) -> tuple[Tensor, float]:
        """Gradient of one step's loss at the prompt branch's prediction, and its mean squared distance."""
        walk.tick("replay")
        with torch.no_grad(), self.without_lora():
            distance = prediction.detach() - walk.model.predict(x.detach(), sigma, walk.conditioning.positive)
        scale = float(1 / (2 * sigma**2)) if self.by_sigma else 1.0
        return 2 * self.weight * scale / distance.numel() * distance, float(distance.square().mean())


def replay(
    walk: Walk,
    kept: Mapping[int, Tensor],
    plan: Plan,
    gradient: Tensor,
    coupling: float = 1.0,
    anchor: Anchor | None = None,
    branch: Branch = "both",
) -> float:
    """Add the gradient of the loss to every trainable parameter of the denoiser.

    Args:
        walk: The walk of the rollout.
        kept: Latents that entered each trained step.
        plan: The plan of the rollout.
        gradient: ``d loss / d x_final``.
        coupling: How much passes to earlier steps through the denoiser's input, 0..1.
        anchor: A further loss at the trained steps.
        branch: With guidance, whether a gradient passes through both branches or through the prompt's alone.

    Returns:
        The mean squared distance that the anchor saw; 0 without one.
    """
    first, drift = plan.trained[0], 0.0
    for i in range(len(plan.sigmas) - 2, first - 1, -1):
        sigma, sigma_next = plan.sigmas[i], plan.sigmas[i + 1]
        to_sample, to_prediction = _solver_vjp(walk.model, gradient, sigma, sigma_next, gradient)
        gradient = to_sample
        if i not in plan.trained:
            continue
        at_step(walk.model, i, len(plan.sigmas) - 1)
        # Only a step with a trained one before it has anybody to pass a gradient to.
        x = kept[i].detach().requires_grad_(coupling > 0 and i > first)
        for weight, told in walk.branches(sigma):
            prompted = told is walk.conditioning.positive
            if branch == "prompt" and not prompted:
                continue
            walk.tick("replay")
            with torch.enable_grad():
                prediction = walk.model.predict(x, sigma, told)
            upstream = weight * to_prediction
            if anchor is not None and prompted:
                pull, distance = anchor.pull(walk, x, sigma, prediction)
                upstream = upstream + pull / len(plan.trained)
                drift += distance / len(plan.trained)
            torch.autograd.backward(prediction, upstream)
        if x.grad is not None:
            gradient = gradient + coupling * x.grad
    return drift
