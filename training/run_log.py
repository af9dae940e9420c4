"""What a run's log says: curves with intervals, what to use of it, and what the guards did."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from .guards import GENTLE
from .sweep import Sweep, SweepConfig, SweepPoint

COLUMNS = 5
"""How many evaluations are shown side by side: the first, the best and the last among them."""
NORMAL = 1.96
"""Standard errors to either side of a mean, for an interval of 95 %."""


@dataclass(frozen=True)
class RunLog:
    """The evaluations in a run's log, and what follows from them.

    Attributes:
        evaluations: The records that hold one, by step.
        steps: The records of training steps.
    """

    evaluations: Sequence[Mapping[str, Any]]
    steps: Sequence[Mapping[str, Any]]

    @classmethod
    def of(cls, records: Sequence[Mapping[str, Any]]) -> RunLog:
        return cls([r for r in records if r.get("guards")], [r for r in records if r["step"]])

    @property
    def heldout(self) -> list[str]:
        return list(self.evaluations[-1]["guards"]["heldout"]) if self.evaluations else []

    @property
    def best(self) -> int | None:
        """The best step; None if no evaluation was better than the base model."""
        found = [r["step"] for r in self.evaluations if r["guards"]["best"]]
        return found[-1] if found else None

    @property
    def strength(self) -> float:
        """At which the best step is that; 1 unless its full strength was not sound."""
        record = self.at(self.best)
        return record["guards"].get("strength", 1.0) if record else 1.0

    @property
    def kept(self) -> Mapping[str, Any] | None:
        """The best step's record, with the scores at its :attr:`strength`."""
        record = self.at(self.best)
        if record is None or self.strength == 1:
            return record
        gentler = record["guards"]["gentler"]
        scored = {"rewards": gentler["reward"], "heldout": gentler["heldout"]}
        return {**record, "guards": {**record["guards"], **scored}}

    def at(self, step: int | None) -> Mapping[str, Any] | None:
        return next((r for r in self.evaluations if r["step"] == step), None)

    def rewards(self) -> list[tuple[float, ...]]:
        """(step, mean, low, high) of the trained reward."""
        return [(r["step"], *interval(r["guards"]["rewards"])) for r in self.evaluations]

    def gain(self, record: Mapping[str, Any], name: str = "") -> tuple[float, float, float]:
        """Mean gain on the first evaluation, low and high, of a held-out reward or, without a name, of the trained."""
        return interval(np.subtract(scores(record, name), scores(self.evaluations[0], name)))

    def gains(self, name: str = "", *, deviations: bool = False) -> list[tuple[float, ...]]:
        """(step, gain, low, high), on the reward's scale or in standard deviations over the first evaluation."""
        if len({len(scores(r, name)) for r in self.evaluations}) > 1:
            return []  # the prompts changed on the way
        unit = (float(np.std(scores(self.evaluations[0], name))) or 1.0) if deviations else 1.0
        return [(r["step"], *(value / unit for value in self.gain(r, name))) for r in self.evaluations]

    def ratios(self, what: str) -> list[tuple[float, ...]]:
        """(step, motion or sharpness relative to the base model's)."""
        return [(r["step"], r["guards"][what]) for r in self.evaluations]

    def columns(self) -> list[int]:
        """Steps of the evaluations to show."""
        steps = [r["step"] for r in self.evaluations]
        wanted = {steps[0], steps[-1], self.best if self.best is not None else steps[0]} if steps else set()
        for place in np.linspace(0, len(steps) - 1, COLUMNS) if steps else ():
            if len(wanted) < COLUMNS:
                wanted.add(steps[round(float(place))])
        return sorted(wanted)

    @cached_property
    def sweep_record(self) -> Mapping[str, Any] | None:
        """The newest sweep of the run's LoRA, as :func:`.run_sweep.sweep_record` wrote it."""
        return next((r["sweep"] for r in reversed(self.steps) if "sweep" in r), None)

    @property
    def swept(self) -> str:
        """What was swept, in words: a step, and the strength it was kept at if that is not its full one."""
        step = self.sweep_record["step"] if self.sweep_record else None
        return f"step {step}" + (f", kept at {self.strength:g}," if step == self.best and self.strength != 1 else "")

    @cached_property
    def sweep(self) -> Sweep | None:
        return _sweep(self.sweep_record) if self.sweep_record else None


def advice(log: RunLog, name: str, kept: bool = True) -> tuple[bool, list[str]]:
    """What to use, and warnings, in words; the first says what to use.

    Args:
        log: The run's.
        name: Of the run and its LoRA.
        kept: Whether the best step's LoRA was saved.

    Returns:
        Whether the first sentence is a warning, and the sentences.
    """
    if len(log.evaluations) < 2:
        return False, ["There are not yet two evaluations to compare."]
    last, best = log.evaluations[-1], log.kept
    trained, low, high = log.gain(last)
    use, costs, words, warns = _use(log, name, kept), _costs(log, last, best), [], True
    if costs:
        joined = f"{_moved(trained)} {'while' if trained > 0 else 'and'} {_listed(costs)}"
        words.append(f"The trained reward {joined}: {use}.")
    elif best and best["step"] == last["step"]:
        warns = False
        words.append(f"The last evaluation is the best: {use}; the trained reward {_moved(log.gain(best)[0])}.")
    elif best:
        warns = False
        words.append(f"Step {best['step']} was the best: {use}; the trained reward {_moved(log.gain(best)[0])} there.")
        leads = [interval(np.subtract(scores(best, n), scores(last, n))) for n in log.heldout or [""]]
        if all(lower <= 0 for _, lower, _ in leads):
            words.append("That it is better than the last step is not shown on so few prompts; either may do.")
    else:
        words.append(
            f"No evaluation was better than the base model and sound: {use}. Train longer, or check reward and "
            "learning rate."
        )
    if log.sweep and log.sweep_record["step"] == (best or last)["step"]:
        words.append(_why(log.sweep))
    if low <= 0 <= high:
        words.append(
            f"A gain of the trained reward at the last step is not shown: the interval of {trained:+.4g} holds 0 "
            f"({low:+.4g} to {high:+.4g}). More sample_prompts and sample_count make it narrower."
        )
    if not log.heldout:
        words.append(
            "No held-out judge looked: motion and sharpness are the only witnesses besides the trained reward. "
            "A reward that was not trained on is a better one."
        )
    return warns, words


def _use(log: RunLog, name: str, kept: bool) -> str:
    """Which file at which strength."""
    last, best = log.evaluations[-1]["step"], log.best
    newest = best in (None, last) and log.strength == 1
    if not newest and not kept:
        return f"train {best} steps instead, and try strength {GENTLE:g} first"
    file = f"{name}{'' if newest else '_best'}.safetensors"
    known = log.sweep and log.sweep_record["step"] == (last if best is None else best)
    strength = log.sweep.best.strength if known else 1.0
    if not strength:
        return "use no LoRA of this run"
    if log.strength != 1:
        return f"use step {best} at strength {log.strength * strength:g}, which is {file} at strength {strength:g}"
    which = file if newest else f"step {best} ({file})"
    if known:
        return f"use {which} at strength {strength:g}"
    if best is not None:
        return f"use {which}, and try strength {GENTLE:g} first"
    return f"do not use {which} at full strength"


def _costs(log: RunLog, last: Mapping[str, Any], best: Mapping[str, Any] | None) -> list[str]:
    """What the last evaluation lost: against the base model if it is shown, else against the best step."""
    costs, guards = [], last["guards"]
    for judge in log.heldout:
        gain, _, upper = log.gain(last, judge)
        if upper < 0:
            costs.append(f"{judge} fell {-gain:.4g}")
        elif best and best["step"] != last["step"] and guards["words"]:
            loss, lower, _ = interval(np.subtract(scores(best, judge), scores(last, judge)))
            if lower > 0:
                costs.append(f"{judge} fell {loss:.4g} since step {best['step']}")
    return costs + [
        f"{what} {'rose' if guards[what] > 1 else 'fell'} to {guards[what]:.2f} of the base"
        for what in guards["unsound"]
    ]


def _why(sweep: Sweep) -> str:
    """Why the strength: what it gains and keeps, beside full strength."""
    best, full = sweep.best, next(point for point in sweep.points if point.strength == 1)

    def told(point) -> str:
        gain = sweep.held_out_gain(point)
        unit = "" if len(sweep.held_out) == 1 else " standard deviations"
        return (f"{gain.mean:+.4g}{unit} ({gain.low:+.4g} to {gain.high:+.4g}) with motion at "
                f"{sweep.motion_ratio(point):.2f} of the base")  # fmt: skip

    judges = _listed(list(sweep.held_out))
    if not best.strength:
        return f"Of the strengths tried none gains by {judges} while enough moves; full strength: {told(full)}."
    text = f"Strength {best.strength:g} by {judges}: {told(best)}"
    if best is not full:
        text += f"; full strength: {told(full)}"
    if sweep.held_out_gain(best).low <= 0:
        text += ". That is no gain shown: take more prompts"
    return f"{text}."


def deeds(log: RunLog, config: Mapping[str, Any]) -> list[str]:
    """What every guard was set to, did, and why."""
    told = [f"Preset {config['guards']}."]
    best, at = log.best, f" at strength {log.strength:g}" if log.strength != 1 else ""
    kept = f"kept step {best}{at}" if best is not None else "has nothing to keep yet"
    told.append(f"keep_best {kept}." if config["keep_best"] else "keep_best is off.")
    ends = [r["stop"] for r in log.steps if r.get("stop")]
    if not config["patience"]:
        told.append("Early stop is off (patience 0).")
    else:
        told.append(f"Early stop: {ends[-1]}." if ends else f"Early stop (patience {config['patience']}) did not fire.")
    told += [f"Step {r['step']}: {r['guards']['words']}." for r in log.evaluations if r["guards"]["words"]]
    for record in log.evaluations:
        if again := record["guards"].get("gentler"):
            found = "was, and still the best: kept" if record["guards"]["best"] else "was not, or not better"
            told.append(
                f"Step {record['step']} scored higher than the best but was not surely sound; at strength "
                f"{again['strength']:g} it {found}."
            )
    if log.sweep and log.sweep_record:
        strengths = ", ".join(f"{point.strength:g}" for point in log.sweep.points)
        told.append(f"The LoRA of {log.swept} was painted at the strengths {strengths}.")
    if config["motion_guard"]:
        ratios = [r["motion"] for r in log.steps if r.get("motion") is not None]
        under = sum(ratio < config["motion_floor"] for ratio in ratios)
        told.append(
            f"The motion guard saw {under} of {len(ratios)} batches under {config['motion_floor']:g} of the base."
        )
    if config["anchor"] or config["anchor_target"]:
        used = [r for r in log.steps if r.get("anchor")]
        if used:
            aim = f" towards {config['anchor_target']:g}" if config["anchor_target"] else ""
            told.append(
                f"The anchor's weight went from {used[0]['anchor']:.3g} to {used[-1]['anchor']:.3g}, the distance from "
                f"{used[0]['drift']:.3g} to {used[-1]['drift']:.3g}{aim}."
            )
    if config["augment"]:
        told.append(f"The judge saw {config['augment']} random views of every clip.")
    conflicts = next((r["conflicts"] for r in reversed(log.steps) if r.get("conflicts")), {})
    for pair, cosine in conflicts.items():
        if cosine is not None:
            kind = "pull against each other" if cosine < -0.1 else "agree" if cosine > 0.1 else "hardly meet"
            told.append(f"The rewards {pair} {kind} at the frames (cosine {cosine:+.2f}).")
    return told


def scores(record: Mapping[str, Any], name: str) -> Sequence[float]:
    """One a clip, of a held-out reward or, without a name, of the trained one."""
    return record["guards"]["heldout"][name] if name else record["guards"]["rewards"]


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, low and high of the normal interval of the mean; a single value has none."""
    mean, count = float(np.mean(values)), len(values)
    error = NORMAL * float(np.std(values, ddof=1)) / math.sqrt(count) if count > 1 else 0.0
    return mean, mean - error, mean + error


def _sweep(record: Mapping[str, Any]) -> Sweep:
    """The sweep that :func:`.run_sweep.sweep_record` wrote down."""
    reward = record["reward"]
    points = [
        SweepPoint(p["strength"], {reward: tuple(p["rewards"])} | {k: tuple(v) for k, v in p["heldout"].items()},
                   tuple(p["motion"]), torch.empty(0))
        for p in record["points"]
    ]  # fmt: skip
    prompts = tuple(map(str, range(len(points[0].motion))))
    config = SweepConfig(tuple(p.strength for p in points), prompts, motion_floor=record["motion_floor"])
    return Sweep(config, tuple(points), tuple(points[0].scores)[1:] or (reward,))


def _listed(words: Sequence[str]) -> str:
    return " and ".join(words)


def _moved(gain: float) -> str:
    return f"{'rose' if gain >= 0 else 'fell'} {abs(gain):.4g}"
