"""The judge: from final latents to rewards, and the gradient back; VAE and reward graphs begin and end here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..reward_models.protocol import Reward
from .augment import augmented
from .decoding import Decoder, sparse
from .gradient import Walk
from .guards import MotionGuard
from .seeds import seed_for
from .view import View


@dataclass(frozen=True)
class Objective:
    """From rewards to a loss.

    Attributes:
        target: Reward to aim at; None maximises without end.
        loss_scale: Factor on every sample's loss. A reward normalised as ``(r - mean) / deviation`` is one over its
            deviation, for what is taken off has no gradient.
        hinge: With a target, stop pushing samples that have reached it (``relu(target - r)``);
            otherwise ``|target - r|``, as VideoX-Fun has it, which pulls them back.
    """

    target: float | None = None
    loss_scale: float = 1.0
    hinge: bool = True

    def __call__(self, rewards: Tensor) -> Tensor:
        """Loss ``[B]`` of rewards ``[B]``."""
        if self.target is None:
            loss = -rewards
        else:
            gap = self.target - rewards
            loss = gap.relu() if self.hinge else gap.abs()
        return self.loss_scale * loss

    def reached(self, rewards: Tensor) -> bool:
        """Whether nothing is left to push."""
        return self.target is not None and self.hinge and bool((rewards >= self.target).all())


@dataclass(frozen=True)
class Judgement:
    """What the judge said of a batch.

    Attributes:
        rewards: ``[B]``.
        loss: Mean over the batch.
        gradient: ``d loss / d x_final``, shaped like the latents.
        frames: ``[B, 3, T, H, W]`` that were judged.
        motion: Relative to the base model's, if a guard looked.
        blind: Whether the reward found nothing to judge, such as no face: nowhere a gradient, and no target reached.
        terms: Of a mixture, what each said, ``[B]`` by name, the mean over the view's augmentations.
    """

    rewards: Tensor
    loss: float
    gradient: Tensor = field(repr=False)
    frames: Tensor = field(repr=False)
    motion: float = math.nan
    blind: bool = False
    terms: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def finite(self) -> bool:
        """Whether every reward and every entry of the gradient is a finite number."""
        return bool(torch.isfinite(self.rewards).all() and torch.isfinite(self.gradient).all())


@torch.no_grad()
def seen_frames(walk: Walk, latents: Tensor, view: View) -> Tensor:
    """What a view shows of final latents, ``[B, 3, T, H, W]``, without gradient."""
    clips, _ = Decoder(walk.model, walk.tick).forward(view.part(walk.model, latents))
    frames = torch.cat(clips, dim=2)
    shown, _ = view.shown(walk.model, latents.shape[2], frames.shape[2])
    return frames[:, :, shown]


def judge(
    walk: Walk,
    latents: Tensor,
    reward: Reward,
    prompts: Sequence[str],
    objective: Objective,
    view: View | None = None,
    guard: MotionGuard | None = None,
    reference: Tensor | None = None,
) -> Judgement:
    """Decode, score, and take the gradient back to the latents.

    Where the model's decoder is causal and the view spans several chunks, the frames are decoded without a graph,
    scored, and the gradient at the frames goes back chunk by chunk: exact, at the memory of one chunk.

    Args:
        walk: Gives the model.
        latents: Final latents ``[B, C, t, h, w]``.
        reward: A differentiable reward.
        prompts: One a sample.
        objective: From rewards to a loss.
        view: What the reward sees; the frames of the first latent if not given.
        guard: A further loss on the motion of the frames, if the view holds several, or of the latents.
        reference: ``[B, 3, T, H, W]`` in 0..1, for a reward that needs one.

    Raises:
        ValueError: The reward passes no gradient to the frames, or the view weighs frames that it does not judge.
    """
    view = view or View()
    view.check(reward)
    model, total, part = walk.model, latents.shape[2], view.part(walk.model, latents).detach()
    chunks = len(model.chunks(part.shape[2]))
    keep_on = torch.device("cpu") if latents.device.type != "cpu" else None
    decoder = Decoder(model, walk.tick, view.save_memory, keep_on, sparse(chunks) if view.save_memory else 1)
    if chunks == 1:
        part.requires_grad_()
        with torch.enable_grad():
            frames = decoder.with_graph(part)
            shown, weights = view.shown(model, total, frames.shape[2])
            seen = frames[:, :, shown]
            rewards, loss, terms = _score(walk, seen, reward, prompts, objective, view, weights, guard, reference)
            (found,) = torch.autograd.grad(loss, part)
    else:
        clips, given = decoder.forward(part)
        lengths = [clip.shape[2] for clip in clips]
        shown, weights = view.shown(model, total, sum(lengths))
        seen = torch.cat(clips, dim=2)[:, :, shown].requires_grad_()
        del clips  # while the gradient goes back, the frames are there once, and once their gradient
        with torch.enable_grad():
            rewards, loss, terms = _score(walk, seen, reward, prompts, objective, view, weights, guard, reference)
            (at_seen,) = torch.autograd.grad(loss, seen)
        at_frames = at_seen.new_zeros(*seen.shape[:2], sum(lengths), *seen.shape[3:])
        at_frames[:, :, shown] = at_seen
        del at_seen
        found = decoder.backward(part, given, at_frames.split(lengths, dim=2))
    gradient = torch.zeros_like(latents)
    gradient[:, :, : part.shape[2]] = found
    blind = not (gradient.any() or objective.reached(rewards))
    total, motion = float(loss.detach()), math.nan
    if guard is not None:
        motion = float(guard.ratio(seen.detach() if view.several else latents).mean())
        if not view.several:
            moving = latents.detach().requires_grad_()
            with torch.enable_grad():
                penalty = guard(moving)
                gradient += torch.autograd.grad(penalty, moving)[0]
            total += float(penalty.detach())
    return Judgement(rewards.detach(), total, gradient, seen.detach(), motion, blind, terms)


def _score(
    walk: Walk,
    frames: Tensor,
    reward: Reward,
    prompts: Sequence[str],
    objective: Objective,
    view: View,
    weights: Tensor | None,
    guard: MotionGuard | None,
    reference: Tensor | None,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Rewards ``[B]``, the loss, and a mixture's terms; ``weights`` are the frames' or None.

    Rewards and terms are the mean over the view's augmentations.
    """
    walk.tick("reward")
    judged = frames
    if weights is not None:  # of a mean over frames, this is the gradient of the weighted mean
        judged = frames.view_as(frames)
        judged.register_hook(lambda gradient: gradient * weights.to(gradient)[:, None, None])
    shown = [augmented(judged, seed_for("augment", view.seed, n)) for n in range(view.augment)] or [judged]
    reference = None if reference is None else reference.to(frames)
    scores, said = [], []
    for clips in shown:
        scores.append(reward.score(clips, prompts, reference=reference))
        said.append(getattr(reward, "terms", {}))
    rewards = torch.stack(scores).mean(0)
    terms = {name: torch.stack([of_one[name] for of_one in said]).mean(0) for name in said[0]}
    if not rewards.requires_grad:
        raise ValueError(f"the reward {reward.name} passes no gradient to the frames, so it can score but not train")
    loss = objective(rewards).mean()
    return rewards, loss + guard(frames) if guard is not None and view.several else loss, terms
