"""Training from the command line."""

from __future__ import annotations

import os
import signal
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from tyro.conf import UseAppendAction

from ..lora.adapter import applied
from ..training.checkpoint import list_checkpoints
from ..training.config import TrainConfig
from ..training.distributed import joined
from ..training.examples import read_examples
from ..training.trainer import Trainer
from ..video_models import BUILTIN
from .shared import DType, builtin_or_given, find_reward, open_model, parse_lora, pick_device, plain_name, read_recipe


@dataclass
class Train:
    """Train a reward LoRA by reward backpropagation.

    Run it again with the same settings to go on from the last checkpoint. Ctrl-C stops, and loses nothing.

    Attributes:
        name: Of the run and of the LoRA it writes.
        output_dir: The run's folder is made in here.
        model: A folder with a video model, the name of one in `models/video_models`, or `builtin`, the tiny one that
            ships with the pack.
        download: Fetch the model into `models/video_models` if it is a published one that is not there.
        reward: What the LoRA should make better: a name, or your own as `file.py:NAME`.
        reward_path: Folder of the reward model's files.
        heldout: A reward that is not trained on and tells the guards what the trained one is worth, spelled like it
            (and with its own `path=`); may be repeated.
        prompts: Text file, one prompt a line; .jsonl with `prompt` and perhaps `start_image`, `end_image` and
            `reference`; a folder with clips or pictures and a metadata.csv of `video,prompt` or `image,prompt`; or a
            folder of pictures or clips with prompts in .txt files of their names. A clip's first frame starts the
            video, and the reward may compare the video with the clip.
        sample_prompts: The same for the evaluations on fixed seeds; the first training prompts if not given.
        recipe: A recipe's name or YAML file: settings that other flags then change. The built-in model has one.
        lora: LoRA to keep applied while training, PATH or PATH:STRENGTH; may be repeated.
        device: `auto`, `cpu`, `cuda`, `cuda:1`.
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
    device: str = "auto"
    dtype: DType = "auto"
    estimate: bool = False
    fresh: bool = False
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)

    def run(self) -> int:
        from tqdm import tqdm

        prompts = builtin_or_given(self.prompts, self.model)
        sample_prompts = read_examples(self.sample_prompts) if self.sample_prompts else ()
        folder = self.output_dir / plain_name(self.name)
        uses = [parse_lora(text) for text in self.lora]
        device = pick_device(self.device)
        if device == "cuda" and "LOCAL_RANK" in os.environ:  # started by torchrun: one GPU a process
            device = f"cuda:{os.environ['LOCAL_RANK']}"
        reward = find_reward(self.reward, self.reward_path, "cpu")
        model = open_model(self.model, dtype=self.dtype, download=self.download)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # torchrun's and a scheduler's way to stop
        with joined(device) as group, applied(model, uses) as reports:
            if self.fresh and group.leads:
                delete_checkpoints(folder)
            say = print if group.leads else lambda _: None
            for line in reports:
                say(line)
            trainer = Trainer(model, reward, prompts, self.config, folder, sample_prompts=sample_prompts, group=group,
                              heldout=[find_reward(text, None, "cpu") for text in self.heldout],
                              device=device, cache=self.output_dir / "text-cache")  # fmt: skip
            if self.estimate:
                say(trainer.estimate(_free(device)))
                return 0
            say(f"{trainer.config.steps} steps of {model.spec.name} towards {reward.name}, files in {folder}")
            if group.size > 1:
                batch = group.size * trainer.config.accumulation * trainer.config.batch_size
                say(f"{group.size} processes, {batch} videos a step")
            with tqdm(total=trainer.config.steps, unit="step", disable=not group.leads) as bar:
                try:
                    self._follow(trainer, bar)
                except KeyboardInterrupt:
                    bar.close()
                    say(f"\nstopped; run the same command to go on. LoRA so far: {trainer.lora_path}")
                    return 130
        paths = ", ".join(map(str, trainer.lora_paths.values()))
        say(f"LoRA: {paths}\nreport: {folder / 'report.html'}\nvideos: {folder / 'samples'}")
        return 0

    def _follow(self, trainer: Trainer, bar: Any) -> None:
        with closing(iter(trainer)) as events:
            for event in events:
                bar.n = event.step
                bar.set_postfix_str(describe(event))
                if event.evaluation:
                    bar.write(f"step {event.step}: reward {event.evaluation.reward:.4f} on fixed prompts and seeds")
                if event.stop:
                    bar.write(event.stop)
                if event.skipped:
                    bar.write(f"step {event.step} skipped: {event.skipped}")


def _free(device: str) -> int:
    """Bytes that a run may use: free ones on the GPU, available ones of main memory."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available


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
