"""The folder of a run: its log, its curve, its samples, and where its LoRAs go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..files import write_text
from .events import StepEvent
from .media import reward_curve, write_png, write_video

SHOWN = 6
"""How many clips of an evaluation are written as videos and shown; all of them are scored."""


class RunFolder:
    """Files of one run: ``log.jsonl``, ``config.json``, ``reward.png``, ``samples/*.mp4`` and the LoRAs.

    Args:
        path: The folder; its name is the run's.
        reward: Name of the reward, for the curve.
    """

    def __init__(self, path: Path | str, reward: str) -> None:
        self.path = Path(path).resolve()
        self._reward = reward
        self._log: list[dict[str, Any]] = []

    def lora_path(self, expert: str, experts: tuple[str, ...]) -> Path:
        """Where the LoRA of an expert goes: by the run's name, and by the expert's if the model has several."""
        return self.path / (f"{self.path.name}_{expert}.safetensors" if len(experts) > 1 else
                            f"{self.path.name}.safetensors")  # fmt: skip

    def open(self, step: int, config: dict[str, Any]) -> None:
        """Keep what an earlier run logged up to the checkpoint at ``step``; steps after it will be made again."""
        self.path.mkdir(parents=True, exist_ok=True)
        for partial in self.path.rglob(".*.partial"):  # half-written when an earlier run was killed
            partial.unlink()
        log = self.path / "log.jsonl"
        lines = log.read_text(encoding="utf-8").splitlines() if log.exists() and step else []
        self._log = [record for record in map(_json_or_none, lines) if record and record["step"] <= step]
        write_text(log, "".join(json.dumps(record) + "\n" for record in self._log))
        write_text(self.path / "config.json", json.dumps(config, indent=2) + "\n")

    def add(self, event: StepEvent) -> StepEvent:
        """Log an event; one with an evaluation draws the curve anew. Gives the event back."""
        self._log.append(event.record())
        with (self.path / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(self._log[-1]) + "\n")
        if event.evaluation:
            self.draw_curve()
        return event

    def write_samples(self, step: int, frames: Tensor, fps: int) -> None:
        """The first :data:`SHOWN` clips of ``[N, 3, T, H, W]`` as videos."""
        for index, clip in enumerate(frames[:SHOWN]):
            write_video(self.path / "samples" / f"{index:02d}-step-{step:06d}.mp4", clip, fps)

    def curve(self) -> np.ndarray:
        """The reward curve so far as ``[H, W, 3]`` uint8."""
        batches = [(r["step"], r["reward"]) for r in self._log if r["reward"] is not None]
        evaluations = [(r["step"], r["evaluation"]) for r in self._log if r.get("evaluation") is not None]
        return reward_curve(batches, evaluations, self._reward)

    def draw_curve(self) -> None:
        write_png(self.path / "reward.png", self.curve())


def _json_or_none(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except ValueError:  # the last line of a run that was killed while writing
        return None
