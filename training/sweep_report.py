"""A sweep for the eye: a table, a curve with intervals, and a sheet of videos."""

from __future__ import annotations

import csv
import io

import numpy as np

from ..garbage import garbage_freed
from .compare import CONFIDENCE
from .media import contact_sheet, figure_pixels
from .sweep import Sweep


def sweep_rows(sweep: Sweep) -> tuple[list[str], list[list[str]]]:
    """Header and one row a strength: its rewards, their gains with intervals, its motion, and what to say of it."""
    names = list(sweep.base.scores)
    header = ["strength"]
    for name in names:
        header += [name, f"{name} gain", "low", "high"]
    header += ["motion", ""]
    moving, best, rows = sweep.still_moving, sweep.best, []
    for point in sweep.points:
        row = [f"{point.strength:g}"]
        for name in names:
            gain = sweep.gain(point, name)
            row += [f"{np.mean(point.scores[name]):.4f}", *(f"{v:+.4f}" for v in (gain.mean, gain.low, gain.high))]
        ratio = sweep.motion_ratio(point)
        note = "recommended" if point is best else "too little motion" if ratio < sweep.config.motion_floor else ""
        if not note and point.strength > moving[-1].strength:
            note = "after the motion fell"
        rows.append([*row, f"{ratio:.3f}", note])
    return header, rows


def sweep_csv(sweep: Sweep) -> str:
    """:func:`sweep_rows` as a CSV file."""
    header, rows = sweep_rows(sweep)
    for index, name in enumerate(header):
        if name in ("low", "high"):
            header[index] = f"{header[index - 1 - (name == 'high')]} {name}"
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([[*header[:-1], "note"], *rows])
    return text.getvalue()


@garbage_freed()
def sweep_plot(sweep: Sweep) -> np.ndarray:
    """Gain of every reward with its interval, and motion with its floor, over the strength: ``[H, W, 3]`` uint8."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 6), dpi=110)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    strengths = [point.strength for point in sweep.points]
    for name in sweep.base.scores:
        unit = sweep.spread(name)
        gains = [sweep.gain(point, name) for point in sweep.points]
        label = f"{name}{' (decides)' if name in sweep.held_out else ''}"
        (line,) = upper.plot(strengths, [gain.mean / unit for gain in gains], marker="o", label=label)
        low, high = ([getattr(gain, end) / unit for gain in gains] for end in ("low", "high"))
        upper.fill_between(strengths, low, high, color=line.get_color(), alpha=0.18)
    upper.axhline(0, color="black", linewidth=0.8)
    upper.set_ylabel(f"gain, in the base model's\nstandard deviations ({CONFIDENCE:.0%} interval)")
    lower.plot(strengths, [sweep.motion_ratio(point) for point in sweep.points], color="#444444", marker="o")
    lower.axhline(sweep.config.motion_floor, color="#d1603d", linestyle="--", label="floor")
    lower.set_ylabel("motion / base")
    lower.set_ylim(bottom=0)
    lower.set_xlabel("strength")
    for axes in (upper, lower):
        axes.axvline(sweep.best.strength, color="tab:green", linestyle=":", label="recommended")
        axes.grid(alpha=0.25)
        axes.legend(loc="best", fontsize=8)
    figure.tight_layout()
    return figure_pixels(figure)


def sweep_sheet(sweep: Sweep) -> np.ndarray:
    """A row a strength, a column a video, first, middle and last frame of each: ``[H, W, 3]`` uint8."""
    labels = [f"{point.strength:g}{' (best)' if point is sweep.best else ''}" for point in sweep.points]
    prompts = [prompt for prompt, _ in sweep.config.videos[: len(sweep.base.shown)]]
    return contact_sheet([point.shown for point in sweep.points], labels, prompts)
