"""Guards against reward hacking: what training towards a reward must not cost, watched and defended.

Every public trainer reports it: the reward climbs, textures appear, motion dies. Three of the guards only look: at
every evaluation they compare the clips with the base model's on the same prompts and seeds, by judges that were not
trained on, by how much moves and by how sharp it is; from that follow the best step, and when to stop. The others
change what is learned: a penalty on lost motion, an anchor held at a distance, and views for the judge
(:mod:`.augment`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..reward_models.protocol import Reward
from .events import Evaluation
from .seeds import seed_for

Preset = Literal["careful", "standard", "off"]

PRESETS: dict[str, dict[str, Any]] = {
    "off": {"keep_best": False, "patience": 0, "motion_floor": 0.9, "motion_guard": 0.0, "anchor": 0.0,
            "anchor_target": 0.0, "augment": 0, "sweep": False},
    "standard": {"keep_best": True, "patience": 3, "motion_floor": 0.9, "motion_guard": 0.0, "anchor": 0.0,
                 "anchor_target": 0.0, "augment": 0, "sweep": True},
    "careful": {"keep_best": True, "patience": 2, "motion_floor": 0.9, "motion_guard": 1.0, "anchor": 0.0,
                "anchor_target": 0.0, "augment": 2, "sweep": True},
}  # fmt: skip
"""What each preset sets where the run does not."""

GENTLE = 0.7
"""Strength that publishers of reward LoRAs show theirs at: what to try where full strength goes too far."""

FLAT = 1e-6
"""Mean squared slope, in brightness a pixel, that keeps the speed of an empty clip finite."""
STILL = 1e-3
"""Below this speed, in pixels a frame, nothing moves."""
SHARPNESS = 1.5
"""Fine detail beyond this factor of the base model's, or its inverse, is texture or blur."""
ANCHOR_STEP = 0.1
"""Largest relative change of an adaptive anchor's weight in one step."""
ANCHOR_RANGE = 1e4
"""How far an adaptive anchor's weight may go from where it began, either way."""


def speed(clips: Tensor) -> Tensor:
    """How fast things move in ``[B, C, T, H, W]``, in pixels a frame ``[B]``; differentiable, 0 for single frames.

    Brightness constancy (Horn and Schunck, 1981) ties a speed v to the slopes of the picture:
    ``v^2 = mean (dI/dt)^2 / mean |grad I|^2``. Unlike the squared difference of frames it hardly changes with
    colours and contrast, which a reward may well have to change. Latents have a speed too.
    """
    clips = clips.float()
    if clips.shape[2] < 2:
        return clips.flatten(1)[:, 0] * 0
    change = clips.diff(dim=2).square().flatten(1).mean(1)
    slope = sum(clips.diff(dim=axis).square().flatten(1).mean(1) for axis in (3, 4))
    return ((change + FLAT**2) / (slope + FLAT)).sqrt()


def sharpness(clips: Tensor) -> Tensor:
    """Mean squared Laplacian of the brightness ``[B]`` of ``[B, 3, T, H, W]``: fine detail, and artefacts.

    The focus measure of Pech-Pacheco et al. (ICPR 2000), without its mean, which is 0 but for the edges.
    """
    light = clips.float().mean(1)
    inner = light[..., 1:-1, 1:-1]
    around = light[..., 2:, 1:-1] + light[..., :-2, 1:-1] + light[..., 1:-1, 2:] + light[..., 1:-1, :-2]
    return (around - 4 * inner).square().flatten(1).mean(1)


def score_clips(
    reward: Reward,
    clips: Tensor,
    prompts: Sequence[str],
    device: torch.device,
    references: Callable[[int], Tensor | None] = lambda index: None,
) -> tuple[float, ...]:
    """Clips ``[N, 3, T, H, W]`` scored one by one by a reward that is on the device only for as long.

    ``references`` gives what a clip is compared with, ``[1, 3, T, H, W]``, if the reward needs that.
    """
    moves = device.type != "cpu" and hasattr(reward, "to")
    if moves:
        reward.to(device)
    try:
        with torch.no_grad():
            return tuple(
                float(reward.score(clip.to(device), [prompt], reference=references(index)))
                for index, (clip, prompt) in enumerate(zip(clips.split(1), prompts, strict=True))
            )
    finally:
        if moves:
            reward.to("cpu")


@dataclass(frozen=True)
class Reading:
    """What an evaluation measured, one number a clip.

    Attributes:
        step: Steps made before it.
        reward: What is trained on.
        heldout: What is not, by name.
        motion: :func:`speed`.
        sharpness: :func:`sharpness`.
        strength: That the LoRA was at.
    """

    step: int
    reward: Sequence[float]
    heldout: Mapping[str, Sequence[float]]
    motion: Sequence[float]
    sharpness: Sequence[float]
    strength: float = 1.0

    @classmethod
    def of(cls, step: int, evaluation: Evaluation, strength: float = 1.0) -> Reading:
        e = evaluation
        moving, detail = speed(e.frames).tolist(), sharpness(e.frames).tolist()
        return cls(step, e.rewards, dict(e.heldout), moving, detail, strength)


@dataclass(frozen=True)
class Finding:
    """What the guards say of an evaluation.

    Attributes:
        motion: Relative to the base model's.
        sharpness: Relative to the base model's.
        gains: Mean gain on the base model by held-out judge, on its own scale.
        score: Mean gain of the held-out judges, or of the trained reward if there are none, in standard deviations
            over the base model's clips. The best step has the highest.
        unsound: Which of motion and sharpness are beyond their limits.
        best: Whether this is the best step so far.
        strength: At which it is.
        gentler: What was measured at :data:`GENTLE` strength, if the rule asked for that.
        in_a_row: Bad evaluations in a row, this one included.
        stop: Why the run ends here; empty if it goes on.
        words: What is bad, in a sentence; empty if nothing is.
    """

    motion: float
    sharpness: float
    gains: dict[str, float]
    score: float
    unsound: tuple[str, ...]
    best: bool
    strength: float
    gentler: Reading | None
    in_a_row: int
    stop: str
    words: str


class Guards:
    """Watches the evaluations of a run; its ``state`` goes into the checkpoints.

    The best step is the sound one with the highest score (:class:`Finding`), the base model's 0 included; its motion
    must be above the floor by a standard error of the paired clips, so that few prompts are given little room. A step
    with a higher score that is not surely sound is measured at :data:`GENTLE` strength too: if it is sound there, and
    the score still the highest, it is the best step at that strength.

    An evaluation is bad if it is not sound, or if the held-out score is lower than at the best step, by more than one
    standard error of the paired differences, although the trained reward is higher. ``patience`` bad ones in a row
    end the run.

    Args:
        patience: 0 never ends the run.
        motion_floor: Share of the base model's motion under which an evaluation is not sound.
        reward: Name of the trained reward.
        of: What is evaluated, as text: prompts and held-out judges. Readings of something else begin anew.
        state: That of an earlier run, as JSON gives it back.
    """

    def __init__(
        self, patience: int, motion_floor: float, reward: str, of: Sequence[str], state: Mapping[str, Any] | None = None
    ) -> None:
        self._patience, self._floor, self._reward = patience, motion_floor, reward
        self.state: dict[str, Any] = {"of": seed_for(*of), "base": None, "best": None, "now": None, "in_a_row": 0,
                                      "last": -1, "stop": "", "anchor": 0.0}  # fmt: skip
        if state:
            same = state["of"] == self.state["of"]
            self.state |= state if same else {"anchor": state["anchor"]}

    @property
    def last(self) -> int:
        """Step of the last evaluation; -1 before any."""
        return self.state["last"]

    @property
    def base(self) -> Reading | None:
        return Reading(**self.state["base"]) if self.state["base"] else None

    @property
    def best(self) -> Reading | None:
        """The best step so far; the base model's 0 if nothing is better."""
        return Reading(**self.state["best"]) if self.state["best"] else None

    @property
    def now(self) -> Reading | None:
        """The last evaluation."""
        return Reading(**self.state["now"]) if self.state["now"] else None

    @property
    def bad(self) -> bool:
        """Whether the last evaluation was."""
        return self.state["in_a_row"] > 0

    @property
    def stopped(self) -> str:
        """Why the run has ended, if the guards have ended it and still would."""
        return self.state["stop"] if self._patience else ""

    def observe(self, now: Reading, gentler: Callable[[float], Reading] | None = None) -> Finding:
        """Take an evaluation into account; the first must be the base model's.

        Args:
            now: At full strength.
            gentler: Measures the same LoRA at a lower strength, which costs an evaluation; None never does.
        """
        base, best = self.base or now, self.best or now
        motion, detail, unsound, sure = self._soundness(now, base)
        again, kept = None, best
        if now.step and self._score(now, base) > self._score(best, base):
            if sure:
                kept = now
            elif gentler:
                again = gentler(GENTLE)
                if self._soundness(again, base)[3] and self._score(again, base) > self._score(best, base):
                    kept = again
        complaints = self._complaints(now, best, base, motion if "motion" in unsound else None,
                                      detail if "sharpness" in unsound else None)  # fmt: skip
        in_a_row = self.state["in_a_row"] + 1 if complaints else 0
        words, stop = "", ""
        if complaints:
            change = _mean(now.reward) - _mean(base.reward)
            words = (f"the trained reward {self._reward} {'rose' if change > 0 else 'fell'} by {abs(change):.4f} since "
                     f"the start, while {' and '.join(complaints)}")  # fmt: skip
        if self._patience and in_a_row >= self._patience:
            at = f" at strength {kept.strength:g}" if kept.strength != 1 else ""
            advice = f"use the LoRA of step {kept.step}{at}" if kept.step else "no step was better than the base model"
            stop = f"stopped at step {now.step}: {in_a_row} bad evaluations in a row; at the last {words}; {advice}"
        self.state |= {"in_a_row": in_a_row, "stop": stop, "last": now.step, "base": asdict(base)}
        self.state |= {"best": asdict(kept), "now": asdict(now)}
        gains = {name: _mean(values) - _mean(base.heldout[name]) for name, values in now.heldout.items()}
        score, improved = self._score(now, base), kept is not best
        return Finding(motion, detail, gains, score, unsound, improved, kept.strength, again, in_a_row, stop, words)

    def _soundness(self, now: Reading, base: Reading) -> tuple[float, float, tuple[str, ...], bool]:
        """Motion and sharpness relative to the base model's, which are beyond their limits, and if surely none is."""
        motion, detail = ratio(now.motion, base.motion, STILL), ratio(now.sharpness, base.sharpness, FLAT)
        lost = np.subtract(now.motion, motion * np.array(base.motion))
        doubt = _standard_error(lost) / max(_mean(base.motion), STILL)  # of the ratio
        unsound = () if motion >= self._floor else ("motion",)
        unsound += () if 1 / SHARPNESS <= detail <= SHARPNESS else ("sharpness",)
        return motion, detail, unsound, not unsound and motion - doubt >= self._floor

    def _complaints(
        self, now: Reading, best: Reading, base: Reading, motion: float | None, detail: float | None
    ) -> list[str]:
        """What is bad about an evaluation; ``motion`` and ``detail`` are given where they are beyond their limits."""
        found = []
        if motion is not None:
            found.append(f"motion fell to {motion:.2f} of the base model's")
        if detail is not None:
            went, means = ("rose", "texture") if detail > 1 else ("fell", "blur")
            found.append(f"fine detail {went} to {detail:.2f} of the base model's, which is {means}")
        rose = _mean(now.reward) > _mean(best.reward)
        if now.heldout and rose and _falls(self._standardised(now, base), self._standardised(best, base)):
            losses = {name: _mean(best.heldout[name]) - _mean(values) for name, values in now.heldout.items()}
            found += [f"{name} fell by {loss:.4f} since step {best.step}" for name, loss in losses.items() if loss > 0]
        return found

    def _standardised(self, reading: Reading, base: Reading) -> np.ndarray:
        """Gain on the base model a clip, the mean over the judges, in standard deviations."""
        pairs = [(values, base.heldout[name]) for name, values in reading.heldout.items()]
        pairs = pairs or [(reading.reward, base.reward)]
        return np.mean([np.subtract(now, was) / (float(np.std(was)) or 1.0) for now, was in pairs], axis=0)

    def _score(self, reading: Reading, base: Reading) -> float:
        return float(self._standardised(reading, base).mean())

    def anchor_weight(self, start: float, target: float) -> float:
        """Weight of the anchor at the next step; ``start`` if it has no target."""
        return (self.state["anchor"] or start or 1.0) if target else start

    def steer_anchor(self, start: float, target: float, distance: float) -> None:
        """After a step at a distance from the base model: more weight if it is above the target, less if below.

        A proportional controller of the weight's logarithm, as in Ziegler et al. (arXiv 1909.08593) of the KL penalty.
        """
        if target and math.isfinite(distance):
            start, error = start or 1.0, max(-1.0, min(1.0, distance / target - 1))
            weight = self.anchor_weight(start, target) * (1 + ANCHOR_STEP) ** error
            self.state["anchor"] = min(max(weight, start / ANCHOR_RANGE), start * ANCHOR_RANGE)


@dataclass(frozen=True)
class MotionGuard:
    """A penalty on moving less than the base model does on the same prompts and seeds.

    Attributes:
        weight: Of the penalty, ``weight * relu(floor - ratio)`` a sample.
        floor: Of the ratio of the samples' motion to the base model's, above which nothing is penalised.
        base: The base model's clips, or latents, ``[B, C, T, H, W]``, by which the ratio is taken.
    """

    weight: float
    floor: float
    base: Tensor = field(repr=False)

    def ratio(self, clips: Tensor) -> Tensor:
        """Motion of clips, or latents, relative to the base model's, ``[B]``; 1 where nothing moves there."""
        before = speed(self.base)
        return torch.where(before > STILL, speed(clips) / before.clamp_min(STILL), 1.0)

    def __call__(self, clips: Tensor) -> Tensor:
        """The mean penalty over the samples, differentiable."""
        return self.weight * (self.floor - self.ratio(clips)).relu().mean()


def conflicts(
    reward: Reward, frames: Tensor, prompts: Sequence[str], reference: Tensor | None = None
) -> dict[str, float]:
    """How far the terms of a mixture pull the frames in one direction.

    Args:
        reward: A mixture has ``rewards``, ``weights`` and ``labels``; anything else has nothing to report.
        frames: ``[B, 3, T, H, W]`` that were judged.
        prompts: One a sample.
        reference: What they are compared with, if a term needs that.

    Returns:
        ``"a, b"`` to the mean over the samples of the cosine between the gradients of both terms, weighted: -1 is
        a conflict, 0 indifference, 1 agreement.
    """
    terms = getattr(reward, "rewards", ())
    if len(terms) < 2:
        return {}
    directions, reference = [], None if reference is None else reference.to(frames)
    for term, weight in zip(terms, reward.weights, strict=True):
        inner = frames.detach().requires_grad_()
        with torch.enable_grad():
            total = weight * term.score(inner, prompts, reference=reference).sum()
            known = total.requires_grad
            (found,) = torch.autograd.grad(total, inner, allow_unused=True) if known else (None,)
        directions.append(torch.zeros_like(inner).flatten(1) if found is None else found.flatten(1))
    names = reward.labels
    return {
        f"{names[i]}, {names[j]}": float(torch.cosine_similarity(directions[i], directions[j]).mean())
        for i in range(len(names))
        for j in range(i + 1, len(names))
    }


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def ratio(now: Sequence[float], before: Sequence[float], least: float) -> float:
    """Of the means; 1 where there was nothing before."""
    return _mean(now) / _mean(before) if _mean(before) > least else 1.0


def _falls(now: Sequence[float], before: Sequence[float]) -> bool:
    """Lower by more than one standard error of the paired differences."""
    differences = np.subtract(now, before)
    return float(differences.mean()) < -_standard_error(differences)


def _standard_error(values: np.ndarray) -> float:
    """Of the mean; 0 of a single value."""
    return float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
