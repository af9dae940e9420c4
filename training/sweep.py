"""Which strength to use a LoRA at: the same prompts and seeds at many strengths, judged, and how much still moves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from ..lora.adapter import LoraUse, applied, check_strength
from ..reward_models.protocol import Reward
from ..video_models.protocol import Tick, VideoModel
from .compare import CONFIDENCE, PairedDifference, paired_difference
from .gradient import silent
from .prompts import EmbeddingStore
from .sample import sample
from .seeds import seed_for

PLATEAU = 0.97
"""Share of the highest gain from which on a gentler strength is preferred."""


@dataclass(frozen=True)
class SweepConfig:
    """What a sweep paints. 0 takes the model's default for any size or number of steps.

    Attributes:
        strengths: In -2..2; 0, the base model, is always among them.
        prompts: At least one; best such that the LoRA was not trained on.
        seeds: Videos a prompt. The same noise at every strength.
        seed: Source of all chance.
        motion_floor: Share of the base model's motion that must be left, 0..1.
        batch_size: Videos painted together.
        width: Pixels.
        height: Pixels.
        frames: In a video.
        steps: Solver steps.
        guidance_scale: 1 turns guidance off.
        negative_prompt: What guidance leads away from.
        shown: How many videos the picture shows, the first ones.

    Raises:
        ValueError: A value outside these ranges.
    """

    strengths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
    prompts: tuple[str, ...] = ()
    seeds: int = 1
    seed: int = 42
    motion_floor: float = 0.75
    batch_size: int = 1
    width: int = 0
    height: int = 0
    frames: int = 0
    steps: int = 0
    guidance_scale: float = 0.0
    negative_prompt: str = ""
    shown: int = 4

    def __post_init__(self) -> None:
        object.__setattr__(self, "strengths", tuple(sorted({0.0, *map(check_strength, self.strengths)})))
        if len(self.strengths) < 2:
            raise ValueError("a sweep needs a strength besides 0; give some such as 0.25, 0.5, 0.75, 1")
        if not self.prompts or self.seeds < 1 or len(self.prompts) * self.seeds < 2:
            raise ValueError(
                f"a sweep needs at least two videos, better 16: give more prompts or seeds, got {len(self.prompts)} "
                f"prompts and {self.seeds} seeds"
            )
        if not 0 <= self.motion_floor <= 1:
            raise ValueError(f"motion_floor must lie in 0..1, got {self.motion_floor:g}")
        for name in ("batch_size", "shown"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def videos(self) -> list[tuple[str, int]]:
        """Prompt and noise seed of every video, in the order of the prompts."""
        indices = [(p, s) for p in range(len(self.prompts)) for s in range(self.seeds)]
        return [(self.prompts[p], seed_for("sweep", self.seed, p, s)) for p, s in indices]


@dataclass(frozen=True)
class SweepPoint:
    """What one strength gave.

    Attributes:
        strength: -2..2.
        scores: One a video, by reward; the judge is the first.
        motion: Mean squared difference of successive frames, one a video.
        shown: ``[N, 3, 3, H, W]``: first, middle and last frame of the first videos, on the CPU.
    """

    strength: float
    scores: dict[str, tuple[float, ...]]
    motion: tuple[float, ...]
    shown: Tensor = field(repr=False)


@dataclass(frozen=True)
class Sweep:
    """All strengths, and what follows from them.

    Attributes:
        config: What was painted.
        points: By ascending strength; 0 is among them.
        held_out: Rewards that decide: those besides the judge, or the judge itself if there are none.
    """

    config: SweepConfig
    points: tuple[SweepPoint, ...]
    held_out: tuple[str, ...]

    @property
    def base(self) -> SweepPoint:
        return next(point for point in self.points if point.strength == 0)

    def gain(self, point: SweepPoint, reward: str) -> PairedDifference:
        """How much better than the base model by one reward, on its own scale."""
        return self._paired(self.base.scores[reward], point.scores[reward])

    def held_out_gain(self, point: SweepPoint) -> PairedDifference:
        """How much better by the held-out rewards: in units of each one's spread on the base model if several."""
        if len(self.held_out) == 1:
            return self.gain(point, self.held_out[0])
        return self._paired(*(self._standardised(p) for p in (self.base, point)))

    def motion_ratio(self, point: SweepPoint) -> float:
        """Motion relative to the base model; 1 if nothing moves there."""
        before = sum(self.base.motion)
        return sum(point.motion) / before if before else 1.0

    def spread(self, reward: str) -> float:
        """Standard deviation of a reward over the base model's videos; 1 if they all score the same."""
        return float(torch.tensor(self.base.scores[reward], dtype=torch.float64).std()) or 1.0

    def _standardised(self, point: SweepPoint) -> list[float]:
        columns = [torch.tensor(point.scores[name], dtype=torch.float64) / self.spread(name) for name in self.held_out]
        return torch.stack(columns).mean(0).tolist()

    def _paired(self, before: Sequence[float], after: Sequence[float]) -> PairedDifference:
        """Videos of one prompt are no independent witnesses: their mean is one pair, unless there is one prompt."""
        if len(self.config.prompts) > 1:
            before, after = (
                torch.tensor(v, dtype=torch.float64).view(-1, self.config.seeds).mean(1).tolist()
                for v in (before, after)
            )
        return paired_difference(before, after)

    @cached_property
    def still_moving(self) -> list[SweepPoint]:
        """The strengths from 0 up to the first at which motion falls below the floor."""
        found = []
        for point in self.points:
            if point.strength >= 0:
                if self.motion_ratio(point) < self.config.motion_floor:
                    break
                found.append(point)
        return found

    @cached_property
    def best(self) -> SweepPoint:
        """The recommendation: the highest held-out gain before motion falls below the floor.

        Of strengths that reach nearly that gain (:data:`PLATEAU`) it is the gentlest: what a reward still gains
        there is mostly drift.
        """
        gains = [(self.held_out_gain(point).mean, point) for point in self.still_moving]
        highest = max(gain for gain, _ in gains)
        return next(point for gain, point in gains if gain >= PLATEAU * highest)

    def reason(self) -> str:
        """Why :attr:`best` is recommended, in words."""
        best, candidates = self.best, self.still_moving
        names = " and ".join(self.held_out)
        stopped = next((p for p in self.points if p.strength > candidates[-1].strength), None)
        limit = ""
        if stopped is not None:
            limit = (f"; at {stopped.strength:g} motion falls to {self.motion_ratio(stopped):.2f} of the base model's, "
                     f"below the floor of {self.config.motion_floor:g}")  # fmt: skip
        if best.strength == 0:
            return f"Use no LoRA: by {names} no strength is better than the base model{limit}."
        gain, top = self.held_out_gain(best), max(candidates, key=lambda point: self.held_out_gain(point).mean)
        most = "the highest gain"
        if top is not best:
            share = gain.mean / self.held_out_gain(top).mean
            most = f"the gentlest with nearly the highest gain ({share:.0%} of that at {top.strength:g})"
        unit = "" if len(self.held_out) == 1 else " standard deviations"
        text = (
            f"Use strength {best.strength:g}: {most} by {names}, {gain.mean:+.4f}{unit} ({CONFIDENCE:.0%} interval "
            f"{gain.low:+.4f} to {gain.high:+.4f}); motion is {self.motion_ratio(best):.2f} of the base model's{limit}"
        )
        if gain.low <= 0:
            text += "; but the interval holds 0, so a gain is not shown: take more prompts or seeds"
        if best is self.points[-1]:
            text += "; it is the highest strength tried, so try higher ones"
        return f"{text}. {len(self.config.prompts)} prompts, {self.config.seeds} seeds."


def run_sweep(
    model: VideoModel,
    use: LoraUse,
    config: SweepConfig,
    judge: Reward,
    others: Sequence[Reward] = (),
    *,
    kept: Sequence[LoraUse] = (),
    tick: Tick = silent,
) -> Iterator[SweepPoint]:
    """Paint and judge one strength after the other, 0 first; :func:`gathered` makes a :class:`Sweep` of the points.

    Args:
        model: A loaded video model.
        use: The LoRA, with its expert and window; its strength does not count.
        config: What to paint.
        judge: The reward the LoRA was trained towards.
        others: Rewards it was not trained towards.
        kept: LoRAs that stay applied at their own strength.
        tick: Called before every call of a large model; may move models, and may raise to stop.

    Raises:
        ValueError: A size the model does not have, or a reward that needs a reference video.
    """
    spec, rewards = model.spec, (judge, *others)
    for reward in rewards:
        if "reference" in reward.needs:
            raise ValueError(f"the reward {reward.name} needs a reference video, which a sweep does not have")
    if len({reward.name for reward in rewards}) < len(rewards):
        raise ValueError("the rewards of a sweep must differ: each is needed once")
    shape = spec.latent_shape(config.width or spec.width, config.height or spec.height, config.frames or spec.frames)
    scale, texts = config.guidance_scale or spec.guidance_scale, EmbeddingStore(model)
    texts.prepare([*config.prompts, *([config.negative_prompt] if scale != 1 else ())], tick)
    for strength in sorted(config.strengths, key=lambda value: (value != 0, value)):
        scores: dict[str, list[float]] = {reward.name: [] for reward in rewards}
        motion, shown = [], []
        with applied(model, [*kept, replace(use, strength=strength)]), torch.no_grad():
            for start in range(0, len(config.videos), config.batch_size):
                prompts, seeds = zip(*config.videos[start : start + config.batch_size], strict=True)
                negative = [texts[config.negative_prompt]] * len(prompts) if scale != 1 else None
                tick("rollout")  # the denoiser is where the conditioning shall be
                conditioning = model.conditioning([texts[prompt] for prompt in prompts], negative, shape)
                clips = sample(model, conditioning, seeds, shape, config.steps or spec.steps, scale, tick=tick)
                for reward in rewards:
                    tick("reward")
                    scores[reward.name] += reward.score(clips, prompts).tolist()
                motion += mean_motion(clips).tolist()
                last = clips.shape[2] - 1
                shown += clips[: max(0, config.shown - start), :, [0, last // 2, last]].cpu()
        bad = [name for name, values in scores.items() if not all(map(math.isfinite, values))]
        if bad:
            raise ValueError(f"{bad[0]} gave a score that is not finite at strength {strength:g}; try lower strengths")
        values = {name: tuple(column) for name, column in scores.items()}
        yield SweepPoint(strength, values, tuple(motion), torch.stack(shown))


def gathered(config: SweepConfig, points: Sequence[SweepPoint]) -> Sweep:
    """The sweep of the points of :func:`run_sweep`, of all or of the first ones."""
    judge, *others = points[0].scores
    return Sweep(config, tuple(sorted(points, key=lambda point: point.strength)), tuple(others) or (judge,))


def mean_motion(clips: Tensor) -> Tensor:
    """Mean squared difference of successive frames ``[B]`` of ``[B, 3, T, H, W]``; 0 for single frames."""
    if clips.shape[2] < 2:
        return clips.new_zeros(len(clips))
    return clips.diff(dim=2).square().flatten(1).mean(1)
