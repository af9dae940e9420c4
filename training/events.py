"""What a training run tells whoever follows it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor


class TrainingStopped(RuntimeError):
    """The run ended itself; the message says why. What was learned so far is saved."""


@dataclass(frozen=True)
class Evaluation:
    """Fixed prompts and seeds, sampled with the model as it is.

    Attributes:
        reward: Mean over the prompts.
        rewards: One a prompt.
        prompts: The prompts.
        frames: ``[N, 3, T, H, W]`` in 0..1 on the CPU.
        heldout: What rewards say that are not trained on: name to one score a prompt.
        findings: What the guards say, for the log; empty outside of a run.
    """

    reward: float
    rewards: tuple[float, ...]
    prompts: tuple[str, ...]
    frames: Tensor = field(repr=False)
    heldout: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    findings: Mapping[str, Any] = field(default_factory=dict)

    def record(self) -> dict:
        """For the log: plain numbers."""
        scores = {"rewards": self.rewards, "heldout": dict(self.heldout)}
        return {"evaluation": _or_none(self.reward), "guards": {**scores, **self.findings}}


@dataclass(frozen=True)
class StepEvent:
    """What happened in one optimiser step.

    Attributes:
        step: Steps made so far; 0 is the state before training.
        steps: Steps of the whole run.
        reward: Mean reward of the training batch; NaN at step 0.
        loss: Mean loss of the batch.
        grad_norm: Norm of the LoRA's gradient before clipping.
        learning_rate: Of this step.
        seconds: Wall time of this step.
        memory: Peak bytes on the GPU, or resident bytes of the process on a CPU.
        skipped: Why the step changed nothing, or empty.
        drift: With an anchor, the mean squared distance to the base model's predictions at the trained steps.
        anchor: The anchor's weight at this step.
        terms: Of a mixture of rewards, what each said on average.
        motion: With a motion guard, the batch's motion relative to the base model's.
        conflicts: Of a mixture, before an evaluation: cosines between the terms' gradients at the judged frames.
        evaluation: On evaluation steps.
        stop: Why the guards end the run with this step; empty if they do not.
    """

    step: int
    steps: int
    reward: float
    loss: float
    grad_norm: float
    learning_rate: float
    seconds: float
    memory: int
    skipped: str = ""
    drift: float = 0.0
    anchor: float = 0.0
    terms: Mapping[str, float] = field(default_factory=dict)
    motion: float = math.nan
    conflicts: Mapping[str, float] = field(default_factory=dict)
    evaluation: Evaluation | None = None
    stop: str = ""

    def record(self) -> dict:
        """For the log: plain numbers, NaN as null."""
        mappings = ("terms", "conflicts")
        data = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("evaluation", *mappings)}
        for name in mappings:
            if getattr(self, name):
                data[name] = {key: _or_none(value) for key, value in getattr(self, name).items()}
        if self.evaluation:
            data |= self.evaluation.record()
        return {key: _or_none(value) for key, value in data.items()}


def _or_none(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value
