"""One run of the trainer under a node: its folder, its live preview, its outputs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import closing
from copy import copy
from dataclasses import replace
from pathlib import Path

import folder_paths
import numpy as np
import torch
from comfy.model_management import (
    InterruptProcessingException,
    soft_empty_cache,
    throw_exception_if_processing_interrupted,
)
from comfy_api.latest import io
from comfy_execution.graph import ExecutionBlocker
from PIL import Image

from ..files import canonical_json
from ..lora.adapter import LoraUse, applied
from ..lora.files import LoraFile, read_lora
from ..training.config import TrainConfig
from ..training.events import Evaluation
from ..training.examples import Example
from ..training.job import Job
from ..training.media import contact_sheet, write_png
from ..training.run_folder import SHOWN
from ..training.run_loras import checkpoint_steps
from ..training.trainer import Trainer
from ..training.workers import Workers
from . import folders
from .bridge import lent, picture_to_image, to_images
from .live import LiveTraining, ShownTrainer
from .types import LoadedModel, LoadedReward, lora_digest

REDRAW = 5.0
"""Seconds between drawings of the live preview."""


class TrainingRun:
    """One run of the trainer, and what the node shows of it.

    Args:
        loaded: The model and the LoRAs that stay applied.
        reward: What shall rise.
        prompts: To train on, with or without pictures.
        samples: To evaluate on; the first training prompts if there are none.
        config: Settings with every default filled in.
        prefix: Start of the folder's name.
        heldout: Rewards that are not trained on and tell the guards what the trained one is worth.
        resume: The folder of a run to go on with; None is found by the settings.
        start: LoRAs whose weights a new run begins with.
        devices: How many train together; above 1, in processes of their own.

    Raises:
        ValueError: A prefix that leads away, a run that cannot go on, or a model that no other process can load.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        reward: LoadedReward,
        prompts: list[Example],
        samples: list[Example],
        config: TrainConfig,
        prefix: str,
        heldout: Sequence[LoadedReward] = (),
        resume: Path | None = None,
        start: Sequence[LoraFile] = (),
        devices: int = 1,
    ) -> None:
        self.loaded, self.prompts, self.config = loaded, prompts, config
        self.devices, self.sources = devices, [one.source for one in (loaded, reward, *heldout)]
        if devices > 1 and None in self.sources:
            raise ValueError(
                "several devices train in processes that load model and rewards themselves; that needs Load Video "
                "Model, with or without (files), and Load Reward with device 'default' and a path without , [ ] and ="
            )
        self.reward = replace(reward, reward=copy(reward.reward))  # what a mixture learns of its terms stays here
        self.heldout = [judge.reward for judge in heldout]
        self.samples = (samples or prompts)[: config.sample_count]
        self.start = [LoraUse(lora, 1.0) for lora in start]
        if resume and start:
            raise ValueError("resume_from goes on with a run, start_lora begins a new one; use only one of them")
        self.folder = self._resumable(resume) if resume else self._choose_folder(folders.check_prefix(prefix), samples)
        self.first: Evaluation | None = None
        self.last: Evaluation | None = None
        self.shown = ""  # of which step the last evaluation is

    def _choose_folder(self, prefix: Path, samples: list[Example]) -> Path:
        """The same settings always meet the same folder, and so their own checkpoint."""
        told = [[example.identity for example in some] for some in (self.prompts, samples)]
        what = [self.config.decisive(), self.loaded.fingerprint(), self.reward.identity, *told]
        what += [lora_digest(use.lora) for use in self.start]
        digits = hashlib.sha256(canonical_json(what).encode()).hexdigest()[:8]
        folder = prefix.with_name(f"{prefix.name}_{digits}")
        if checkpoint_steps(folder)[-1:] > [self.config.steps]:
            return folder.with_name(f"{folder.name}_{self.config.steps}")  # that run has gone further already
        return folder

    def _resumable(self, folder: Path) -> Path:
        made = checkpoint_steps(folder)
        if not made:
            raise ValueError(f"{folder.name} has no checkpoint to go on from; begin a new run")
        if made[-1] > self.config.steps:
            raise ValueError(f"{folder.name} has made {made[-1]} steps already; set steps above that to go on")
        return folder

    def execute(self, progress: LiveTraining) -> io.NodeOutput:
        """Train, then gather what the node gives."""
        model, config = self.loaded.model, self.config
        cache = Path(folder_paths.get_temp_directory(), "reward_lora_text")
        with lent(model, self.reward.reward) as device, applied(model, self.loaded.uses):
            alone = config
            if self.devices > 1 and config.shard:  # too large for this process, should it have to paint
                alone = replace(config, shard=False, memory="offload")
            trainer = ShownTrainer(
                model,
                self.reward.reward,
                self.prompts,
                alone,
                self.folder,
                sample_prompts=self.samples,
                heldout=self.heldout,
                start=self.start,
                device=device,
                cache=cache,
                tick=progress,
            )
            trainer.live = progress
            if self.devices > 1:
                trainer = self._workers(trainer, device, cache, progress)
            made, seconds, skipped = self._follow(trainer, progress)
            paths = trainer.result_paths
            best = paths != list(trainer.lora_paths.values())
            if best:
                self.last = None
            loras = [read_lora(path).in_memory() for path in paths]
            self._complete(trainer, loras, "best step" if best else "after")
        curve, picture = trainer.files.curve(), self._picture(trainer)
        overview = write_png(self.folder / "overview.png", picture)
        summary = self._summary(made, seconds, skipped)
        progress.finish(picture, summary)  # the last live preview stays on the node
        kept = [self.folder / "report.html", *trainer.lora_paths.values(), *trainer.kept_paths]
        kept += [self.folder / "reward.png", self.folder / "log.jsonl"]
        for index in range(min(SHOWN, len(self.samples))):
            videos = sorted((self.folder / "samples").glob(f"{index:02d}-step-*.mp4"))
            kept += videos[:1] + videos[1:][-1:]  # before any step, and the newest
        return io.NodeOutput(
            loras[0],
            picture_to_image(curve),
            to_images(self.first.frames[:SHOWN]),
            to_images(self.last.frames[:SHOWN]),
            summary,
            loras[1] if len(loras) > 1 else ExecutionBlocker(None),
            folders.listed(overview)[0]["subfolder"],
            ui={"images": folders.listed(overview), "files": folders.listed(*kept), "text": [summary]},
        )

    def _workers(self, trainer: Trainer, device: torch.device, cache: Path, progress: LiveTraining) -> Workers:
        """The same in a process for each device; what is here makes room for them."""
        for part in (self.loaded.model, self.reward.reward, *self.heldout):
            if hasattr(part, "to") and device.type != "cpu":
                part.to("cpu")
        soft_empty_cache()
        model, reward, *heldout = self.sources
        job = Job(model, reward, self.prompts, self.config, self.folder, self.samples, heldout, self.loaded.uses,
                  self.start, device.type, cache)  # fmt: skip
        return Workers(job, self.devices, tick=progress, beat=throw_exception_if_processing_interrupted,
                       say=progress.say, evaluate=trainer.evaluate)  # fmt: skip

    def _follow(self, trainer: Trainer | Workers, progress: LiveTraining) -> tuple[int, float, int]:
        """Make the steps and show them. Gives the steps made now, their seconds, and how many were skipped."""
        made, seconds, skipped, drawn = 0, 0.0, 0, 0.0
        try:
            with closing(iter(trainer)) as events:
                for event in events:
                    made += event.step > 0
                    seconds += event.seconds
                    skipped += bool(event.skipped)
                    if event.evaluation:
                        self.first = self.first if event.step else event.evaluation
                        self.last, self.shown = event.evaluation, f"step {event.step}"
                    picture = None
                    if event.evaluation or seconds - drawn > REDRAW:
                        picture, drawn = self._picture(trainer), seconds
                    progress.follow(event, picture)
        except InterruptProcessingException:
            progress.say("cancelled; what was learned is saved, and running the same settings again goes on from there")
            raise
        return made, seconds, skipped

    def _complete(self, trainer: Trainer | Workers, loras: Sequence[LoraFile], label: str) -> None:
        """Paint the samples without and with what was learned, where the run did not."""
        self.first = self.first or trainer.evaluate()
        if self.last is None or self.last is self.first:
            with applied(self.loaded.model, [LoraUse(lora, 1.0) for lora in loras]):
                self.last, self.shown = trainer.evaluate(), label

    def _picture(self, trainer: Trainer | Workers) -> np.ndarray:
        """The reward curve over the samples before and now, ``[H, W, 3]`` uint8."""
        curve, rows = trainer.files.curve(), {}
        if self.first:
            rows["before"] = self.first.frames[:SHOWN]
        if self.last and self.last is not self.first:
            rows[self.shown] = self.last.frames[:SHOWN]
        if not rows:
            return curve
        labels = [f"{sample.prompt} {scores}" for sample, scores in zip(self.samples, self._scores(), strict=False)]
        sheet = contact_sheet(list(rows.values()), list(rows), labels[:SHOWN])
        height = round(sheet.shape[0] * curve.shape[1] / sheet.shape[1])
        sheet = np.asarray(Image.fromarray(sheet).resize((curve.shape[1], height), Image.Resampling.LANCZOS))
        return np.concatenate([curve, sheet])

    def _scores(self) -> list[str]:
        """Of every sample, before and now."""
        found = [self.first.rewards] if self.first else []
        found += [self.last.rewards] if self.last and self.last is not self.first else []
        return [f"({' -> '.join(f'{r:.3f}' for r in rewards)})" for rewards in zip(*found, strict=True)]

    def _records(self) -> list[dict]:
        lines = (self.folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def _stop(self) -> str:
        """Why the guards ended the run; empty if they did not."""
        return self._records()[-1].get("stop", "") if self.config.patience else ""

    def _summary(self, made: int, seconds: float, skipped: int) -> str:
        text = f"{self.config.steps} steps on {len(self.prompts)} prompts, {made} of them now in {seconds:.0f} s"
        records = self._records()
        rewards = [record["evaluation"] for record in records if record.get("evaluation") is not None]
        if len(rewards) > 1:
            name = self.reward.reward.name
            text += f"; {name} on {len(self.samples)} fixed prompts {rewards[0]:.4f} -> {rewards[-1]:.4f}"
        if self._stop():
            text += f"; {self._stop()}"
        if skipped:
            text += f"; {skipped} steps skipped, see log.jsonl"
        return f"{text}; files in output/{folders.listed(self.folder / 'log.jsonl')[0]['subfolder']}"
