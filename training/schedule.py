"""Which solver steps are trained, and how strongly they are coupled."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Strategy = Literal["last", "tail", "uniform", "random", "list"]
JudgeAt = Literal["final", "x0"]
Branch = Literal["both", "prompt"]


@dataclass(frozen=True)
class Plan:
    """One draw of a schedule.

    Attributes:
        sigmas: Noise levels to walk, ending in 0.
        trained: Indices of the steps that get a gradient, ascending; index 0 is the noisiest step.
    """

    sigmas: Tensor
    trained: tuple[int, ...]


@dataclass(frozen=True)
class BackpropSchedule:
    """Every published truncation of reward backpropagation as a setting.

    DRaFT-K, AlignProp and VideoX-Fun are ``tail`` or ``last`` with coupling 1; DRTune is ``uniform`` with
    coupling 0; LeapAlign lies between; ReFL is ``random`` with one step and ``judge = x0``.

    Attributes:
        strategy: ``last`` trains the last solver step, ``tail`` the last ``num_steps``, ``uniform`` a random
            comb of ``num_steps`` spread over all, ``random`` any ``num_steps`` between ``start`` and ``end``,
            ``list`` exactly ``step_list``.
        num_steps: How many steps ``tail``, ``uniform`` and ``random`` train.
        coupling: How much of the gradient passes from a trained step to earlier ones through the denoiser's
            input, 0..1. What passes through the solver itself is never cut.
        step_list: Step indices for ``list``; 0 is the noisiest.
        start: First step that ``random`` may draw.
        end: Last step that ``random`` may draw, inclusive; -1 is the last of all.
        judge: ``final`` walks all steps; ``x0`` stops at the last trained step and judges its one-step
            prediction of the clean video.
        branch: Guidance branches that get a gradient: ``both``, which is exact and what everybody publishes, or
            ``prompt`` alone, for half the time of a trained step.

    Raises:
        ValueError: A value outside the ranges above.
    """

    strategy: Strategy = "tail"
    num_steps: int = 5
    coupling: float = 1.0
    step_list: tuple[int, ...] = ()
    start: int = 0
    end: int = -1
    judge: JudgeAt = "final"
    branch: Branch = "both"

    def __post_init__(self) -> None:
        for name, kind in (("strategy", Strategy), ("judge", JudgeAt), ("branch", Branch)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}, got {getattr(self, name)!r}")
        if self.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {self.num_steps}")
        if not 0 <= self.coupling <= 1:
            raise ValueError(f"coupling must lie in 0..1, got {self.coupling}")
        if (self.strategy == "list") != bool(self.step_list):
            raise ValueError(f"step_list goes with strategy 'list' and only with it, got {self.step_list}")

    def check(self, steps: int, among: Sequence[int] | None = None) -> None:
        """Raise ``ValueError`` if the schedule asks for steps that are not there.

        Args:
            steps: Of the solver.
            among: Those that can be trained, ascending, where a LoRA is in some networks only; None is all.
        """
        last, among = steps - 1, range(steps) if among is None else among
        which = "solver steps" if len(among) == steps else f"of {steps} solver steps that its experts work at"
        outside = [i for i in self.step_list if i not in among]
        if outside:
            raise ValueError(f"step_list must be among {_runs(among)}, the {len(among)} {which}, got {outside}")
        if self.strategy == "last" and not among:
            raise ValueError(f"there is no step to train among the {len(among)} {which}")
        if self.strategy in ("tail", "uniform") and self.num_steps > len(among):
            raise ValueError(f"num_steps must be at most the {len(among)} {which}, got {self.num_steps}")
        if self.strategy == "random":
            end = last if self.end == -1 else self.end
            if not 0 <= self.start <= end <= last:
                raise ValueError(f"start and end must satisfy 0 <= start <= end <= {last}, got {self.start}, {end}")
            if self.num_steps > sum(self.start <= i <= end for i in among):
                raise ValueError(f"cannot draw {self.num_steps} steps from {self.start}..{end} of the {which}")

    def draw(self, sigmas: Tensor, seed: int, among: Sequence[int] | None = None) -> Plan:
        """Choose the trained steps of one rollout.

        Args:
            sigmas: ``[N + 1]`` noise levels of the full walk.
            seed: The only source of chance.
            among: The steps that can be trained, ascending; None is all. ``last``, ``tail`` and ``uniform`` then
                mean the last of these, and a comb over these.
        """
        steps = len(sigmas) - 1
        self.check(steps, among)
        among = range(steps) if among is None else among
        rng = random.Random(seed)
        if self.strategy == "last":
            trained = [among[-1]]
        elif self.strategy == "tail":
            trained = list(among[-self.num_steps :])
        elif self.strategy == "uniform":
            gap = len(among) // self.num_steps
            offset = rng.randrange(len(among) - gap * (self.num_steps - 1))
            trained = [among[offset + i * gap] for i in range(self.num_steps)]
        elif self.strategy == "random":
            end = steps - 1 if self.end == -1 else self.end
            trained = rng.sample([i for i in among if self.start <= i <= end], self.num_steps)
        else:
            trained = sorted(set(self.step_list))
        trained = sorted(trained)
        if self.judge == "x0":
            sigmas = torch.cat([sigmas[: trained[-1] + 1], sigmas.new_zeros(1)])
        return Plan(sigmas, tuple(trained))


def _runs(steps: Sequence[int]) -> str:
    """``0..3`` for consecutive steps, else each by itself."""
    if len(steps) > 1 and steps[-1] - steps[0] == len(steps) - 1:
        return f"{steps[0]}..{steps[-1]}"
    return ", ".join(map(str, steps)) or "none"
