"""Two sets of videos of the same prompts: is one better? And pictures of scores for a person to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from ..garbage import garbage_freed
from .media import figure_pixels, to_uint8

RESAMPLES = 10_000
CONFIDENCE = 0.95
ENOUGH = 6
"""Of fewer pairs, chance alone puts all on one side in more than 3 % of cases, so nothing is claimed of them."""
FOR, AGAINST, PLAIN = "#2a7ab9", "#d1603d", "#444444"


@dataclass(frozen=True)
class PairedDifference:
    """How much better B is than A, pair by pair.

    Attributes:
        a: Scores of A.
        b: Scores of B, one for each of A.
        mean: Of ``b - a``.
        low: Lower end of the interval of that mean.
        high: Upper end.
    """

    a: tuple[float, ...] = field(repr=False)
    b: tuple[float, ...] = field(repr=False)
    mean: float
    low: float
    high: float

    @property
    def differences(self) -> np.ndarray:
        return np.subtract(self.b, self.a)

    @property
    def verdict(self) -> str:
        """In a few words."""
        if len(self.a) < ENOUGH:
            return f"{len(self.a)} pairs are too few to tell"
        return "B is better" if self.low > 0 else "A is better" if self.high < 0 else "no difference shown"

    def describe(self, reward: str) -> str:
        """In a sentence."""
        count, wins = len(self.a), int((self.differences > 0).sum())
        return (
            f"{reward}: {self.verdict}; A {np.mean(self.a):.4f}, B {np.mean(self.b):.4f}, B - A {self.mean:+.4f} "
            f"({CONFIDENCE:.0%} interval {self.low:+.4f} to {self.high:+.4f}); B ahead in {wins} of {count} pairs"
        )


def paired_difference(a: Sequence[float], b: Sequence[float]) -> PairedDifference:
    """Mean of ``b - a`` with its percentile bootstrap interval: pairs are drawn anew :data:`RESAMPLES` times.

    The same numbers give the same interval.

    Raises:
        ValueError: Not as many of both, fewer than two, or numbers that are not finite.
    """
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"a comparison needs at least 2 pairs, and as many of B as of A; got {len(a)} and {len(b)}")
    if not np.isfinite([*a, *b]).all():
        raise ValueError("a score is not a finite number, so the two sets cannot be compared")
    differences = np.subtract(b, a, dtype=np.float64)
    count, generator, means = len(differences), np.random.default_rng(0), []
    for part in np.array_split(np.arange(RESAMPLES), 1 + RESAMPLES * count // 10**7):  # at most 80 MB of indices
        means.append(differences[generator.integers(0, count, (len(part), count))].mean(1))
    low, high = np.quantile(np.concatenate(means), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return PairedDifference(
        tuple(map(float, a)), tuple(map(float, b)), float(differences.mean()), float(low), float(high)
    )


@garbage_freed()
def difference_picture(result: PairedDifference, reward: str) -> np.ndarray:
    """Every pair's difference as a bar, their mean as a line, its interval as a band; ``[H, W, 3]`` uint8."""
    from matplotlib.figure import Figure

    values = np.sort(result.differences)
    figure = Figure(figsize=(6.2, 3.6), dpi=150)
    axes = figure.subplots()
    places = np.arange(1, len(values) + 1)
    axes.bar(places, values, color=[FOR if value > 0 else AGAINST for value in values], width=0.8)
    axes.axhspan(result.low, result.high, color=PLAIN, alpha=0.18, label=f"{CONFIDENCE:.0%} interval of the mean")
    axes.axhline(result.mean, color=PLAIN, linewidth=1.6, label=f"mean {result.mean:+.4f}")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlabel(f"pairs, sorted ({len(values)})")
    axes.set_ylabel("B - A")
    axes.set_xticks([])
    axes.set_title(f"{_shortened(reward)}: {result.verdict}", fontsize=12)
    axes.grid(axis="y", alpha=0.25)
    axes.legend(loc="best", fontsize=9)
    figure.tight_layout()
    return figure_pixels(figure)


@garbage_freed()
def frame_picture(columns: Mapping[str, Sequence[float]], clip: Mapping[str, float]) -> np.ndarray:
    """Scores over the frames, a panel a column.

    Args:
        columns: Name to one score a frame, or to none; the first is the reward, the others are its terms.
        clip: The score of the whole clip, by the same names: a dashed line.

    Returns:
        ``[H, W, 3]`` uint8.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, NullLocator

    figure = Figure(figsize=(6.2, 0.7 + 2.1 * len(columns)), dpi=150)
    panels = figure.subplots(len(columns), 1, squeeze=False, sharex=True)[:, 0]
    for index, (axes, (name, values)) in enumerate(zip(panels, columns.items(), strict=True)):
        places = range(1, len(values) + 1)
        axes.plot(places, values, color=PLAIN if index else FOR, marker="o", markersize=4 if len(values) < 50 else 2)
        axes.axhline(clip[name], color=PLAIN, linestyle="--", linewidth=1)
        axes.set_title(f"{_shortened(name)}   whole clip {clip[name]:.4f}", fontsize=11, loc="left")
        axes.grid(alpha=0.25)
        axes.margins(y=0.15)
    panels[-1].set_xlabel("frame" if any(columns.values()) else "no scores of single frames")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True) if any(columns.values()) else NullLocator())
    figure.tight_layout()
    return figure_pixels(figure)


@garbage_freed()
def ranking_picture(clips: Sequence[Tensor], scores: Sequence[float], order: Sequence[int], reward: str) -> np.ndarray:
    """First, middle and last frame of every clip, best first, with place, number and score.

    Args:
        clips: Each ``[3, T, H, W]``.
        scores: One a clip.
        order: Indices of clips, best first.
        reward: Its name.

    Returns:
        ``[H, W, 3]`` uint8.
    """
    from matplotlib.figure import Figure

    columns = len(order) if len(order) < 3 else 2 if len(order) == 4 else 3
    rows = -(-len(order) // columns)
    strips = []
    for index in order:
        images = to_uint8(clips[index][:, sorted({0, clips[index].shape[1] // 2, clips[index].shape[1] - 1})])
        gap = max(1, images.shape[2] // 40)  # a white line between the frames
        strips.append(
            np.concatenate(list(np.pad(images, ((0, 0), (0, 0), (0, gap), (0, 0)), constant_values=255)), axis=1)[
                :, :-gap
            ]
        )
    tallest = max(strip.shape[0] / strip.shape[1] for strip in strips)
    figure = Figure(figsize=(4.2 * columns, 0.5 + rows * (0.45 + 4.1 * tallest)), dpi=110)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels:
        axes.axis("off")
    for place, (axes, index, strip) in enumerate(zip(panels, order, strips, strict=False), 1):
        axes.imshow(strip, aspect="equal")
        style = {"color": FOR, "fontweight": "bold"} if place == 1 else {"color": PLAIN}
        axes.set_title(f"{place}.   clip {index + 1}   {scores[index]:.4f}", fontsize=14, **style)
    figure.suptitle(_shortened(reward), fontsize=13)
    figure.tight_layout()
    return figure_pixels(figure)


def _shortened(name: str, length: int = 70) -> str:
    return name if len(name) <= length else name[: length - 3] + "..."
