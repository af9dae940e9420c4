"""What guards cost: the presets step by step in turn, and what is measured of every evaluation."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..assets import PROMPTS_TEST, PROMPTS_TRAIN
from ..cli.shared import read_recipe
from ..reward_models import load_reward
from ..training.config import TrainConfig
from ..training.guards import sharpness, speed
from ..training.prompts import read_prompts
from ..training.trainer import Trainer
from ..video_models import load_video_model

REPEATS = 5


def trainer(
    folder: Path, model: Any, reward: str = "tiny_clip", heldout: Sequence[str] = (), **settings: Any
) -> Trainer:
    """The built-in recipe with other settings."""
    config = TrainConfig.from_dict(read_recipe("builtin")["config"] | settings)
    prompts, unseen = read_prompts(PROMPTS_TRAIN), read_prompts(PROMPTS_TEST)
    judges = [load_reward(name) for name in heldout]
    return Trainer(model, load_reward(reward), prompts, config, folder, sample_prompts=unseen, heldout=judges)


class Clock:
    """Processor seconds inside of methods, by what they are for."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}

    def watch(self, owner: Any, method: str, name: str) -> None:
        """Count what a method of an object takes from now on."""
        call = getattr(owner, method)

        def timed(*arguments: Any, **named: Any) -> Any:
            began = time.process_time()
            try:
                return call(*arguments, **named)
            finally:
                self.spent[name] = self.spent.get(name, 0.0) + time.process_time() - began

        setattr(owner, method, timed)


def cost(folder: Path, steps: int, every: int) -> dict[str, Any]:
    """Processor seconds a step of the built-in recipe, evaluations included; the presets take turns step by step.

    ``nothing`` is ``off`` without evaluations, so what guards look at counts as their cost in full; ``off`` looks at
    the same but for a held-out judge, and only reports. The sweep at the end of a run is timed for itself.
    """
    variants: dict[str, dict[str, Any]] = {
        "nothing": {"guards": "off", "sample_every": 0},
        "off": {"guards": "off"},
        "standard": {"guards": "standard", "heldout": ["dynamic_degree"]},
        "careful": {"guards": "careful", "heldout": ["dynamic_degree"]},
    }
    clocks, streams = {name: Clock() for name in variants}, {}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for name, settings in variants.items():  # every run has its own model: LoRAs of several runs would meet in one
        settings = {"sample_every": every, **settings}
        run = trainer(folder / name, load_video_model("builtin"), steps=steps, save_every=steps, **settings)
        clocks[name].watch(run, "evaluate", "evaluations")
        clocks[name].watch(run.files, "write_samples", "sample videos")
        clocks[name].watch(run.files, "draw", "report and curve")
        streams[name] = iter(run)
        next(streams[name])  # loading, and the base model's evaluation
        clocks[name].spent.clear()
    for _ in range(steps):
        for name, stream in streams.items():
            began = time.process_time()
            next(stream)
            times[name].append(time.process_time() - began)
    spent = {name: dict(clock.spent) for name, clock in clocks.items()}
    result: dict[str, Any] = {}
    plain = float(np.mean(times["nothing"]))
    for name, values in times.items():
        began = time.process_time()
        list(streams[name])
        result[name] = {
            "median": float(np.median(values)),
            "quartiles": [float(np.quantile(values, q)) for q in (0.25, 0.75)],
            "mean": float(np.mean(values)),
            "times_nothing": float(np.mean(values)) / plain,
            "of_which_a_step": {part: seconds / steps for part, seconds in spent[name].items()},
            "end_of_run": time.process_time() - began,
        }
    return result | {"steps": steps, "sample_every": every, "measures": measures()}


def measures() -> dict[str, dict[str, float]]:
    """Processor seconds of motion and of sharpness, of an evaluation of the built-in model and of one large clip."""
    found = {}
    for shape in ((16, 3, 9, 32, 32), (1, 3, 81, 480, 832)):
        clips = torch.rand(shape)
        found["x".join(map(str, shape))] = of_one = {}
        for name, measure in (("motion", speed), ("sharpness", sharpness)):
            measure(clips)
            began = time.process_time()
            for _ in range(REPEATS):
                measure(clips)
            of_one[name] = (time.process_time() - began) / REPEATS
    return found
