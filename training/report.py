"""A run's report: one HTML file that opens anywhere, with what the run gained, what it cost, and what to use."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from .guards import PRESETS

PREVIEWS = 4
"""How many clips of an evaluation the report shows."""
COLUMNS = 5
"""How many evaluations it shows side by side: the first, the best and the last among them."""
NORMAL = 1.96
"""Standard errors to either side of a mean, for an interval of 95 %."""
GENTLE = 0.7
"""Strength that publishers of reward LoRAs show theirs at; what to try where nothing better is known."""


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

    def at(self, step: int | None) -> Mapping[str, Any] | None:
        return next((r for r in self.evaluations if r["step"] == step), None)

    def rewards(self) -> list[tuple[float, ...]]:
        """(step, mean, low, high) of the trained reward."""
        return [(r["step"], *_interval(r["guards"]["rewards"])) for r in self.evaluations]

    def gain(self, record: Mapping[str, Any], name: str = "") -> tuple[float, float, float]:
        """Mean gain on the first evaluation, low and high, of a held-out reward or, without a name, of the trained."""
        return _interval(np.subtract(_scores(record, name), _scores(self.evaluations[0], name)))

    def gains(self, name: str = "", *, deviations: bool = False) -> list[tuple[float, ...]]:
        """(step, gain, low, high), on the reward's scale or in standard deviations over the first evaluation."""
        if len({len(_scores(r, name)) for r in self.evaluations}) > 1:
            return []  # the prompts changed on the way
        unit = (float(np.std(_scores(self.evaluations[0], name))) or 1.0) if deviations else 1.0
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
    last, best = log.evaluations[-1], log.at(log.best)
    trained, low, high = log.gain(last)
    costs = []
    for judge in log.heldout:
        gain, _, upper = log.gain(last, judge)
        if upper < 0:
            costs.append(f"{judge} fell {-gain:.4g}")
    guards = last["guards"]
    costs += [
        f"{what} {'rose' if guards[what] > 1 else 'fell'} to {guards[what]:.2f} of the base"
        for what in guards["unsound"]
    ]
    use = "do not use this LoRA at full strength"
    if best:
        use = f"use step {best['step']} ({name}_best.safetensors)" if kept else f"train {best['step']} steps instead"
    words, warns = [], True
    if costs or (best is not last and guards["words"]):
        cost = " and ".join(costs) or "it was better before"
        joined = f"{_moved(trained)} {'while' if trained > 0 else 'and'} {cost}"
        words.append(f"The trained reward {joined}: {use}, and try strength {GENTLE:g} first.")
    elif best is last:
        warns = False
        words.append(f"The last evaluation is the best: use {name}.safetensors; the trained reward {_moved(trained)}.")
    elif best:
        warns = False
        words.append(f"Step {best['step']} was the best: {use}; the trained reward {_moved(log.gain(best)[0])} there.")
        leads = [_interval(np.subtract(_scores(best, n), _scores(last, n))) for n in log.heldout or [""]]
        if all(lower <= 0 for _, lower, _ in leads):
            words.append("That it is better than the last step is not shown on so few prompts; either may do.")
    else:
        words.append("No evaluation was better than the base model; train longer, or check reward and learning rate.")
    if low <= 0 <= high:
        words.append(
            f"A gain of the trained reward is not shown: the interval of {trained:+.4g} holds 0 ({low:+.4g} to "
            f"{high:+.4g}). More sample_prompts and sample_count make it narrower."
        )
    if not log.heldout:
        words.append(
            "No held-out judge looked: motion and sharpness are the only witnesses besides the trained reward. "
            "A reward that was not trained on is a better one."
        )
    return warns, words


def deeds(log: RunLog, config: Mapping[str, Any]) -> list[str]:
    """What every guard was set to, did, and why."""
    told = [f"Preset {config['guards']}."]
    best = log.best
    kept = f"kept step {best}" if best is not None else "has nothing to keep yet"
    told.append(f"keep_best {kept}." if config["keep_best"] else "keep_best is off.")
    ends = [r["stop"] for r in log.steps if r.get("stop")]
    if not config["patience"]:
        told.append("Early stop is off (patience 0).")
    else:
        told.append(f"Early stop: {ends[-1]}." if ends else f"Early stop (patience {config['patience']}) did not fire.")
    told += [f"Step {r['step']}: {r['guards']['words']}." for r in log.evaluations if r["guards"]["words"]]
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


def page(
    name: str,
    reward: str,
    records: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
    prompts: Sequence[str],
    picture: Path,
) -> str:
    """The report as HTML that needs nothing else.

    Args:
        name: Of the run.
        reward: That is trained on.
        records: Of the log.
        config: All settings of the run.
        prompts: Of the evaluations.
        picture: The curve; previews lie in ``samples`` beside it.
    """
    log = RunLog.of(records)
    step = records[-1]["step"] if records else 0
    warns, said = advice(log, name, bool(config.get("keep_best")))
    parts = [
        f"<h1>{escape(name)}</h1><p class=sub>{escape(reward)}, step {step} of {config.get('steps', step)}</p>",
        f"<div class='{'warn' if warns else 'good'}'>{escape(said[0])}</div>",
        "".join(f"<p>{escape(text)}</p>" for text in said[1:]),
        "<h2>Curves</h2>",
        f"<img class=curve alt='reward over the steps' src='{_embedded(picture, 'png')}'>",
        "<p class=sub>Bands are 95 % intervals of the mean over the fixed prompts.</p>",
        _videos(log, prompts, picture.parent / "samples"),
        _evaluations(log, reward),
        "<h2>What the guards did</h2><ul>" + "".join(f"<li>{escape(t)}</li>" for t in deeds(log, config)) + "</ul>",
        _settings(config),
    ]
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>{escape(name)}</title><style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1080px;margin:2em auto;padding:0 1em;color:#222;background:#fff}
h1{margin-bottom:0}h2{margin-top:1.6em;border-bottom:1px solid #ddd}
.sub{color:#666;margin-top:.2em}.warn,.good{padding:.8em 1em;border-left:5px solid;font-size:1.1em;margin:1em 0}
.warn{border-color:#d1603d;background:#fdf1ec}.good{border-color:#3a9a5b;background:#eef8f1}
.curve{max-width:100%}.scroll{overflow-x:auto}table{border-collapse:collapse}
th,td{padding:.3em .7em;text-align:right;border-bottom:1px solid #eee;vertical-align:top}
th:first-child,td:first-child,td.text{text-align:left}
.clips td,.clips th{text-align:center;border:0;padding:.2em}.clips td:first-child{max-width:13em}
.clips img{width:160px;display:block}.best{background:#eef8f1}.bad{background:#fdf1ec}
"""


def _videos(log: RunLog, prompts: Sequence[str], folder: Path) -> str:
    steps = log.columns()
    if not steps:
        return ""
    titles = [("before" if s == 0 else f"step {s}") + (", best" if s == log.best else "") for s in steps]
    rows = []
    for index, prompt in enumerate(prompts[:PREVIEWS]):
        cells = []
        for title, step in zip(titles, steps, strict=True):
            path = folder / f"{index:02d}-step-{step:06d}.webp"
            label = escape(f"{title}: {prompt}", quote=True)
            cells.append(f"<img alt='{label}' src='{_embedded(path, 'webp')}'>" if path.is_file() else "")
        rows.append(f"<tr><td>{escape(prompt)}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    head = "".join(f"<th>{title}</th>" for title in titles)
    return (
        "<h2>The same prompts and seeds, before and after</h2><div class=scroll>"
        f"<table class=clips><tr><th></th>{head}</tr>{''.join(rows)}</table></div>"
    )


def _evaluations(log: RunLog, reward: str) -> str:
    if not log.evaluations:
        return ""
    names = [f"{reward} (trained)", *(f"{name} (held out)" for name in log.heldout)]
    head = "".join(f"<th>{escape(name)}<br>gain, 95 % interval</th>" for name in names)
    curves = [log.gains(name) for name in ("", *log.heldout)]
    rows = []
    for index, record in enumerate(log.evaluations):
        guards = record["guards"]
        cells = [_gain(curve[index]) if curve else "" for curve in curves]
        cells += [f"{guards['motion']:.2f}", f"{guards['sharpness']:.2f}"]
        note = "best" if record["step"] == log.best else "bad" if guards["words"] else ""
        rows.append(
            f"<tr class='{note}'><td>{record['step']}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}"
            f"<td class=text>{note}</td></tr>"
        )
    return (
        f"<h2>Evaluations</h2><div class=scroll><table><tr><th>step</th>{head}<th>motion<br>/ base</th>"
        f"<th>sharpness<br>/ base</th><th></th></tr>{''.join(rows)}</table></div>"
    )


def _settings(config: Mapping[str, Any]) -> str:
    guards = {*PRESETS["off"], "guards"}
    flat = {}
    for name, value in config.items():
        flat |= {f"{name}.{key}": v for key, v in value.items()} if isinstance(value, Mapping) else {name: value}
    ordered = sorted(flat, key=lambda name: name not in guards)
    rows = "".join(f"<tr><td>{escape(name)}</td><td class=text>{escape(str(flat[name]))}</td></tr>" for name in ordered)
    return f"<h2>Settings</h2><details><summary>All {len(flat)} of them</summary><table>{rows}</table></details>"


def _embedded(path: Path, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _scores(record: Mapping[str, Any], name: str) -> Sequence[float]:
    return record["guards"]["heldout"][name] if name else record["guards"]["rewards"]


def _interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, low and high of the normal interval of the mean; a single value has none."""
    mean, count = float(np.mean(values)), len(values)
    error = NORMAL * float(np.std(values, ddof=1)) / math.sqrt(count) if count > 1 else 0.0
    return mean, mean - error, mean + error


def _gain(point: Sequence[float]) -> str:
    _, mean, low, high = point
    return f"{mean:+.4f}<br><span class=sub>{low:+.4f} to {high:+.4f}</span>"


def _moved(gain: float) -> str:
    return f"{'rose' if gain >= 0 else 'fell'} {abs(gain):.4g}"
