"""A clip judged for a person to read: as a whole, frame by frame, and by every term of a mixture."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .protocol import Reward

FRAMES_AT_ONCE = 16


@dataclass(frozen=True)
class Scored:
    """What a reward said of a clip.

    Attributes:
        clip: Of the whole clip, by column: the reward's name, then, for a mixture, its terms.
        frames: The same columns for every frame as a picture of its own; empty if nobody asked, or if the reward
            says ``per_frame = False`` because it judges what happens between frames.
    """

    clip: dict[str, float]
    frames: dict[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def score(self) -> float:
        return next(iter(self.clip.values()))


@torch.no_grad()
def score_clip(
    reward: Reward,
    frames: Tensor,
    prompt: str,
    *,
    reference: Tensor | None = None,
    every_frame: bool = False,
    tick: Callable[[str], None] = lambda phase: None,
) -> Scored:
    """Score a clip, and on request every frame of it.

    Args:
        reward: Any; one that trains nothing will do.
        frames: ``[1, 3, T, H, W]`` in 0..1.
        prompt: What the clip should show.
        reference: ``[1, 3, T, H, W]`` if the reward needs one.
        every_frame: Also score every frame by itself, :data:`FRAMES_AT_ONCE` in a batch.
        tick: Called before every batch; may raise to stop.

    Raises:
        ValueError: The reward needs a prompt or a reference that is not given.
    """
    if "prompt" in reward.needs and not prompt.strip():
        raise ValueError(f"the reward {reward.name} needs a prompt; write what the frames should show")
    if "reference" in reward.needs and reference is None:
        raise ValueError(f"the reward {reward.name} needs a reference; give a picture or clip of what it should match")
    tick("reward")
    clip = {name: float(values) for name, values in _columns(reward, frames, [prompt], reference).items()}
    count = frames.shape[2]
    if not every_frame or not getattr(reward, "per_frame", True):
        return Scored(clip)
    if count == 1:
        return Scored(clip, {name: (value,) for name, value in clip.items()})
    pictures = frames[0].transpose(0, 1)[:, :, None]  # [T, 3, 1, H, W]
    columns: dict[str, list[float]] = {name: [] for name in clip}
    for part in pictures.split(FRAMES_AT_ONCE):
        tick("reward")
        alike = None if reference is None else reference.expand(len(part), -1, -1, -1, -1)
        for name, values in _columns(reward, part, [prompt] * len(part), alike).items():
            columns[name] += values.tolist()
    return Scored(clip, {name: tuple(values) for name, values in columns.items()})


def _columns(reward: Reward, frames: Tensor, prompts: list[str], reference: Tensor | None) -> dict[str, Tensor]:
    score = reward.score(frames, prompts, reference=reference)
    return {reward.name: score, **getattr(reward, "terms", {})}


def best_first(scored: Sequence[Scored]) -> list[int]:
    """Indices by score; NaN is no better than anything, and of equal ones the first comes first."""
    return sorted(range(len(scored)), key=lambda i: (math.isnan(scored[i].score), -scored[i].score))


def table(header: list[str], rows: list[list[str]]) -> str:
    """A table as text, numbers to the right: as readable in a text field as in a terminal."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    left = [not any(_is_number(row[i]) for row in rows) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        padded = (c.ljust(w) if to_left else c.rjust(w) for c, w, to_left in zip(cells, widths, left, strict=True))
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
