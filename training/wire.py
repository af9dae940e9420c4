"""Between a run's parent and its workers: lines of JSON one way, and one pipe the other, whose end means: stop."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..files import read_safetensors, write_safetensors
from .events import Evaluation, StepEvent

GRACE = 120.0
"""Seconds in which a worker that was told to stop must have saved and ended."""


class Wire(logging.Handler):
    """A worker's end: tells the parent what happens, and knows when to stop.

    What libraries print goes to standard error from here on. A worker whose parent has gone stops too, so none is left
    behind.

    Attributes:
        leads: Whether the parent hears of the phases; one worker is enough.
        at_work: Set it once there is something to save; before, stopping is ending at once.
    """

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.leads = self.at_work = False
        self._stopping, self._one_at_a_time = threading.Event(), threading.Lock()
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while os.read(0, 1):  # nothing is ever sent: it returns when the pipe is closed, or its owner gone
            pass
        self._stopping.set()
        if self.at_work:
            time.sleep(GRACE)
        os._exit(1)

    def __call__(self, phase: str) -> None:
        """The engine's tick. Raises ``KeyboardInterrupt`` when the parent wants an end."""
        if self._stopping.is_set():
            raise KeyboardInterrupt
        if self.leads:
            self.send("tick", phase=phase)

    def send(self, kind: str, **data: Any) -> None:
        """One message; without a parent it goes nowhere."""
        with suppress(OSError), self._one_at_a_time:
            self._out.write(json.dumps({"kind": kind, **data}) + "\n")
            self._out.flush()

    def emit(self, record: logging.LogRecord) -> None:
        """Pass on what a logger says."""
        self.send("log", level=record.levelno, text=record.getMessage())


def pack(event: StepEvent, folder: Path) -> dict[str, Any]:
    """An event as plain data; the frames of an evaluation go into a file in ``folder``."""
    data = {f.name: getattr(event, f.name) for f in fields(event)}
    if event.evaluation:
        file = folder / f"evaluation-{event.step:06d}.safetensors"
        write_safetensors(file, {"frames": event.evaluation.frames}, {})
        data["evaluation"] = {f.name: getattr(event.evaluation, f.name) for f in fields(Evaluation)} | {
            "frames": str(file)
        }
    return data


def unpack(data: Mapping[str, Any]) -> StepEvent:
    """Inverse of :func:`pack`, once: the file with the frames is gone afterwards."""
    event = StepEvent(**data)
    if not data["evaluation"]:
        return event
    about = dict(data["evaluation"])
    file = Path(about.pop("frames"))
    frames = read_safetensors(file)[0]["frames"].clone()  # they are mapped, and the file goes
    file.unlink()
    for name in ("rewards", "prompts"):
        about[name] = tuple(about[name])
    about["heldout"] = {name: tuple(scores) for name, scores in about["heldout"].items()}
    return replace(event, evaluation=Evaluation(frames=frames, **about))
