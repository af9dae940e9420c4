"""Runs on the built-in model that are killed, cancelled, or go on for long."""

from __future__ import annotations

import gc
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import psutil
import torch
from reward_lora.reward_models import load_reward
from reward_lora.training.config import TrainConfig
from reward_lora.training.schedule import BackpropSchedule
from reward_lora.training.trainer import Trainer
from reward_lora.video_models import load_video_model

PROMPTS = ["a red circle moves right on a blue background", "a green square moves up on a white background"]
PRELOAD = ["diffusers.models.autoencoders.autoencoder_kl_wan", "diffusers.models.transformers.transformer_wan", "peft",
           "reward_lora.training.trainer"]  # fmt: skip


def config(steps: int, **settings: object) -> TrainConfig:
    """A short step: one frame, two solver steps, one of them trained."""
    short = {"rank": 2, "frames": 1, "sampler_steps": 2, "backprop": BackpropSchedule("last"), "sample_every": 0,
             "save_every": 1, "learning_rate": 1e-3}  # fmt: skip
    return TrainConfig(steps=steps, **short | settings)


def trainer(folder: Path, steps: int, tick: Callable[[str], None] = lambda phase: None, model=None, **settings: object):
    model = model or load_video_model("builtin")
    return Trainer(model, load_reward("tiny_clip"), PROMPTS, config(steps, **settings), folder, tick=tick)


def _train(folder: Path, steps: int) -> None:
    """What a killed process was doing; a step it ended is in ``steps.txt``."""
    torch.set_num_threads(1)
    for event in trainer(folder, steps):
        with (folder / "steps.txt").open("a") as file:
            file.write(f"{event.step}\n")


def kill_and_resume(kills: int, steps: int = 6, chance: int = 0) -> dict[str, float]:
    """Kill -9 at random moments, start again, until so many kills are done and the last run is at its end.

    Returns:
        Kills, runs that were finished between them, and how many ended in another LoRA than one left alone.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    draw = random.Random(chance)

    def life(folder: Path, seconds: float | None) -> bool:
        """Whether it was left to end; otherwise killed so long after it came to its first step."""
        process = context.Process(target=_train, args=(folder, steps))
        process.start()
        mark = folder / "steps.txt"
        begun = mark.stat().st_size if mark.is_file() else 0
        while seconds is not None and process.is_alive():
            if mark.is_file() and mark.stat().st_size > begun:
                process.join(seconds)
                break
            process.join(0.01)
            if draw.random() < 0.002:  # now and then before the first step, too
                break
        if seconds is not None and process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        if process.exitcode not in (0, -signal.SIGKILL):
            raise AssertionError(f"a resumed run ended with {process.exitcode}")
        return process.exitcode == 0

    with tempfile.TemporaryDirectory() as place:
        started = time.monotonic()
        life(Path(place) / "alone" / "run", None)
        pace = (time.monotonic() - started) / (steps + 1)
        alone = _lora(Path(place) / "alone" / "run")
        done = runs = different = 0
        while done < kills or not runs:
            folder = Path(place) / f"{runs}" / "run"
            while not life(folder, draw.uniform(0, 2 * pace) if done < kills else None):
                done += 1
            runs += 1
            different += _lora(folder) != alone
    return {"kills": done, "runs": runs, "different": different}


def _lora(folder: Path) -> bytes:
    return (folder / "run.safetensors").read_bytes()


class Cancelled(Exception):
    """As the user's cancel arrives: from the tick."""


def cancel(times: int, steps: int = 6, chance: int = 0) -> dict[str, float]:
    """Cancel at a random call of a large model, in this process, again and again, on one model that stays loaded.

    Returns:
        Cancels; how many left other weights or modules in the model; tensors' bytes and resident MiB that stayed;
        and whether the run that was cancelled so often ends in another LoRA than one left alone.
    """
    model, draw = load_video_model("builtin"), random.Random(chance)
    changed = done = runs = different = 0
    with tempfile.TemporaryDirectory() as place:
        calls = 0

        def count(phase: str) -> None:
            nonlocal calls
            calls += 1

        for _ in trainer(Path(place) / "alone" / "run", steps, count, model):
            pass
        alone, a_step = _lora(Path(place) / "alone" / "run"), calls / steps
        before, held, resident = _state(model), _tensors(), psutil.Process().memory_info().rss
        while done < times or not runs:
            left = draw.randint(1, round(2.5 * a_step)) if done < times else -1

            def tick(phase: str) -> None:
                nonlocal left
                left -= 1
                if left == 0:
                    raise Cancelled

            folder = Path(place) / f"{runs}" / "run"
            try:
                for _ in trainer(folder, steps, tick, model):
                    pass
            except Cancelled:
                done += 1
            else:
                runs += 1
                different += _lora(folder) != alone
            changed += _state(model) != before
        stayed = _tensors() - held
        grown = psutil.Process().memory_info().rss - resident
    return {"cancels": done, "runs": runs, "different": different, "changed": changed, "tensor bytes": stayed,
            "resident MiB": round(grown / 2**20, 1)}  # fmt: skip


def _state(model) -> list[tuple]:
    """Every module's class, and every parameter's place and content, of the denoiser."""
    network = model.transformer
    modules = [(name, type(module).__name__) for name, module in network.named_modules()]
    content = [(name, p.data_ptr(), p.requires_grad, float(p.double().sum()), float(p.double().square().sum()))
               for name, p in network.named_parameters()]  # fmt: skip
    return [*modules, *content]


def _tensors() -> int:
    """Bytes of all tensors that Python holds."""
    gc.collect()
    return sum(v.untyped_storage().nbytes() for v in gc.get_objects() if type(v) is torch.Tensor)


def soak(steps: int, evaluate_every: int = 100) -> dict[str, float]:
    """Many steps in a row, evaluations, samples and report included.

    Returns:
        Steps, resident MiB after a tenth of them and at the end, the slope between in KiB a step (least squares),
        seconds, and the bytes of tensors that came and stayed.
    """
    resident, held = [], [0, 0]
    process, started = psutil.Process(), time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        run = trainer(
            Path(place) / "run", steps, sample_every=evaluate_every, sample_count=2, save_every=50, guards="off"
        )
        for event in run:
            resident.append(process.memory_info().rss)
            if event.step == steps // 10:
                held[0] = _tensors()
            if event.step == steps - 1:
                held[1] = _tensors()
    seconds = time.monotonic() - started
    settled = np.array(resident[steps // 10 :], dtype=float)
    slope = np.polyfit(np.arange(len(settled)), settled, 1)[0]
    first, last = (round(float(value) / 2**20, 1) for value in (settled[0], settled[-1]))
    return {
        "steps": steps,
        "MiB at a tenth": first,
        "MiB at the end": last,
        "KiB a step": round(float(slope) / 1024, 2),
        "tensor bytes": held[1] - held[0],
        "seconds": round(seconds),
    }
