"""One batch at a time: sampled, judged and learned from, or sampled and scored, within the memory there is."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..block_weights import in_float8, offloaded
from ..reward_models.protocol import Reward
from ..video_models.protocol import Tick, VideoModel
from .compiling import check_compiler, compiled
from .config import TrainConfig
from .estimate import Estimate, estimate
from .events import Evaluation
from .examples import Example
from .gradient import Anchor, Walk, replay, rollout
from .guards import MotionGuard, conflicts, score_clips
from .inputs import Inputs
from .judge import Judgement, View, judge, seen_frames
from .memory import PLANS, MemoryPlan, Placement, checkpointed_blocks, free_memory, plan_for, smaller
from .sample import sample
from .schedule import Plan
from .seeds import seed_for

log = logging.getLogger(__name__)

ROOM = 0.85
"""Part of the free memory that an estimate may fill; kernels and the allocator want the rest."""


@dataclass(frozen=True)
class Lesson:
    """What one batch taught.

    Attributes:
        verdict: The judgement.
        begun: The latents that entered the first trained step.
        drift: Mean squared distance to the base model's predictions; 0 without an anchor.
        conflicts: Between the terms of a mixture, if asked for; see :func:`.guards.conflicts`.
    """

    verdict: Judgement
    begun: Tensor
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
        config.view_at(0, False).check(reward)
        self.plan = plan_for(config.memory, model)
        self._model, self._reward, self._config = model, reward, config
        self._stores: ExitStack | None = None
        self._estimate: Estimate | None = None
        self._compiled = ExitStack()
        self._offloads = False
        self._latent_shape = model.spec.latent_shape(config.width, config.height, config.frames)
        self._device = device
        self._tick = tick if device.type == "cpu" else Placement(model, reward, tick, self.plan, device)
        self._inputs = Inputs(model, config, self._tick, cache)

    @property
    def working(self) -> bool:
        """Whether this is within :meth:`at_work`."""
        return self._stores is not None

    def prepare(self, examples: Sequence[Example]) -> None:
        """Encode every prompt."""
        self._inputs.prepare(examples)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """While LoRAs are in the networks: the frozen weights stored as settings and plan say."""
        with ExitStack() as stores:
            self._stores = stores
            if self._config.float8:
                for network in self._model.denoisers.values():
                    self._stores.enter_context(in_float8(network))
            plan = self._fitting()  # counted with the blocks as they are, for compiled ones compute something
            self._compiled = self._stores.enter_context(ExitStack())
            if self._config.compile:
                check_compiler(self._device)
                for network in self._model.denoisers.values():
                    self._compiled.enter_context(compiled(network))
            self.adopt(plan)
            self._tick("rollout")  # only now: what shall not be on the device never gets there
            try:
                yield
            finally:
                self._stores = None

    def estimate(self) -> Estimate:
        """What the run needs, counted once; :meth:`prepare` must have been called."""
        if self._estimate is None:
            text = self._inputs.any_text()
            self._estimate = estimate(self._model, self._reward, self._config, text, self._device)
        return self._estimate

    def _fitting(self) -> MemoryPlan:
        """The plan in force, or on a GPU with ``memory: auto`` the fastest that should fit, with some room to spare.

        Says what it needs and what there is, if anybody listens.
        """
        chooses = self._config.memory == "auto" and self._device.type == "cuda"
        if self._config.shard or not (chooses or log.isEnabledFor(logging.INFO)):
            return self.plan
        try:
            found = self.estimate()
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            log.warning("the memory this run needs cannot be estimated: %s", str(error).partition("\n")[0])
            return self.plan
        free, plan = free_memory(self._device), self.plan
        if chooses:
            plan = max(plan, found.fitting(int(ROOM * free)) or PLANS[-1], key=PLANS.index)
        log.info(found.line(plan, free))
        return plan

    def rest(self) -> None:
        """Leave the device."""
        if isinstance(self._tick, Placement):
            self._tick.clear()

    def adopt(self, plan: MemoryPlan) -> None:
        """Go on under another memory plan."""
        if plan.offload and self._stores is not None and not self._offloads:
            if self._config.compile:
                log.warning("memory: %s moves the blocks' weights, so they are not compiled", plan.name)
            self._compiled.close()
            for network in self._model.denoisers.values():
                self._stores.enter_context(offloaded(network))
            self._offloads = True
            self._stores.callback(setattr, self, "_offloads", False)
        self.plan = plan
        if isinstance(self._tick, Placement):
            self._tick.plan = plan

    def learn(
        self,
        examples: Sequence[Example],
        seeds: Sequence[int],
        plan: Plan,
        draw: int,
        parameters: Mapping[str, nn.Parameter],
        without_lora: Callable[[], AbstractContextManager],
        anchor: float = 0.0,
        report: bool = False,
        begun: Tensor | None = None,
    ) -> Lesson:
        """Add the gradient of one batch to the parameters', unless it is not finite.

        If the batch runs out of GPU memory, it is made again under the next smaller plan, which stays in force.

        Args:
            examples: One a sample.
            seeds: Of each sample's noise.
            plan: Noise levels and trained steps.
            draw: Number of the batch in the run.
            parameters: Of the LoRA.
            without_lora: A context in which the denoiser is the base model.
            anchor: Weight of the anchor at this step.
            report: Whether to look for conflicts between the terms of a mixture.
            begun: What an earlier lesson on this batch and plan says of itself: the walk begins there.
        """
        before = {key: None if p.grad is None else p.grad.clone() for key, p in parameters.items()}
        while True:
            try:
                with checkpointed_blocks(self._model, self.plan.checkpoint_blocks):
                    return self._learn(examples, seeds, plan, draw, without_lora, anchor, report, begun)
            except torch.OutOfMemoryError:
                less = smaller(self.plan)
                if less is None or self._config.shard:  # the others could not follow
                    raise
                log.warning("out of GPU memory with memory: %s; going on with %s", self.plan.name, less.name)
            # Outside of the handler, for the error holds on to every tensor of the batch that failed.
            self.adopt(less)
            for key, parameter in parameters.items():
                parameter.grad = before[key]
            torch.cuda.empty_cache()

    def _learn(
        self,
        examples: Sequence[Example],
        seeds: Sequence[int],
        plan: Plan,
        draw: int,
        without_lora: Callable[[], AbstractContextManager],
        weight: float,
        report: bool,
        begun: Tensor | None,
    ) -> Lesson:
        c = self._config
        conditioning = self._inputs.conditioning(examples)
        walk = Walk(self._model, conditioning, c.guidance_scale, self.plan.batched_guidance, self._tick, seeds,
                    c.guidance_interval)  # fmt: skip
        noise = self._model.initial_latents(self._latent_shape, seeds)
        first = plan.trained[0]
        latents, kept = rollout(walk, noise, plan) if begun is None else rollout(walk, begun.to(noise), plan, first)
        view = c.view_at(draw, self.plan.checkpoint_vae)
        guard = self._motion_guard(walk, noise, plan, view, without_lora)
        prompts, reference = [e.prompt for e in examples], self._inputs.reference(examples, self._reward)
        verdict = judge(walk, latents, self._reward, prompts, c.objective, view, guard, reference)
        if not verdict.finite or verdict.blind:
            if c.shard:  # the others learn, and need this process's part of the weights for it
                with self._gradients_kept():
                    anchor = Anchor(0.0, without_lora) if weight else None
                    replay(walk, kept, plan, torch.zeros_like(latents), c.backprop.coupling, anchor, c.backprop.branch)
            return Lesson(verdict, kept[first])
        found = conflicts(self._reward, verdict.frames, prompts, reference) if report else {}
        anchor = Anchor(weight / c.accumulation, without_lora, c.anchor_by_sigma) if weight else None
        gradient, how = verdict.gradient / c.accumulation, c.backprop
        drift = replay(walk, kept, plan, gradient, how.coupling, anchor, how.branch)
        return Lesson(verdict, kept[first], drift, found)

    @contextmanager
    def _gradients_kept(self) -> Iterator[None]:
        """Whatever the block adds to gradients is gone after it."""
        trained = [p for network in self._model.denoisers.values() for p in network.parameters() if p.requires_grad]
        before = [None if p.grad is None else p.grad.clone() for p in trained]
        yield
        for parameter, gradient in zip(trained, before, strict=True):
            parameter.grad = gradient

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

    def evaluate(self, examples: Sequence[Example], heldout: Sequence[Reward] = ()) -> Evaluation:
        """Examples on fixed seeds, sampled with the model as it is, and scored by the reward and by others."""
        c, clips, scores = self._config, [], []
        prompts = [example.prompt for example in examples]
        self.prepare(examples)
        with torch.no_grad():
            for index in range(0, len(examples), c.batch_size):
                batch = examples[index : index + c.batch_size]
                seeds = [seed_for("sample", c.seed, index + b) for b in range(len(batch))]
                told = self._inputs.conditioning(batch)
                frames = sample(self._model, told, seeds, self._latent_shape, c.sampler_steps, c.guidance_scale,
                                guidance_interval=c.guidance_interval,
                                batched_guidance=self.plan.batched_guidance, tick=self._tick)  # fmt: skip
                self._tick("reward")
                texts, reference = prompts[index : index + len(batch)], self._inputs.reference(batch, self._reward)
                scores += self._reward.score(frames, texts, reference=reference).tolist()
                clips.append(frames.cpu())
        frames = torch.cat(clips)
        others = {judge.name: self._scores(judge, frames, examples) for judge in heldout}
        return Evaluation(sum(scores) / len(scores), tuple(scores), tuple(prompts), frames, others)

    def _scores(self, reward: Reward, frames: Tensor, examples: Sequence[Example]) -> tuple[float, ...]:
        prompts = [example.prompt for example in examples]
        return score_clips(
            reward, frames, prompts, self._device, lambda index: self._inputs.reference([examples[index]], reward)
        )
