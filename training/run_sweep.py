"""The end of a run: the LoRA it gives at several strengths, on the prompts and seeds of its evaluations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..lora.adapter import Adapter
from ..lora.files import read_lora
from ..lora.match import fit
from ..video_models.protocol import VideoModel
from .adapters import at_strength
from .guards import Reading
from .run_folder import best_path

if TYPE_CHECKING:
    from .trainer import Trainer
    from .watch import Watch

STRENGTHS = (0.25, 0.5, 0.7)
"""Painted when a run ends; 0 and 1 its evaluations have painted already."""


@contextmanager
def weights_from(paths: Mapping[str, Path], adapters: Mapping[str, Adapter], model: VideoModel) -> Iterator[None]:
    """Within, the adapters hold the weights of LoRA files of the same run; after it what they held, bit for bit."""
    with ExitStack() as undo, torch.no_grad():
        for expert, adapter in adapters.items():
            own = adapter.weights()
            for name, read in fit(read_lora(paths[expert]), model, expert).modules.items():
                mine = own[name]
                for here, there in ((mine.down, read.down * (read.alpha / mine.alpha)), (mine.up, read.up)):
                    undo.callback(here.copy_, here.clone())
                    here.copy_(there)
        yield


def sweep_run(trainer: Trainer, watch: Watch) -> None:
    """Paint the evaluation prompts with what a run gives, its best LoRA or its newest, and note it in its log.

    Nothing is painted twice, and nothing if there is no evaluation of it on two prompts or more.
    """
    guards, adapters, files, c = watch.guards, watch.adapters, trainer.files, trainer.config
    best, now = guards.best, guards.now
    if now is None or guards.base is None or not now.step or len(now.reward) < 2:
        return
    kept = bool(best and best.step and trainer.kept_paths)
    chosen = best if kept else now
    if files.swept == chosen.step:
        return
    readings = {0.0: guards.base, 1.0: chosen}
    paths = {expert: best_path(path) for expert, path in trainer.lora_paths.items()}
    with weights_from(paths, adapters if kept else {}, trainer.model):
        for strength in STRENGTHS:
            with at_strength(adapters.values(), strength):
                found = trainer.evaluate()
            readings[strength] = Reading.of(chosen.step, found)
            files.write_sweep_samples(strength, found.frames, trainer.model.spec.fps)
    files.note_sweep(sweep_record(trainer.reward.name, readings, c.motion_floor))


def sweep_record(reward: str, readings: Mapping[float, Reading], motion_floor: float) -> dict[str, Any]:
    """For the log: plain numbers.

    Args:
        reward: Name of the trained reward.
        readings: By strength, 0 and 1 among them; that at 1 tells the LoRA's step.
        motion_floor: Share of the base model's motion that must be left.
    """
    points = [
        {"strength": strength, "rewards": list(r.reward), "heldout": {k: list(v) for k, v in r.heldout.items()},
         "motion": list(r.motion), "sharpness": list(r.sharpness)}
        for strength, r in sorted(readings.items())
    ]  # fmt: skip
    return {"step": readings[1.0].step, "reward": reward, "motion_floor": motion_floor, "points": points}
