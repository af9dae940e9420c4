"""One batch at a time: sampled, judged and learned from, or sampled and scored, within the memory there is."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..reward_models.protocol import Reward
from ..video_models.protocol import Conditioning, Tick, VideoModel
from .config import TrainConfig
from .events import Evaluation
from .gradient import Anchor, Walk, replay, rollout
from .guards import MotionGuard, conflicts, score_clips
from .judge import Judgement, View, judge, seen_frames
from .memory import MemoryPlan, Placement, checkpointed_blocks, plan_for, smaller
from .prompts import EmbeddingStore
from .sample import sample
from .schedule import Plan
from .seeds import seed_for

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lesson:
    """What one batch taught.

    Attributes:
        verdict: The judgement.
        drift: Mean squared distance to the base model's predictions; 0 without an anchor.
        conflicts: Between the terms of a mixture, if asked for; see :func:`.guards.conflicts`.
    """

    verdict: Judgement
    drift: float = 0.0
    conflicts: Mapping[str, float] = field(default_factory=dict)


class Part(NamedTuple):
    """One batch of a step, for its event."""

    rewards: Tensor
    loss: float
    drift: float
    motion: float
    terms: Mapping[str, Tensor]


class Learner:
    """Rollout, judge and replay of batches under a memory plan, which shrinks when a batch does not fit.

    Args:
        model: A loaded video model.
        reward: Judges the frames.
        config: Settings with every default filled in.
        tick: Called before every call of a large model; may raise to stop.
        device: Where to compute.
        cache: Folder for text embeddings; None keeps them in memory.

    Attributes:
        plan: The memory plan in force.
    """

    def __init__(
        self,
        model: VideoModel,
        reward: Reward,
        config: TrainConfig,
        tick: Tick,
        device: torch.device,
        cache: Path | None,
    ) -> None:
        self.plan = plan_for(config.memory, model)
        self._model, self._reward, self._config = model, reward, config
        self._latent_shape = model.spec.latent_shape(config.width, config.height, config.frames)
        self._device = device
        self._texts = EmbeddingStore(model, cache)
        self._tick = tick if device.type == "cpu" else Placement(model, reward, tick, self.plan, device)

    def prepare(self, prompts: Sequence[str]) -> None:
        """Encode every prompt, and bring the denoiser to where it works."""
        guided = self._config.guidance_scale != 1
        self._texts.prepare([*prompts, *([self._config.negative_prompt] if guided else [])], self._tick)
        self._tick("rollout")

    def rest(self) -> None:
        """Leave the device."""
        if isinstance(self._tick, Placement):
            self._tick.clear()

    def adopt(self, plan: MemoryPlan) -> None:
        """Go on under another memory plan."""
        self.plan = plan
        if isinstance(self._tick, Placement):
            self._tick.plan = plan

    def learn(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        plan: Plan,
        draw: int,
        parameters: Mapping[str, nn.Parameter],
        without_lora: Callable[[], AbstractContextManager],
        anchor: float = 0.0,
        report: bool = False,
    ) -> Lesson:
        """Add the gradient of one batch to the parameters', unless it is not finite.

        If the batch runs out of GPU memory, it is made again under the next smaller plan, which stays in force.

        Args:
            prompts: One a sample.
            seeds: Of each sample's noise.
            plan: Noise levels and trained steps.
            draw: Number of the batch in the run.
            parameters: Of the LoRA.
            without_lora: A context in which the denoiser is the base model.
            anchor: Weight of the anchor at this step.
            report: Whether to look for conflicts between the terms of a mixture.
        """
        before = {key: None if p.grad is None else p.grad.clone() for key, p in parameters.items()}
        while True:
            try:
                with checkpointed_blocks(self._model, self.plan.checkpoint_blocks):
                    return self._learn(prompts, seeds, plan, draw, without_lora, anchor, report)
            except torch.OutOfMemoryError:
                less = smaller(self.plan)
                if less is None:
                    raise
                log.warning("out of GPU memory with memory: %s; going on with %s", self.plan.name, less.name)
            # Outside of the handler, for the error holds on to every tensor of the batch that failed.
            self.adopt(less)
            for key, parameter in parameters.items():
                parameter.grad = before[key]
            torch.cuda.empty_cache()

    def _learn(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        plan: Plan,
        draw: int,
        without_lora: Callable[[], AbstractContextManager],
        weight: float,
        report: bool,
    ) -> Lesson:
        c = self._config
        self._tick("rollout")  # the denoiser is where the conditioning shall be
        conditioning = self._conditioning(prompts)
        walk = Walk(self._model, conditioning, c.guidance_scale, self.plan.batched_guidance, self._tick, seeds)
        noise = self._model.initial_latents(self._latent_shape, seeds)
        latents, kept = rollout(walk, noise, plan)
        view = c.view_at(draw, self.plan.checkpoint_vae)
        guard = self._motion_guard(walk, noise, plan, view, without_lora)
        verdict = judge(walk, latents, self._reward, prompts, c.objective, view, guard)
        if not verdict.finite:
            return Lesson(verdict)
        found = conflicts(self._reward, verdict.frames, prompts) if report else {}
        anchor = Anchor(weight / c.accumulation, without_lora, c.anchor_by_sigma) if weight else None
        gradient, how = verdict.gradient / c.accumulation, c.backprop
        return Lesson(verdict, replay(walk, kept, plan, gradient, how.coupling, anchor, how.branch), found)

    def _motion_guard(
        self, walk: Walk, noise: Tensor, plan: Plan, view: View, without_lora: Callable[[], AbstractContextManager]
    ) -> MotionGuard | None:
        """One that knows what the base model makes of the same noise."""
        c = self._config
        if not c.motion_guard:
            return None
        with without_lora():
            base, _ = rollout(walk, noise, plan)
        return MotionGuard(c.motion_guard, c.motion_floor, seen_frames(walk, base, view) if view.several else base)

    def evaluate(self, prompts: Sequence[str], heldout: Sequence[Reward] = ()) -> Evaluation:
        """Prompts on fixed seeds, sampled with the model as it is, and scored by the reward and by others."""
        c, clips, scores = self._config, [], []
        self.prepare(prompts)
        with torch.no_grad():
            for index in range(0, len(prompts), c.batch_size):
                batch = prompts[index : index + c.batch_size]
                seeds = [seed_for("sample", c.seed, index + b) for b in range(len(batch))]
                self._tick("rollout")
                frames = sample(self._model, self._conditioning(batch), seeds, self._latent_shape, c.sampler_steps,
                                c.guidance_scale, batched_guidance=self.plan.batched_guidance,
                                tick=self._tick)  # fmt: skip
                self._tick("reward")
                scores += self._reward.score(frames, batch).tolist()
                clips.append(frames.cpu())
        frames = torch.cat(clips)
        others = {judge.name: score_clips(judge, frames, prompts, self._device) for judge in heldout}
        return Evaluation(sum(scores) / len(scores), tuple(scores), tuple(prompts), frames, others)

    def _conditioning(self, prompts: Sequence[str]) -> Conditioning:
        positive = [self._texts[prompt] for prompt in prompts]
        guided = self._config.guidance_scale != 1
        negative = [self._texts[self._config.negative_prompt]] * len(prompts) if guided else None
        return self._model.conditioning(positive, negative, self._latent_shape)
