"""The training loop: one event per optimiser step; to stop, stop iterating."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..lora.adapter import Adapter, LoraUse, total_norm
from ..reward_models.protocol import Reward
from ..video_models.protocol import Tick, VideoModel
from .adapters import injected, without
from .average import Average
from .checkpoint import Progress, RunIdentity, list_checkpoints, load_latest, save_checkpoint
from .config import TrainConfig
from .distributed import Group, told_when_alone
from .events import Evaluation, StepEvent, TrainingStopped
from .examples import Example, as_examples, check_examples
from .gradient import silent
from .guards import Guards
from .interrupts import interrupt_later
from .learner import Learner, Part
from .memory import peak_memory, plan_for
from .run_folder import RunFolder, best_path
from .run_sweep import sweep_run
from .seeds import draw_prompts, seed_for
from .sharding import ALONE, is_sharded
from .trackers import Trackers, check_installed, tracked
from .watch import Watch

log = logging.getLogger(__name__)


class Trainer:
    """Trains reward LoRAs on one or all networks of a video model by reward backpropagation.

    Iterate to train: the first event is the state before training, then comes one a step. Leaving the
    loop, an error, or an exception raised in ``tick`` end the run: a checkpoint and the LoRA so far are
    saved and the model is as it was before. A later run in the same folder with the same settings
    resumes, and its steps equal those of a run never interrupted.

    Files in ``folder``: ``<folder's name>.safetensors`` (the LoRA; of a model with several networks one each,
    ``<name>_<expert>.safetensors``) and ``..._best.safetensors`` (at the best evaluation, see :class:`.guards.Guards`),
    ``checkpoint-*.safetensors``, ``log.jsonl``, ``config.json``, ``reward.png``, ``report.html``, ``samples/*.mp4``.

    Args:
        model: A loaded video model.
        reward: Judges the frames; must be differentiable.
        prompts: To train on, with or without pictures.
        config: Settings; "model's default" is filled in here.
        folder: Of this run.
        sample_prompts: To evaluate on; the first of ``prompts`` if none are given.
        heldout: Rewards that are not trained on: at evaluations they tell the guards what the reward is worth.
        start: LoRAs whose weights a new run begins with, at strength 1; see :func:`.start.begin_from`.
        group: The processes that train together; this one alone if not given.
        device: Where to compute: what a phase needs is brought there, and nothing is left there; the model's own
            if not given.
        cache: Folder for text embeddings; None keeps them in memory.
        tick: Called before every call of a large model; may raise to stop.
        metadata: Kept in the LoRA's file, for example the licence.

    Raises:
        ValueError: Settings that do not fit the model, a reward that cannot train, a folder with another run.
        TrainingStopped: While iterating: too many steps in a row without a finite gradient, or a full disk.
    """

    def __init__(
        self,
        model: VideoModel,
        reward: Reward,
        prompts: Sequence[str | Example],
        config: TrainConfig,
        folder: Path | str,
        *,
        sample_prompts: Sequence[str | Example] = (),
        heldout: Sequence[Reward] = (),
        start: Sequence[LoraUse] = (),
        group: Group | None = None,
        device: torch.device | str | None = None,
        cache: Path | None = None,
        tick: Tick = silent,
        metadata: dict[str, str] | None = None,
    ) -> None:
        if not reward.differentiable:
            raise ValueError(f"the reward {reward.name} is not differentiable, so it can score but not train")
        if len({judge.name for judge in (reward, *heldout)}) <= len(heldout):
            raise ValueError(f"held-out rewards must differ from the trained one, {reward.name}, and from each other")
        if not prompts:
            raise ValueError("training needs at least one prompt, got none")
        self.model, self.reward, self.examples = model, reward, as_examples(prompts)
        self.config = c = config.for_model(model.spec)
        self.files = RunFolder(folder, reward.name)
        self.folder = self.files.path
        self.samples = as_examples(sample_prompts or prompts)[: c.sample_count]
        check_examples(self.examples, "training prompts", model.spec, reward)
        for judge in (reward, *heldout):
            check_examples(self.samples, "sample prompts", model.spec, judge)
        self.lora_paths = {expert: self.files.lora_path(expert, model.spec.experts) for expert in c.experts}
        if c.shard and not is_sharded(model):
            raise ValueError(ALONE)
        self.group, self.metadata = group or Group(), metadata or {}
        self.heldout, self.start = tuple(heldout), tuple(start)
        self._watch: Watch | None = None
        self._device = _indexed(torch.device(device)) if device is not None else model.device
        self._learner = Learner(model, reward, c, tick, self._device, cache)
        check_installed(c.trackers)
        self._trackers = Trackers()
        self._begun: dict[str, Tensor] = {}  # latents at the first trained step, of batches that are used again
        self._sigmas = model.sigmas(c.sampler_steps)
        self._trainable = c.trainable_steps(model.spec, self._sigmas)
        prompts_hash = f"{seed_for(*(example.identity for example in self.examples)):016x}"
        self._identity = RunIdentity(model.spec.name, reward.name, prompts_hash, c)

    @property
    def lora_path(self) -> Path:
        """The LoRA, or with several networks that of the first."""
        return next(iter(self.lora_paths.values()))

    @property
    def kept_paths(self) -> list[Path]:
        """The LoRAs of the best evaluation that are there."""
        return [path for path in map(best_path, self.lora_paths.values()) if path.is_file()]

    @property
    def result_paths(self) -> list[Path]:
        """What the run gives: the newest LoRAs, or if its last evaluation was bad those of the best."""
        return (self._watch and self._watch.guards.bad and self.kept_paths) or list(self.lora_paths.values())

    @property
    def videos_a_step(self) -> int:
        """The effective batch."""
        return self.group.size * self.config.accumulation * self.config.batch_size

    @property
    def batch_in_words(self) -> str:
        """The effective batch and what it is made of."""
        c, size, videos = self.config, self.group.size, self.videos_a_step
        parts = f"{size} process{'es' * (size > 1)} x {c.accumulation} accumulated x batches of {c.batch_size}"
        return f"{videos} video{'s' * (videos > 1)} a step: {parts}"

    def evaluate(self) -> Evaluation:
        """The evaluation prompts on their fixed seeds, sampled and scored with the model as it is now.

        Outside of a run, the frozen weights are stored as in one.
        """
        with ExitStack() as alone:
            if not self._learner.working:
                alone.callback(self._learner.rest)
                self._learner.prepare(self.samples)
                alone.enter_context(self._learner.at_work())
            return self._learner.evaluate(self.samples, self.heldout)

    def estimate(self, free: int) -> str:
        """What memory the run would need, by phase and plan, as a table; and which plan fits into ``free`` bytes."""
        self._learner.prepare(self.examples[:1])
        self._learner.rest()
        return self._learner.estimate().table(free)

    def __iter__(self) -> Iterator[StepEvent]:
        c, leads = self.config, self.group.leads
        if leads:
            self.files.claim()
            log.info(self.batch_in_words)
        with ExitStack() as undo:
            undo.enter_context(self.files.told_when_full())
            undo.enter_context(told_when_alone())
            undo.callback(self._learner.rest)
            self._learner.prepare([*self.examples, *self.samples])
            adapters = injected(self.model, c, self.start, self._device, undo)
            undo.enter_context(self._learner.at_work())
            parameters = {
                f"{expert}.{key}": parameter
                for expert, adapter in adapters.items()
                for key, parameter in adapter.parameters().items()
            }
            self.group.share(parameters.values())
            optimizer = torch.optim.AdamW(
                list(parameters.values()), c.learning_rate, (c.beta1, c.beta2), c.epsilon, c.weight_decay
            )
            average = Average(parameters, c.ema)
            state = (self._identity, parameters, average.values, optimizer, self.reward, self._begun)
            progress = load_latest(self.folder, *state) or Progress(processes=self.group.size)
            if progress.processes != self.group.size and leads:
                log.warning(
                    "this run was made by %s so far and goes on with %s: from step %d on its prompts and noise are "
                    "other ones than they would have been, %d videos a step",
                    *(f"{n} process{'es' * (n > 1)}" for n in (progress.processes, self.group.size)),
                    progress.step + 1, self.videos_a_step,
                )  # fmt: skip
            progress.processes = self.group.size
            optimizer.register_step_post_hook(lambda *_: average.update(progress.step - progress.skipped))
            if progress.memory and c.memory == "auto" and not c.shard:
                self._learner.adopt(plan_for(progress.memory, self.model))
            watch = self._watch = Watch(self, adapters, progress)
            guards = watch.guards
            saved_at = progress.step if list_checkpoints(self.folder) else -1
            self.group.gather(progress.step)  # nobody writes before everybody has read
            if leads:
                self.files.open(progress.step, c.to_dict(), [sample.prompt for sample in self.samples])
                self._trackers = undo.enter_context(
                    tracked(c.trackers, self.folder, c.to_dict(), progress.step, self.model.spec.fps)
                )
                for path in self.kept_paths if guards.best is None else ():
                    path.unlink()  # of an earlier run

            def save() -> None:
                if leads:
                    save_checkpoint(self.folder, progress, *state)

            try:
                if progress.step == 0:
                    yield self._logged(self._before(watch))
                elif c.evaluates_after(progress.step) and guards.last < progress.step:  # it was stopped in the middle
                    with average.in_place():
                        missed, saved_at = watch.evaluate(progress.step), -1
                    if missed:
                        self.files.amend(missed)
                        self._trackers.evaluation(missed, progress.step)
                while progress.step < c.steps and not guards.stopped:
                    event = self._step(progress, adapters, parameters, optimizer, guards)
                    if c.evaluates_after(progress.step):
                        try:
                            with average.in_place():
                                evaluation = watch.evaluate(progress.step)
                            event = replace(event, evaluation=evaluation, stop=guards.stopped)
                        except BaseException:  # the step is made, whatever became of its evaluation
                            self._logged(event)
                            raise
                    if progress.step % c.save_every == 0 or progress.step == c.steps:
                        save()
                        saved_at = progress.step
                    yield self._logged(event)
                    if progress.skipped_in_a_row >= c.max_skipped:
                        raise TrainingStopped(
                            f"stopped at step {progress.step}: {progress.skipped_in_a_row} steps in a row "
                            f"were skipped, the last because {event.skipped}; "
                            "lower the learning rate or check the reward"
                        )
                if leads and c.sweep and not c.shard:
                    with average.in_place():
                        sweep_run(self, watch)
                self.group.gather(None)  # nobody leaves before
            finally:
                with interrupt_later():
                    try:
                        if saved_at != progress.step:
                            save()
                    finally:  # the LoRA is smaller than a checkpoint
                        if leads:
                            with average.in_place():
                                watch.save(progress.step)
                            self.files.draw()

    def _step(
        self,
        progress: Progress,
        adapters: dict[str, Adapter],
        parameters: dict,
        optimizer: torch.optim.Optimizer,
        guards: Guards,
    ) -> StepEvent:
        """One optimiser step; the adapters' parameters change at its very end or not at all."""
        c, started = self.config, time.monotonic()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        turn, again = divmod(progress.step, c.reuse)
        plan = c.backprop.draw(self._sigmas, seed_for("plan", c.seed, turn), self._trainable)
        begun, used_again = {}, c.reuse > 1 and not again
        parts, trouble, blind, conflicts = [], "", 0, {}
        weight = guards.anchor_weight(c.anchor, c.anchor_target)
        optimizer.zero_grad(set_to_none=True)
        for micro in range(c.accumulation):
            examples, seeds, draw = self._batch(turn * c.accumulation + micro)
            batch = f"{draw}.{self.group.rank}.{self.group.size}"
            report = not micro and c.evaluates_after(progress.step + 1)
            lesson = self._learner.learn(
                examples, seeds, plan, draw, parameters, lambda: without(adapters.values()), weight, report,
                self._begun.get(batch),
            )  # fmt: skip
            if used_again:
                begun[batch] = lesson.begun.cpu()
            verdict, conflicts = lesson.verdict, lesson.conflicts or conflicts
            parts.append(Part(verdict.rewards.cpu(), verdict.loss, lesson.drift, verdict.motion, verdict.terms))
            blind += verdict.blind
            if not verdict.finite:
                trouble = "the reward or its gradient was not a finite number"
                if not c.shard:  # then all must call the networks equally often
                    break
        if not trouble and blind == c.accumulation:
            trouble = "the reward found nothing to judge, such as no face: its gradient was 0 everywhere"
        progress.memory = self._learner.plan.name
        if used_again:  # everybody's, for the checkpoint
            for of_one in self.group.gather(begun):
                self._begun.update(of_one)
        counted = self.group.average(parameters.values(), not trouble)
        parts = [part for parts_of_one in self.group.gather(parts) for part in parts_of_one]
        trouble = "" if counted else trouble or "no process could judge its batch"
        learning_rate = c.lr_at(progress.step)
        gradients = [p.grad for p in parameters.values() if p.grad is not None]
        grad_norm = total_norm(gradients) if gradients and not trouble else math.nan
        if not trouble and not math.isfinite(grad_norm):
            trouble = "the LoRA's gradient was not a finite number"
        terms = {name: torch.cat([part.terms[name].cpu() for part in parts]) for name in parts[0].terms}
        drift = sum(part.drift for part in parts) / len(parts)
        with interrupt_later():
            if not trouble:
                for gradient in gradients:
                    gradient.mul_(min(1.0, c.max_grad_norm / (grad_norm + 1e-12)))
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate
                optimizer.step()
                guards.steer_anchor(c.anchor, c.anchor_target, drift)
            if terms and hasattr(self.reward, "observe"):
                self.reward.observe(terms)
            progress.step += 1
            if progress.step % c.reuse == 0:
                self._begun.clear()
            progress.skipped += bool(trouble)
            progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if trouble else 0
        return StepEvent(
            step=progress.step,
            steps=c.steps,
            reward=float(torch.cat([part.rewards for part in parts]).mean()),
            loss=sum(part.loss for part in parts) / len(parts),
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            seconds=time.monotonic() - started,
            memory=peak_memory(self._device),
            skipped=trouble,
            drift=drift,
            anchor=weight,
            terms={name: float(values.mean()) for name, values in terms.items()},
            motion=sum(part.motion for part in parts) / len(parts),
            conflicts=conflicts,
        )

    def _batch(self, draw: int) -> tuple[list[Example], list[int], int]:
        """Examples and noise seeds of this process's part of a batch: N processes share one N times as large."""
        c, group = self.config, self.group
        indices = draw_prompts(len(self.examples), seed_for(c.seed, 0), draw, c.batch_size * group.size)
        mine = range(group.rank * c.batch_size, (group.rank + 1) * c.batch_size)
        return [self.examples[indices[b]] for b in mine], [seed_for("noise", c.seed, draw, 0, b) for b in mine], draw

    def _before(self, watch: Watch) -> StepEvent:
        """The state before any step."""
        started, nan = time.monotonic(), math.nan
        evaluation = watch.evaluate(0) if self.config.sample_every else None
        took, peak = time.monotonic() - started, peak_memory(self._device)
        return StepEvent(0, self.config.steps, nan, nan, nan, 0.0, took, peak, evaluation=evaluation)

    def _logged(self, event: StepEvent) -> StepEvent:
        if self.group.leads:
            self.files.add(event)
            self._trackers.step(event)
        return event


def _indexed(device: torch.device) -> torch.device:
    """``cuda`` is the GPU in use, by its number, as tensors name it."""
    return torch.device("cuda", torch.cuda.current_device()) if str(device) == "cuda" else device
