"""Training from the command line."""

from __future__ import annotations

import os
import signal
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import UseAppendAction

from ..lora.adapter import LoraUse
from ..training.checkpoint import list_checkpoints
from ..training.config import TrainConfig
from ..training.distributed import joined, own_device
from ..training.examples import read_examples
from ..training.gradient import silent
from ..training.job import Job, ModelSource, RewardSource
from ..training.memory import free_memory
from ..training.trainer import Trainer
from ..training.workers import Workers
from ..video_models import BUILTIN
from .shared import DType, builtin_or_given, parse_lora, pick_device, plain_name, read_recipe
from .worker import announcement, trainer_of


@dataclass
class Train:
    """Train a reward LoRA by reward backpropagation.

    Run it again with the same settings to go on from the last checkpoint. Ctrl-C stops, and loses nothing.

    Attributes:
        name: Of the run and of the LoRA it writes.
        output_dir: The run's folder is made in here.
        model: A folder with a video model, the name of one in `models/video_models`, or `builtin`, the tiny one that
            ships with the pack.
        download: Fetch what is published and not there: the model into `models/video_models`, files of rewards into
            `models/reward_models`.
        reward: What the LoRA should make better: a name, or your own as `file.py:NAME`.
        reward_path: Folder of the reward model's files, if it is not `models/reward_models`.
        heldout: A reward that is not trained on and tells the guards what the trained one is worth, spelled like it
            (and with its own `path=`); may be repeated.
        prompts: Text file, one prompt a line; .jsonl with `prompt` and perhaps `start_image`, `end_image` and
            `reference`; a folder with clips or pictures and a metadata.csv of `video,prompt` or `image,prompt`; or a
            folder of pictures or clips with prompts in .txt files of their names. A clip's first frame starts the
            video, and the reward may compare the video with the clip.
        sample_prompts: The same for the evaluations on fixed seeds; the first training prompts if not given.
        recipe: A recipe's name or YAML file: settings that other flags then change. The built-in model has one.
        lora: LoRA to keep applied while training, PATH or PATH:STRENGTH; may be repeated.
        start: LoRA whose weights a new run begins with, and learns on: PATH, or PATH@EXPERT of a model with several
            networks; may be repeated. A run that goes on from a checkpoint goes on from there.
        device: `auto`, `cpu`, `cuda`, `cuda:1`.
        devices: How many GPUs, from the first, train together, each on videos of its own; on a CPU, processes.
        dtype: Number type of the frozen model.
        estimate: Say what memory the run would need, by phase and plan, and do not train.
        fresh: Begin anew although the folder holds a run; its checkpoints are deleted.
        config: The settings of the run.
    """

    name: str = "reward-lora"
    output_dir: Path = Path("outputs")
    model: str = BUILTIN
    download: bool = False
    reward: str = "tiny_clip"
    reward_path: Path | None = None
    heldout: UseAppendAction[tuple[str, ...]] = ()
    prompts: Path | None = None
    sample_prompts: Path | None = None
    recipe: str = ""
    lora: UseAppendAction[tuple[str, ...]] = ()
    start: UseAppendAction[tuple[str, ...]] = ()
    device: str = "auto"
    devices: int = 1
    dtype: DType = "auto"
    estimate: bool = False
    fresh: bool = False
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)

    def run(self) -> int:
        from tqdm import tqdm

        job = self._job()
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # torchrun's and a scheduler's way to stop
        if self.devices > 1 and not self.estimate:
            workers = Workers(job, self.devices, say=tqdm.write)
            if self.fresh:
                delete_checkpoints(job.folder)
            return self._train(workers, job)
        device = own_device(job.device)
        with joined(device) as group:
            if self.fresh and group.leads:
                delete_checkpoints(job.folder)
            say = print if group.leads else silent
            with trainer_of(job, group, device, say=say) as trainer:
                if self.estimate:
                    say(trainer.estimate(free_memory(device)))
                    return 0
                for line in announcement(trainer):
                    say(line)
                return self._train(trainer, job, group.leads)

    def _job(self) -> Job:
        device = pick_device(self.device)
        if self.devices > 1 and "WORLD_SIZE" in os.environ:
            raise ValueError("torchrun has started several processes already; leave devices out")
        if self.devices > 1 and device not in ("cpu", "cuda"):
            raise ValueError(f"devices takes the first GPUs, not {device}; choose them by CUDA_VISIBLE_DEVICES")
        return Job(
            model=ModelSource(self.model, self.dtype, download=self.download),
            reward=RewardSource(self.reward, str(self.reward_path or "")),
            examples=builtin_or_given(self.prompts, self.model),
            config=self.config,
            folder=self.output_dir / plain_name(self.name),
            samples=read_examples(self.sample_prompts) if self.sample_prompts else (),
            heldout=[RewardSource(text) for text in self.heldout],
            uses=[parse_lora(text) for text in self.lora],
            start=[parse_start(text) for text in self.start],
            device=device,
            cache=self.output_dir / "text-cache",
        )

    def _train(self, run: Trainer | Workers, job: Job, leads: bool = True) -> int:
        from tqdm import tqdm

        say = print if leads else silent
        with tqdm(total=job.config.steps, unit="step", disable=not leads) as bar:
            try:
                self._follow(run, bar)
            except KeyboardInterrupt:
                bar.close()
                so_far = ", ".join(map(str, run.lora_paths.values())) or "none"
                say(f"\nstopped; run the same command to go on. LoRA so far: {so_far}")
                return 130
        paths = ", ".join(map(str, run.lora_paths.values()))
        say(f"LoRA: {paths}\nreport: {run.folder / 'report.html'}\nvideos: {run.folder / 'samples'}")
        return 0

    def _follow(self, run: Trainer | Workers, bar: Any) -> None:
        with closing(iter(run)) as events:
            for event in events:
                bar.n = event.step
                bar.set_postfix_str(describe(event))
                if event.evaluation:
                    bar.write(f"step {event.step}: reward {event.evaluation.reward:.4f} on fixed prompts and seeds")
                if event.stop:
                    bar.write(event.stop)
                if event.skipped:
                    bar.write(f"step {event.step} skipped: {event.skipped}")


def parse_start(text: str) -> LoraUse:
    """``PATH`` or ``PATH@EXPERT``. Raises ``ValueError`` for a strength or a part of the walk: nobody trains those."""
    use = parse_lora(text)
    if use != LoraUse(use.lora, 1.0, use.expert):
        raise ValueError(f"--start takes PATH or PATH@EXPERT, for a run begins with a LoRA as it is; got {text}")
    return use


def describe(event: Any) -> str:
    return (
        f"reward {event.reward:.4f}, gradient {event.grad_norm:.2e}, "
        f"{event.seconds:.1f} s, {event.memory / 2**30:.2f} GiB"
    )


@dataclass
class Demo:
    """Train a reward LoRA on the built-in model and show what it changed on unseen prompts.

    Attributes:
        output_dir: The folder `quickstart` is made in here.
        unseen: How many prompts that are never trained on to judge before and after.
        steps: Optimiser steps; 0 takes the recipe's.
        seed: Source of all chance.
        device: `auto`, `cpu`, `cuda`, `cuda:1`.
        resume: Go on from the checkpoint of an earlier demonstration instead of beginning anew.
    """

    output_dir: Path = Path("outputs")
    unseen: int = 128
    steps: int = 0
    seed: int = 42
    device: str = "auto"
    resume: bool = False

    def run(self) -> int:
        from ..demo import run

        data = read_recipe("builtin")["config"] | {"seed": self.seed}
        if self.steps:
            data["steps"] = self.steps
        folder = self.output_dir / "quickstart"
        if not self.resume:
            delete_checkpoints(folder)
        return run(TrainConfig.from_dict(data), folder, pick_device(self.device), self.unseen)


def delete_checkpoints(folder: Path) -> None:
    for path in list_checkpoints(folder):
        path.unlink()
