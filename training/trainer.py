"""The training loop: one event per optimiser step; to stop, stop iterating."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from ..files import canonical_json, write_text
from ..lora.adapter import inject_new, total_norm
from ..lora.files import write_lora
from ..reward_models.protocol import Reward
from ..video_models.protocol import Conditioning, Tick, VideoModel
from .checkpoint import Progress, RunIdentity, list_checkpoints, load_latest, save_checkpoint
from .config import TrainConfig
from .gradient import Walk, judge, replay, rollout, silent
from .media import reward_curve, write_png, write_video
from .prompts import EmbeddingStore
from .sample import sample
from .seeds import draw_prompts, seed_for

log = logging.getLogger(__name__)

SHOWN = 6
"""How many clips of an evaluation are written as videos and shown; all of them are scored."""


class TrainingStopped(RuntimeError):
    """The run ended itself; the message says why. What was learned so far is saved."""


@dataclass(frozen=True)
class Evaluation:
    """Fixed prompts and seeds, sampled with the LoRA as it is.

    Attributes:
        reward: Mean over the prompts.
        rewards: One a prompt.
        prompts: The prompts.
        frames: ``[N, 3, T, H, W]`` in 0..1 on the CPU.
    """

    reward: float
    rewards: tuple[float, ...]
    prompts: tuple[str, ...]
    frames: Tensor = field(repr=False)


@dataclass(frozen=True)
class StepEvent:
    """What happened in one optimiser step.

    Attributes:
        step: Steps made so far; 0 is the state before training.
        steps: Steps of the whole run.
        reward: Mean reward of the training batch; NaN at step 0.
        loss: Mean loss of the batch.
        grad_norm: Norm of the LoRA's gradient before clipping.
        learning_rate: Of this step.
        seconds: Wall time of this step.
        memory: Peak bytes on the GPU, or resident bytes of the process on a CPU.
        skipped: Why the step changed nothing, or empty.
        evaluation: On evaluation steps.
    """

    step: int
    steps: int
    reward: float
    loss: float
    grad_norm: float
    learning_rate: float
    seconds: float
    memory: int
    skipped: str = ""
    evaluation: Evaluation | None = None

    def record(self) -> dict:
        """For the log: plain numbers, NaN as null."""
        data = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "evaluation"}
        if self.evaluation:
            data["evaluation"] = self.evaluation.reward
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in data.items()}


class Trainer:
    """Trains one LoRA on one network of a video model by reward backpropagation.

    Iterate to train: the first event is the state before training, then comes one a step. Leaving the
    loop, an error, or an exception raised in ``tick`` end the run: a checkpoint and the LoRA so far are
    saved and the model is as it was before. A later run in the same folder with the same settings
    resumes, and its steps equal those of a run never interrupted.

    Files in ``folder``: ``<folder's name>.safetensors`` (the LoRA), ``checkpoint-*.safetensors``,
    ``log.jsonl``, ``config.json``, ``reward.png``, ``samples/*.mp4``.

    Args:
        model: A loaded video model.
        reward: Judges the frames; must be differentiable.
        prompts: To train on.
        config: Settings; "model's default" is filled in here.
        folder: Of this run.
        sample_prompts: To evaluate on; the first of ``prompts`` if none are given.
        expert: Which network of the model to train.
        rank: This process among several; takes part in all chance.
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
        expert: str = "transformer",
        rank: int = 0,
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
        self.folder = Path(folder).resolve()
        self.sample_prompts = list(sample_prompts or prompts)[: self.config.sample_count]
        self.lora_path = self.folder / f"{self.folder.name}.safetensors"
        self._expert, self._rank, self._tick, self._metadata = expert, rank, tick, metadata or {}
        c = self.config
        self._latent_shape = model.spec.latent_shape(c.width, c.height, c.frames)
        self._texts = EmbeddingStore(model, cache)
        prompts_hash = f"{seed_for(*self.prompts):016x}"
        self._identity = RunIdentity(model.spec.name, reward.name, prompts_hash, c)
        self._log: list[dict] = []

    def __iter__(self) -> Iterator[StepEvent]:
        c = self.config
        self.folder.mkdir(parents=True, exist_ok=True)
        for partial in self.folder.rglob(".*.partial"):  # half-written when an earlier run was killed
            partial.unlink()
        self._encode_prompts()
        network = self.model.denoisers[self._expert]
        adapter = inject_new(network, c.lora_targets, c.rank, c.network_alpha, seed_for("lora", c.seed))
        try:
            parameters = adapter.parameters()
            optimizer = torch.optim.AdamW(
                list(parameters.values()), c.learning_rate, (c.beta1, c.beta2), c.epsilon, c.weight_decay
            )
            progress = load_latest(self.folder, self._identity, parameters, optimizer) or Progress()
            self._open_log(progress.step)
            saved_at = progress.step if list_checkpoints(self.folder) else -1
            try:
                if progress.step == 0:
                    started = time.monotonic()
                    evaluation = self._evaluate(0) if c.sample_every else None
                    took, nan = time.monotonic() - started, math.nan
                    before = StepEvent(0, c.steps, nan, nan, nan, 0.0, took, self._memory(), "", evaluation)
                    yield self._logged(before)
                while progress.step < c.steps:
                    event = self._step(progress, parameters, optimizer)
                    if c.sample_every and (progress.step % c.sample_every == 0 or progress.step == c.steps):
                        try:
                            event = replace(event, evaluation=self._evaluate(progress.step))
                        except BaseException:  # the step is made, whatever became of its evaluation
                            self._logged(event)
                            raise
                    if progress.step % c.save_every == 0 or progress.step == c.steps:
                        save_checkpoint(self.folder, progress, self._identity, parameters, optimizer)
                        saved_at = progress.step
                    yield self._logged(event)
                    if progress.skipped_in_a_row >= c.max_skipped:
                        raise TrainingStopped(
                            f"stopped at step {progress.step}: {progress.skipped_in_a_row} steps in a row "
                            f"were skipped, the last because {event.skipped}; "
                            "lower the learning rate or check the reward"
                        )
            finally:
                if saved_at != progress.step:
                    save_checkpoint(self.folder, progress, self._identity, parameters, optimizer)
                self._save_lora(adapter, progress.step)
                self._draw_curve()
        finally:
            adapter.remove()

    def _step(self, progress: Progress, parameters: dict, optimizer: torch.optim.Optimizer) -> StepEvent:
        """One optimiser step; the adapter's parameters change at its very end or not at all."""
        c, started = self.config, time.monotonic()
        if self.model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.model.device)
        plan = c.backprop.draw(self.model.sigmas(c.sampler_steps), seed_for("plan", c.seed, progress.step))
        rewards, losses, trouble = [], [], ""
        optimizer.zero_grad(set_to_none=True)
        for micro in range(c.accumulation):
            draw = progress.step * c.accumulation + micro
            prompts = [
                self.prompts[i]
                for i in draw_prompts(len(self.prompts), seed_for(c.seed, self._rank), draw, c.batch_size)
            ]
            seeds = [seed_for("noise", c.seed, draw, self._rank, b) for b in range(c.batch_size)]
            walk = Walk(
                self.model, self._conditioning(prompts), c.guidance_scale, c.batched_guidance, self._tick, seeds
            )
            latents, kept = rollout(walk, self.model.initial_latents(self._latent_shape, seeds), plan)
            verdict = judge(walk, latents, self.reward, prompts, c.objective,
                            judged_latents=c.judged_latents, judged_frames=c.judged_frames)  # fmt: skip
            rewards += verdict.rewards.tolist()
            losses.append(verdict.loss)
            if not (torch.isfinite(verdict.rewards).all() and torch.isfinite(verdict.gradient).all()):
                trouble = "the reward or its gradient was not a finite number"
                break
            replay(walk, kept, plan, verdict.gradient / c.accumulation, c.backprop.coupling)
        learning_rate = c.lr_at(progress.step)
        gradients = [p.grad for p in parameters.values() if p.grad is not None]
        grad_norm = total_norm(gradients) if gradients and not trouble else math.nan
        if not trouble and not math.isfinite(grad_norm):
            trouble = "the LoRA's gradient was not a finite number"
        if not trouble:
            for gradient in gradients:
                gradient.mul_(min(1.0, c.max_grad_norm / (grad_norm + 1e-12)))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()
        progress.step += 1
        progress.skipped += bool(trouble)
        progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if trouble else 0
        reward, loss, seconds = sum(rewards) / len(rewards), sum(losses) / len(losses), time.monotonic() - started
        return StepEvent(
            progress.step, c.steps, reward, loss, grad_norm, learning_rate, seconds, self._memory(), trouble
        )  # fmt: skip

    def _encode_prompts(self) -> None:
        wanted = [*self.prompts, *self.sample_prompts]
        if self.config.guidance_scale != 1:
            wanted.append(self.config.negative_prompt)
        self._texts.prepare(wanted, self._tick)
        if self.model.device.type != "cpu":
            self.model.to("cpu", "text")

    def _conditioning(self, prompts: Sequence[str]) -> Conditioning:
        positive = [self._texts[prompt] for prompt in prompts]
        guided = self.config.guidance_scale != 1
        negative = [self._texts[self.config.negative_prompt]] * len(prompts) if guided else None
        return self.model.conditioning(positive, negative, self._latent_shape)

    @torch.no_grad()
    def _evaluate(self, step: int) -> Evaluation:
        c, clips, scores = self.config, [], []
        for index in range(0, len(self.sample_prompts), c.batch_size):
            prompts = self.sample_prompts[index : index + c.batch_size]
            seeds = [seed_for("sample", c.seed, index + b) for b in range(len(prompts))]
            frames = sample(self.model, self._conditioning(prompts), seeds, self._latent_shape, c.sampler_steps,
                            c.guidance_scale, batched_guidance=c.batched_guidance, tick=self._tick)  # fmt: skip
            self._tick("reward")
            scores += self.reward.score(frames, prompts).tolist()
            clips.append(frames.cpu())
        frames = torch.cat(clips)
        for index, clip in enumerate(frames[:SHOWN]):
            write_video(self.folder / "samples" / f"{index:02d}-step-{step:06d}.mp4", clip, self.model.spec.fps)
        return Evaluation(sum(scores) / len(scores), tuple(scores), tuple(self.sample_prompts), frames)

    def _memory(self) -> int:
        if self.model.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.model.device)
        import psutil

        return psutil.Process().memory_info().rss

    def _save_lora(self, adapter, step: int) -> None:
        c = self.config
        metadata = {
            "base_model": self.model.spec.name,
            "reward": self.reward.name,
            "rank": str(c.rank),
            "network_alpha": f"{c.network_alpha:g}",
            "step": str(step),
            "config": canonical_json(c.decisive()),
            "config_hash": c.fingerprint(),
            "ss_base_model_version": self.model.spec.family,
            **self._metadata,
        }
        names = self.model.lora_names(self._expert)
        write_lora(self.lora_path, adapter.weights(), names, metadata, getattr(torch, c.save_dtype))

    def _open_log(self, step: int) -> None:
        """Keep what an earlier run logged up to the checkpoint; steps after it will be made again."""
        path = self.folder / "log.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() and step else []
        self._log = [record for record in map(_json_or_none, lines) if record and record["step"] <= step]
        write_text(path, "".join(json.dumps(record) + "\n" for record in self._log))
        write_text(self.folder / "config.json", json.dumps(self.config.to_dict(), indent=2) + "\n")

    def _logged(self, event: StepEvent) -> StepEvent:
        self._log.append(event.record())
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(self._log[-1]) + "\n")
        if event.evaluation:
            self._draw_curve()
        return event

    def curve(self):
        """The reward curve so far as ``[H, W, 3]`` uint8."""
        batches = [(r["step"], r["reward"]) for r in self._log if r["reward"] is not None]
        evaluations = [(r["step"], r["evaluation"]) for r in self._log if r.get("evaluation") is not None]
        return reward_curve(batches, evaluations, self.reward.name)

    def _draw_curve(self) -> None:
        write_png(self.folder / "reward.png", self.curve())


def _json_or_none(line: str) -> dict | None:
    try:
        return json.loads(line)
    except ValueError:  # the last line of a run that was killed while writing
        return None
