"""A run's numbers and clips in TensorBoard and Weights & Biases, through their own libraries, when asked for.

The log of the run's folder is written whatever happens here.
"""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import math
import os
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ..files import write_text
from .config import TrackerName
from .events import Evaluation, StepEvent
from .media import to_uint8
from .run_folder import SHOWN, sample_path

log = logging.getLogger(__name__)

GROUPS = ("terms", "conflicts")
"""Entries of a step's record that hold several numbers by name."""


def check_installed(names: Sequence[TrackerName]) -> None:
    """Raise ``ValueError`` for a tracker whose library is missing."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"trackers: {name} needs the Python package {name}, which is not installed: "
                f"{sys.executable} -m pip install {name}"
            )


def step_scalars(event: StepEvent) -> dict[str, float]:
    """Every number of a step but its evaluation's, by ``train/<name>``, ``terms/<reward>`` and ``conflicts/<pair>``."""
    if not event.step:
        return {}
    record = replace(event, evaluation=None).record()
    nested = {f"{group}/{name}": value for group in GROUPS for name, value in record.pop(group, {}).items()}
    plain = {f"train/{name}": value for name, value in record.items() if name not in ("step", "steps")}
    return _numbers(plain | nested)


def evaluation_scalars(evaluation: Evaluation) -> dict[str, float]:
    """Every number of an evaluation: mean scores by ``evaluation/<reward>``, the guards' by ``guards/<name>``."""
    heldout = {f"evaluation/{name}": sum(scores) / len(scores) for name, scores in evaluation.heldout.items()}
    guards = {f"guards/{key}": value for key, value in evaluation.findings.items()}
    gains = {f"guards/gain of {name}": gain for name, gain in evaluation.findings.get("gains", {}).items()}
    return _numbers({"evaluation/reward": evaluation.reward} | heldout | guards | gains)


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {k: float(v) for k, v in values.items() if isinstance(v, (int, float)) and math.isfinite(v)}


class Tracker(Protocol):
    """Where numbers and clips go."""

    def scalars(self, values: Mapping[str, float], step: int) -> None: ...

    def clips(self, evaluation: Evaluation, step: int) -> None: ...

    def close(self, failed: bool) -> None: ...


class TensorBoard:
    """Event files in ``tensorboard`` of the run's folder: ``tensorboard --logdir <folder>`` shows them.

    Args:
        folder: Of the run.
        config: Its settings.
        step: Of the checkpoint it goes on from; what was logged after it is purged from the curves.
        fps: Of the clips.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], step: int, fps: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer, self._fps = SummaryWriter(folder / "tensorboard", purge_step=step + 1 if step else 0), fps
        self._writer.add_text("config", f"```json\n{json.dumps(config, indent=2)}\n```", step)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def clips(self, evaluation: Evaluation, step: int) -> None:
        """Animated GIFs: SummaryWriter's own ``add_video`` makes the same ones, but needs moviepy."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        for index, (clip, prompt) in enumerate(zip(evaluation.frames[:SHOWN], evaluation.prompts, strict=False)):
            *_, height, width = clip.shape
            image = Summary.Image(
                height=height, width=width, colorspace=3, encoded_image_string=animated_gif(clip, self._fps)
            )
            summary = Summary(value=[Summary.Value(tag=f"samples/{index:02d} {prompt[:60]}", image=image)])
            self._writer.file_writer.add_summary(summary, step)
        self._writer.flush()

    def close(self, failed: bool) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of the project ``reward-lora``, or of ``WANDB_PROJECT``; ``WANDB_MODE=offline`` keeps it on the disk.

    Its id lies in the run's folder, so that a resumed run goes on with the same curves.

    Args:
        folder: Of the run; its name is the run's.
        config: Its settings.
        step: Of the checkpoint it goes on from; 0 begins a new run.
        fps: Of the clips, which come as files and know it themselves.

    Raises:
        ValueError: It does not start, for example because nobody has logged in.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], step: int, fps: int) -> None:
        import wandb

        self._wandb, self._folder = wandb, folder
        note = folder / "wandb_run_id.txt"
        if not step or not note.is_file():
            write_text(note, secrets.token_hex(4))
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "reward-lora"), name=folder.name, dir=folder,
                id=note.read_text(encoding="utf-8"), resume="allow", config=dict(config),
                settings=wandb.Settings(silent=True),
            )  # fmt: skip
        except wandb.errors.Error as error:
            raise ValueError(
                f"trackers: wandb does not start ({str(error).splitlines()[0]}); "
                "log in with `wandb login`, or set WANDB_MODE=offline"
            ) from None
        self._run.define_metric("step")  # a resumed run makes steps again that wandb, by its own count, would refuse
        self._run.define_metric("*", step_metric="step")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def clips(self, evaluation: Evaluation, step: int) -> None:
        clips = {}
        for index, prompt in enumerate(evaluation.prompts[:SHOWN]):
            path = sample_path(self._folder, index, step)
            clips[f"samples/{index:02d}"] = self._wandb.Video(str(path), caption=prompt, format="mp4")
        self._run.log({**clips, "step": step})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


KINDS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


class Trackers:
    """Several trackers as one. One that fails is left out from then on: a run does not end for it."""

    def __init__(self) -> None:
        self._trackers: dict[str, Tracker] = {}

    def begin(self, name: TrackerName, tracker: Tracker) -> None:
        self._trackers[name] = tracker

    def step(self, event: StepEvent) -> None:
        """What one step says, its evaluation included."""
        self._tell("scalars", step_scalars(event), event.step)
        if event.evaluation:
            self.evaluation(event.evaluation, event.step)

    def evaluation(self, evaluation: Evaluation, step: int) -> None:
        """What an evaluation says after so many steps."""
        self._tell("scalars", evaluation_scalars(evaluation), step)
        self._tell("clips", evaluation, step)

    def close(self, failed: bool) -> None:
        self._tell("close", failed)

    def _tell(self, what: str, *arguments: Any) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                getattr(tracker, what)(*arguments)
            except Exception as error:
                log.warning("%s takes nothing more (%s: %s); going on without it", name, type(error).__name__, error)
                del self._trackers[name]


@contextmanager
def tracked(
    names: Sequence[TrackerName], folder: Path, config: Mapping[str, Any], step: int, fps: int
) -> Iterator[Trackers]:
    """Trackers for the length of a run, closed however it ends.

    Args:
        names: Those asked for.
        folder: Of the run.
        config: Its settings.
        step: Of the checkpoint it goes on from; 0 begins anew.
        fps: Of the clips.
    """
    trackers, failed = Trackers(), False
    try:
        for name in names:
            trackers.begin(name, KINDS[name](folder, config, step, fps))
        yield trackers
    except Exception:
        failed = True
        raise
    finally:
        trackers.close(failed)


def animated_gif(clip: Tensor, fps: int) -> bytes:
    """``[3, T, H, W]`` in 0..1 as a GIF that plays for ever."""
    from PIL import Image

    first, *others = (Image.fromarray(frame) for frame in to_uint8(clip))
    file = io.BytesIO()
    first.save(file, format="GIF", save_all=True, append_images=others, duration=round(1000 / fps), loop=0)
    return file.getvalue()
