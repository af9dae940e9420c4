"""The training loop: one event per optimiser step; to stop, stop iterating."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..files import canonical_json
from ..lora.adapter import Adapter, inject_new, total_norm
from ..lora.write import write_lora
from ..reward_models.protocol import Reward
from ..video_models.protocol import Conditioning, Tick, VideoModel
from .checkpoint import Progress, RunIdentity, list_checkpoints, load_latest, save_checkpoint
from .config import TrainConfig
from .events import Evaluation, StepEvent, TrainingStopped
from .gradient import Walk, replay, rollout, silent
from .interrupts import interrupt_later
from .judge import Judgement, judge
from .memory import MemoryPlan, Placement, checkpointed_blocks, plan_for, smaller
from .prompts import EmbeddingStore
from .run_folder import RunFolder
from .sample import sample
from .schedule import Plan
from .seeds import draw_prompts, seed_for

log = logging.getLogger(__name__)


class Trainer:
    """Trains reward LoRAs on one or all networks of a video model by reward backpropagation.

    Iterate to train: the first event is the state before training, then comes one a step. Leaving the
    loop, an error, or an exception raised in ``tick`` end the run: a checkpoint and the LoRA so far are
    saved and the model is as it was before. A later run in the same folder with the same settings
    resumes, and its steps equal those of a run never interrupted.

    Files in ``folder``: ``<folder's name>.safetensors`` (the LoRA; of a model with several networks one each,
    ``<name>_<expert>.safetensors``), ``checkpoint-*.safetensors``, ``log.jsonl``, ``config.json``,
    ``reward.png``, ``samples/*.mp4``.

    Args:
        model: A loaded video model.
        reward: Judges the frames; must be differentiable.
        prompts: To train on.
        config: Settings; "model's default" is filled in here.
        folder: Of this run.
        sample_prompts: To evaluate on; the first of ``prompts`` if none are given.
        rank: This process among several; takes part in all chance.
        device: Where to compute: what a phase needs is brought there, and nothing is left there; the model's own
            if not given.
        cache: Folder for text embeddings; None keeps them in memory.
        tick: Called before every call of a large model; may raise to stop.
        metadata: Kept in the LoRA's file, for example the licence.

    Raises:
        ValueError: Settings that do not fit the model, a reward that cannot train, a folder with another run.
        TrainingStopped: While iterating: too many steps in a row without a finite gradient.
    """

    def __init__(
        self,
        model: VideoModel,
        reward: Reward,
        prompts: Sequence[str],
        config: TrainConfig,
        folder: Path | str,
        *,
        sample_prompts: Sequence[str] = (),
        rank: int = 0,
        device: torch.device | str | None = None,
        cache: Path | None = None,
        tick: Tick = silent,
        metadata: dict[str, str] | None = None,
    ) -> None:
        if not reward.differentiable:
            raise ValueError(f"the reward {reward.name} is not differentiable, so it can score but not train")
        if "reference" in reward.needs:
            raise ValueError(f"the reward {reward.name} needs a reference video, which this trainer does not give it")
        if not prompts:
            raise ValueError("training needs at least one prompt, got none")
        self.model, self.reward, self.prompts = model, reward, list(prompts)
        self.config = config.for_model(model.spec)
        self.files = RunFolder(folder, reward.name)
        self.folder = self.files.path
        self.sample_prompts = list(sample_prompts or prompts)[: self.config.sample_count]
        self._rank, self._metadata = rank, metadata or {}
        c, plan = self.config, plan_for(self.config.memory, model)
        self._device = _indexed(torch.device(device)) if device is not None else model.device
        placed = self._device.type != "cpu"
        self._tick = Placement(model, reward, tick, plan, self._device) if placed else tick
        self._memory_plan = plan
        self.lora_paths = {expert: self.files.lora_path(expert, model.spec.experts) for expert in c.experts}
        self._latent_shape = model.spec.latent_shape(c.width, c.height, c.frames)
        self._sigmas = model.sigmas(c.sampler_steps)
        self._trainable = self._trainable_steps()
        self._texts = EmbeddingStore(model, cache)
        prompts_hash = f"{seed_for(*self.prompts):016x}"
        self._identity = RunIdentity(model.spec.name, reward.name, prompts_hash, c)

    @property
    def lora_path(self) -> Path:
        """The LoRA, or with several networks that of the first."""
        return next(iter(self.lora_paths.values()))

    def __iter__(self) -> Iterator[StepEvent]:
        c = self.config
        self.folder.mkdir(parents=True, exist_ok=True)
        self._encode_prompts()
        with ExitStack() as undo:
            if isinstance(self._tick, Placement):
                undo.callback(self._tick.clear)
            self._tick("rollout")  # the denoiser is where its LoRA shall be
            adapters = self._inject(undo)
            parameters = {
                f"{expert}.{key}": parameter
                for expert, adapter in adapters.items()
                for key, parameter in adapter.parameters().items()
            }
            optimizer = torch.optim.AdamW(
                list(parameters.values()), c.learning_rate, (c.beta1, c.beta2), c.epsilon, c.weight_decay
            )
            progress = load_latest(self.folder, self._identity, parameters, optimizer, self.reward) or Progress()
            if progress.memory and c.memory == "auto":
                self._adopt(plan_for(progress.memory, self.model))
            self.files.open(progress.step, c.to_dict())
            saved_at = progress.step if list_checkpoints(self.folder) else -1

            def save() -> None:
                save_checkpoint(self.folder, progress, self._identity, parameters, optimizer, self.reward)

            try:
                if progress.step == 0:
                    started = time.monotonic()
                    evaluation = self._evaluate(0) if c.sample_every else None
                    took, nan = time.monotonic() - started, math.nan
                    yield self.files.add(
                        StepEvent(0, c.steps, nan, nan, nan, 0.0, took, self._memory(), evaluation=evaluation)
                    )
                while progress.step < c.steps:
                    event = self._step(progress, parameters, optimizer)
                    if c.sample_every and (progress.step % c.sample_every == 0 or progress.step == c.steps):
                        try:
                            event = replace(event, evaluation=self._evaluate(progress.step))
                        except BaseException:  # the step is made, whatever became of its evaluation
                            self.files.add(event)
                            raise
                    if progress.step % c.save_every == 0 or progress.step == c.steps:
                        save()
                        saved_at = progress.step
                    yield self.files.add(event)
                    if progress.skipped_in_a_row >= c.max_skipped:
                        raise TrainingStopped(
                            f"stopped at step {progress.step}: {progress.skipped_in_a_row} steps in a row "
                            f"were skipped, the last because {event.skipped}; "
                            "lower the learning rate or check the reward"
                        )
            finally:
                if saved_at != progress.step:
                    save()
                for expert, adapter in adapters.items():
                    self._save_lora(expert, adapter, progress.step)
                self.files.draw_curve()

    def _inject(self, undo: ExitStack) -> dict[str, Adapter]:
        """A fresh LoRA in every network to be trained; ``undo`` takes them out again."""
        c, adapters = self.config, {}
        for expert in c.experts:
            network = self.model.denoisers[expert]
            adapter = inject_new(network, c.lora_targets, c.rank, c.network_alpha, seed_for("lora", c.seed))
            undo.callback(adapter.remove)
            adapters[expert] = adapter
        return adapters

    def _trainable_steps(self) -> tuple[int, ...]:
        """The solver steps at which a network with a LoRA works. Raises ``ValueError`` if the schedule finds none."""
        c, spec = self.config, self.model.spec
        works = [spec.expert_at(sigma) for sigma in self._sigmas[:-1]]
        steps = tuple(i for i, expert in enumerate(works) if expert in c.experts)
        c.backprop.check(len(works), steps)
        for expert in c.experts:
            if expert not in works:
                raise ValueError(
                    f"none of the {len(works)} solver steps falls to the expert {expert}, so it cannot be trained; "
                    "take more steps or train the other"
                )
        return steps

    def _step(self, progress: Progress, parameters: dict, optimizer: torch.optim.Optimizer) -> StepEvent:
        """One optimiser step; the adapter's parameters change at its very end or not at all."""
        c, started = self.config, time.monotonic()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        plan = c.backprop.draw(self._sigmas, seed_for("plan", c.seed, progress.step), self._trainable)
        rewards, losses, terms, trouble = [], [], [], ""
        optimizer.zero_grad(set_to_none=True)
        for micro in range(c.accumulation):
            verdict = self._learn_in_memory(plan, progress.step * c.accumulation + micro, parameters)
            rewards += verdict.rewards.tolist()
            losses.append(verdict.loss)
            terms.append(getattr(self.reward, "terms", {}))
            if not verdict.finite:
                trouble = "the reward or its gradient was not a finite number"
                break
        progress.memory = self._memory_plan.name
        learning_rate = c.lr_at(progress.step)
        gradients = [p.grad for p in parameters.values() if p.grad is not None]
        grad_norm = total_norm(gradients) if gradients and not trouble else math.nan
        if not trouble and not math.isfinite(grad_norm):
            trouble = "the LoRA's gradient was not a finite number"
        said = {name: torch.cat([part[name] for part in terms]) for name in terms[0]}
        with interrupt_later():
            if not trouble:
                for gradient in gradients:
                    gradient.mul_(min(1.0, c.max_grad_norm / (grad_norm + 1e-12)))
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate
                optimizer.step()
            if said and hasattr(self.reward, "observe"):
                self.reward.observe(said)
            progress.step += 1
            progress.skipped += bool(trouble)
            progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if trouble else 0
        reward, loss, seconds = sum(rewards) / len(rewards), sum(losses) / len(losses), time.monotonic() - started
        return StepEvent(progress.step, c.steps, reward, loss, grad_norm, learning_rate, seconds, self._memory(),
                         trouble, {name: float(values.mean()) for name, values in said.items()})  # fmt: skip

    def _learn_in_memory(self, plan: Plan, draw: int, parameters: Mapping[str, Tensor]) -> Judgement:
        """One batch; if it runs out of GPU memory, once more under every smaller plan from then on."""
        before = {key: None if p.grad is None else p.grad.clone() for key, p in parameters.items()}
        while True:
            try:
                with checkpointed_blocks(self.model, self._memory_plan.checkpoint_blocks):
                    return self._learn(plan, draw)
            except torch.OutOfMemoryError:
                less = smaller(self._memory_plan)
                if less is None:
                    raise
                log.warning("out of GPU memory with memory: %s; going on with %s", self._memory_plan.name, less.name)
            # Outside of the handler, for the error holds on to every tensor of the step that failed.
            self._adopt(less)
            for key, parameter in parameters.items():
                parameter.grad = before[key]
            torch.cuda.empty_cache()

    def _adopt(self, plan: MemoryPlan) -> None:
        self._memory_plan = plan
        if isinstance(self._tick, Placement):
            self._tick.plan = plan

    def _learn(self, plan: Plan, draw: int) -> Judgement:
        """Rollout, judge and replay of one batch: gradients are added to the LoRA's, unless they are not finite."""
        c = self.config
        indices = draw_prompts(len(self.prompts), seed_for(c.seed, self._rank), draw, c.batch_size)
        prompts = [self.prompts[i] for i in indices]
        seeds = [seed_for("noise", c.seed, draw, self._rank, b) for b in range(c.batch_size)]
        self._tick("rollout")  # the denoiser is where the conditioning shall be
        batched, save_memory = self._memory_plan.batched_guidance, self._memory_plan.checkpoint_vae
        walk = Walk(self.model, self._conditioning(prompts), c.guidance_scale, batched, self._tick, seeds)
        latents, kept = rollout(walk, self.model.initial_latents(self._latent_shape, seeds), plan)
        verdict = judge(walk, latents, self.reward, prompts, c.objective, c.view_at(draw, save_memory))
        if verdict.finite:
            replay(walk, kept, plan, verdict.gradient / c.accumulation, c.backprop.coupling)
        return verdict

    def _encode_prompts(self) -> None:
        wanted = [*self.prompts, *self.sample_prompts]
        if self.config.guidance_scale != 1:
            wanted.append(self.config.negative_prompt)
        self._texts.prepare(wanted, self._tick)

    def _conditioning(self, prompts: Sequence[str]) -> Conditioning:
        positive = [self._texts[prompt] for prompt in prompts]
        guided = self.config.guidance_scale != 1
        negative = [self._texts[self.config.negative_prompt]] * len(prompts) if guided else None
        return self.model.conditioning(positive, negative, self._latent_shape)

    def evaluate(self) -> Evaluation:
        """The evaluation prompts on their fixed seeds, sampled and scored with the model as it is now."""
        c, clips, scores = self.config, [], []
        self._encode_prompts()
        with torch.no_grad():
            for index in range(0, len(self.sample_prompts), c.batch_size):
                prompts = self.sample_prompts[index : index + c.batch_size]
                self._tick("rollout")
                seeds = [seed_for("sample", c.seed, index + b) for b in range(len(prompts))]
                frames = sample(self.model, self._conditioning(prompts), seeds, self._latent_shape, c.sampler_steps,
                                c.guidance_scale, batched_guidance=self._memory_plan.batched_guidance,
                                tick=self._tick)  # fmt: skip
                self._tick("reward")
                scores += self.reward.score(frames, prompts).tolist()
                clips.append(frames.cpu())
        return Evaluation(sum(scores) / len(scores), tuple(scores), tuple(self.sample_prompts), torch.cat(clips))

    def _evaluate(self, step: int) -> Evaluation:
        evaluation = self.evaluate()
        self.files.write_samples(step, evaluation.frames, self.model.spec.fps)
        return evaluation

    def _memory(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        import psutil

        return psutil.Process().memory_info().rss

    def _save_lora(self, expert: str, adapter: Adapter, step: int) -> None:
        c = self.config
        several = {"expert": expert} if len(self.model.spec.experts) > 1 else {}
        metadata = {
            "base_model": self.model.spec.name,
            "reward": self.reward.name,
            "rank": str(c.rank),
            "network_alpha": f"{c.network_alpha:g}",
            "step": str(step),
            "config": canonical_json(c.decisive()),
            "config_hash": c.fingerprint(),
            "ss_base_model_version": self.model.spec.family,
            **several,
            **self._metadata,
        }
        names = self.model.lora_names(expert)
        write_lora(self.lora_paths[expert], adapter.weights(), names, metadata, getattr(torch, c.save_dtype))


def _indexed(device: torch.device) -> torch.device:
    """``cuda`` is the GPU in use, by its number, as tensors name it."""
    return torch.device("cuda", torch.cuda.current_device()) if str(device) == "cuda" else device
