"""What a training shows while it runs: the solver step it is at, the reward so far, and how long it will take."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from ..training.config import TrainConfig
from ..training.events import Evaluation, StepEvent
from ..training.run_sweep import STRENGTHS
from ..training.trainer import Trainer
from .bridge import Progress

PHASES = {"text": "encoding prompts", "decode": "decoding", "reward": "judging"}
"""How the engine's phases are called here, where that is not their own name."""
REMEMBERED = 20
"""Steps whose mean time tells how long the rest will take."""


class LiveTraining(Progress):
    """The tick of a training run: its bar moves with the calls of the models.

    Args:
        config: Settings with every default filled in.
        node_id: Of the node that shows it.
    """

    def __init__(self, config: TrainConfig, node_id: str | None) -> None:
        self._config, self._calls = config, calls_a_batch(config)
        self._a_step = sum(self._calls.values()) * config.accumulation
        super().__init__(config.steps * self._a_step, node_id)
        self._step = self._made = self._count = 0
        self._event: StepEvent | None = None
        self._first: Evaluation | None = None
        self._last: Evaluation | None = None
        self._seconds: deque[float] = deque(maxlen=REMEMBERED)
        self._began, self._evaluating, self._evaluation_seconds = time.monotonic(), False, 0.0

    def __call__(self, phase: str) -> None:
        self._count = self._count + 1 if phase == self._phase else 1
        self._made += phase != "text" and not self._evaluating
        super().__call__(phase)

    def show(self, done: int, picture: np.ndarray | None = None, text: str = "") -> None:
        """As every progress; the bar never goes back."""
        super().show(min(max(self._done, done), self._total), picture, text)

    def follow(self, event: StepEvent, picture: np.ndarray | None) -> None:
        """Take the event of a step into account, and show it."""
        self._step, self._made, self._event, self._began = event.step, 0, event, time.monotonic()
        if event.step:
            self._seconds.append(event.seconds)
        if event.evaluation:
            self._first, self._last = self._first or event.evaluation, event.evaluation
        skipped = f", skipped: {event.skipped}" if event.skipped else ""
        self.show(event.step * self._a_step, picture, f"step {event.step} of {event.steps}{self._so_far()}{skipped}")

    def finish(self, picture: np.ndarray, text: str) -> None:
        """Show what stays on the node."""
        self.show(self._total, picture, text)

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """While fixed prompts are sampled and scored."""
        began, self._evaluating = time.monotonic(), True
        try:
            yield
        finally:
            self._evaluating, self._evaluation_seconds = False, time.monotonic() - began
            self._began += self._evaluation_seconds

    def _now(self) -> tuple[int, None, str]:
        c, phase = self._config, self._phase
        where = f"step {min(self._step + 1, c.steps)} of {c.steps}"
        if self._evaluating:
            where = f"evaluation after step {self._step}"
        of = {"rollout": c.sampler_steps, "replay": self._calls["replay"]}.get(phase)
        count = max(0, self._count - (2 if phase == "rollout" else 1))  # the first rollout call is no solver step yet
        at = f" {count % of + 1} of {of}" if of else ""
        done = self._step * self._a_step + min(self._made, self._a_step - 1)
        return done, None, f"{where}, {PHASES.get(phase, phase)}{at}{self._so_far()}"

    def _so_far(self) -> str:
        """Rewards and times as measured up to now."""
        text = ""
        if self._event and self._event.step:
            text += f", reward {self._event.reward:.4f}"
        if self._last:
            text += f", {self._last.reward:.4f} on fixed prompts"
            text += f" (at first {self._first.reward:.4f})" if self._last is not self._first else ""
        if self._seconds:
            text += f", {self._mean():.1f} s a step, about {duration(self.seconds_left())} left"
        return text

    def _mean(self) -> float:
        return sum(self._seconds) / len(self._seconds) if self._seconds else 0.0

    def seconds_left(self) -> float:
        """By the mean time of the last steps, and for each evaluation to come that of the last one."""
        coming = range(self._step + 1, self._config.steps + 1)
        evaluations = sum(self._config.evaluates_after(step) for step in coming)
        evaluations += len(STRENGTHS) if self._config.sweep and self._evaluation_seconds else 0
        spent = min(self._mean(), time.monotonic() - self._began)
        return max(0.0, len(coming) * self._mean() + evaluations * self._evaluation_seconds - spent)


class ShownTrainer(Trainer):
    """A trainer that says when it evaluates."""

    live: LiveTraining

    def evaluate(self) -> Evaluation:
        with self.live.evaluation():
            return super().evaluate()


def calls_a_batch(c: TrainConfig) -> dict[str, int]:
    """About how many calls of the models a training batch makes, by phase."""
    trained = {"last": 1, "list": len(set(c.backprop.step_list))}.get(c.backprop.strategy, c.backprop.num_steps)
    branches = 2 if c.guidance_scale != 1 and c.backprop.branch == "both" else 1
    rollouts = 2 if c.motion_guard else 1
    return {
        "rollout": 1 + rollouts * c.sampler_steps,
        "decode": 1,
        "reward": 1,
        "replay": trained * (branches + bool(c.anchor or c.anchor_target)),
    }


def duration(seconds: float) -> str:
    """``40 s``, ``12 min`` or ``3 h 20 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
