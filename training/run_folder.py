"""The folder of a run: its log, its curve, its samples, and where its LoRAs go."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..files import write_text
from .checkpoint import list_checkpoints
from .events import Evaluation, StepEvent, TrainingStopped
from .media import Curve, reward_curve, write_png, write_preview, write_video
from .report import PREVIEWS, page, step_preview, sweep_preview
from .run_log import RunLog

SHOWN = 6
"""How many clips of an evaluation are written as videos and shown; all of them are scored."""


FULL = {errno.ENOSPC, errno.EFBIG, errno.EROFS, errno.EIO} | {getattr(errno, "EDQUOT", errno.ENOSPC)}
"""What a system says of a disk that takes nothing more."""


def best_path(path: Path) -> Path:
    """Where the best evaluation's LoRA goes, beside the newest one."""
    return path.with_stem(f"{path.stem}_best")


def sample_path(folder: Path, index: int, step: int) -> Path:
    """Where the video of an evaluation's clip goes."""
    return folder / "samples" / f"{index:02d}-step-{step:06d}.mp4"


class RunFolder:
    """Files of one run: ``log.jsonl``, ``config.json``, ``reward.png``, ``report.html``, ``samples`` and the LoRAs.

    Args:
        path: The folder; its name is the run's.
        reward: Name of the reward, for the curve.
    """

    def __init__(self, path: Path | str, reward: str) -> None:
        self.path = Path(path).resolve()
        self._reward = reward
        self._log: list[dict[str, Any]] = []
        self._config: dict[str, Any] = {}
        self._prompts: list[str] = []

    def lora_path(self, expert: str, experts: tuple[str, ...]) -> Path:
        """Where the LoRA of an expert goes: by the run's name, and by the expert's if the model has several."""
        return self.path / (f"{self.path.name}_{expert}.safetensors" if len(experts) > 1 else
                            f"{self.path.name}.safetensors")  # fmt: skip

    def claim(self) -> None:
        """Make the folder. Raises ``ValueError`` if nothing can be written in it."""
        probe = self.path / f".{os.getpid()}.partial"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"\0")
            probe.unlink()
        except OSError as error:
            raise ValueError(
                f"the run's folder {self.path} cannot be written to ({error.strerror}); "
                "choose another, make room or correct its permissions"
            ) from None

    @contextmanager
    def told_when_full(self) -> Iterator[None]:
        """Raise :class:`TrainingStopped` with what is safe when the disk takes nothing more."""
        from safetensors import SafetensorError

        try:
            yield
        except (OSError, SafetensorError) as error:
            found = re.search(r"\(os error (\d+)\)", str(error))
            number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
            if number not in FULL:
                raise
            checkpoints = list_checkpoints(self.path)
            safe = f"{checkpoints[-1].name} is whole" if checkpoints else "there is no checkpoint yet"
            raise TrainingStopped(
                f"{self.path} takes nothing more ({os.strerror(number)}); {safe}: "
                "make room, and start the same run again to go on"
            ) from error

    def open(self, step: int, config: dict[str, Any], prompts: Sequence[str]) -> None:
        """Keep what an earlier run logged up to the checkpoint at ``step``; steps after it will be made again.

        Args:
            step: Of the checkpoint; 0 begins anew.
            config: The settings.
            prompts: Of the evaluations.
        """
        self._config, self._prompts = config, list(prompts)
        for partial in self.path.rglob(".*.partial"):  # half-written when an earlier run was killed
            partial.unlink()
        if step:
            self.read()
        self._log = [record for record in self._log if record["step"] <= step]
        self._write_log()
        write_text(self.path / "config.json", json.dumps(config, indent=2) + "\n")

    def read(self) -> None:
        """Take the log as it is on the disk, where another process may be writing it."""
        log = self.path / "log.jsonl"
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
        self._log = [record for record in map(_json_or_none, lines) if record]

    def add(self, event: StepEvent) -> StepEvent:
        """Log an event; one with an evaluation draws the curve anew. Gives the event back."""
        self._log.append(event.record())
        with (self.path / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(self._log[-1]) + "\n")
        if event.evaluation:
            self.draw()
        return event

    def amend(self, evaluation: Evaluation) -> None:
        """Add to the last step the evaluation that it is still without."""
        if self._log:
            self._log[-1] |= evaluation.record()
            self._write_log()
        self.draw()

    @property
    def swept(self) -> int | None:
        """Step of the LoRA that was swept when the run had come as far as it has now; None if none was."""
        return self._log[-1]["sweep"]["step"] if self._log and "sweep" in self._log[-1] else None

    def note_sweep(self, record: dict[str, Any]) -> None:
        """Add to the last step what the run's LoRA gives at several strengths; see :mod:`.run_sweep`."""
        if self._log:
            self._log[-1]["sweep"] = record
            self._write_log()

    def _write_log(self) -> None:
        write_text(self.path / "log.jsonl", "".join(json.dumps(record) + "\n" for record in self._log))

    def write_samples(self, step: int, frames: Tensor, fps: int) -> None:
        """The first :data:`SHOWN` clips of ``[N, 3, T, H, W]`` as videos, and previews of some for the report."""
        for index, clip in enumerate(frames[:SHOWN]):
            write_video(sample_path(self.path, index, step), clip, fps)
        self.write_previews(step, frames, fps)

    def write_previews(self, step: int, frames: Tensor, fps: int, strength: float = 1.0) -> None:
        """Previews for the report of the first clips of ``[N, 3, T, H, W]``, with a step's LoRA at a strength."""
        for index, clip in enumerate(frames[:PREVIEWS]):
            write_preview(self.path / "samples" / step_preview(index, step, strength), clip, fps)

    def write_sweep_samples(self, strength: float, frames: Tensor, fps: int) -> None:
        """Previews of the first clips of ``[N, 3, T, H, W]`` at a strength, for the report."""
        for index, clip in enumerate(frames[:PREVIEWS]):
            write_preview(self.path / "samples" / sweep_preview(index, strength), clip, fps)

    def curve(self) -> np.ndarray:
        """The reward curve so far as ``[H, W, 3]`` uint8."""
        batches = [(r["step"], r["reward"]) for r in self._log if r["reward"] is not None]
        log = RunLog.of(self._log)
        heldout = [Curve(name, log.gains(name, deviations=True)) for name in log.heldout]
        guarded = [Curve(what, log.ratios(what)) for what in ("motion", "sharpness")] if log.evaluations else []
        return reward_curve(batches, log.rewards(), self._reward, heldout, guarded, log.best)

    def draw(self) -> None:
        """The curve and the report, as of now."""
        picture = write_png(self.path / "reward.png", self.curve())
        text = page(self.path.name, self._reward, self._log, self._config, self._prompts, picture)
        write_text(self.path / "report.html", text)


def _json_or_none(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # the last line of a run that was killed while writing
        return None
    return record if isinstance(record, dict) and record.keys() >= {"step", "reward"} else None
