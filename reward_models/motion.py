"""How much moves in a clip, without any network: guards against rewards that are raised by standing still.

Neither says whether the motion is right; a shaking camera scores as well as a dance. Both are meant to be compared with
what the model without the LoRA gives for the same prompts and seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .files import Request, RewardEntry
from .preprocess import unit_range
from .scoring import check_clips

SHORT_SIDE = 64
WINDOW = 8
LUMA = (0.299, 0.587, 0.114)
HALFWAY = 6 / 256
"""Speed, in short sides a frame, from which VBench (arXiv 2311.17982) calls a clip dynamic."""
NOISE = (2 / 255) ** 2
"""Square of the slope, in brightness a pixel, under which a window is flat and its noise no motion."""
FASTEST = 0.05
"""Share of the windows that counts, as in VBench."""


def mean_squared_difference(frames: Tensor) -> Tensor:
    """``[B, 3, T, H, W]`` to ``[B]``: mean of ``(x[t + 1] - x[t])^2`` over times, colours and pixels; 0..1.

    0 for a still clip; 0.001 to 0.02 for ordinary ones. Flicker and noise count as motion.
    """
    differences = frames[:, :, 1:] - frames[:, :, :-1]
    if not differences.shape[2]:
        return frames.flatten(1)[:, 0] * 0
    return differences.square().flatten(1).mean(1)


def dynamic_degree(frames: Tensor) -> Tensor:
    """``[B, 3, T, H, W]`` to ``[B]``: how fast the fastest parts move, 0 (still) to 1.

    Brightness constancy (Horn and Schunck, 1981) ties a speed v to the brightness I of a window:
    ``v^2 = var(dI/dt) / (mean |grad I|^2 + noise)``; the variance leaves out flicker. Clips are shrunk to
    a short side of 64 pixels, windows are 8x8 (smaller clips: all of it that fits), v is in short sides a frame, and a
    window's degree is ``v^2 / (v^2 + (6/256)^2)``, 0.5 where VBench's optical flow calls a clip dynamic. The score is
    the mean over the times of the mean over the fastest 5 % of the windows. It has no square root and no flow network,
    so its gradient is finite everywhere. Speeds beyond the size of the moving details are underestimated.
    """
    batch, _, count, height, width = frames.shape
    if count == 1:
        return frames.flatten(1)[:, 0] * 0
    weights = torch.tensor(LUMA).to(frames)
    light = torch.einsum("bcthw,c->bthw", frames, weights).flatten(0, 1)[:, None]
    scale = min(1.0, SHORT_SIDE / min(height, width))
    if scale < 1:
        size = (round(height * scale), round(width * scale))
        light = F.interpolate(light, size, mode="bilinear", antialias=True)
    light = light.view(batch, count, *light.shape[-2:])
    middle = F.pad((light[:, 1:] + light[:, :-1]) / 2, (1, 1, 1, 1), mode="replicate")
    slope_x = (middle[..., 1:-1, 2:] - middle[..., 1:-1, :-2]) / 2
    slope_y = (middle[..., 2:, 1:-1] - middle[..., :-2, 1:-1]) / 2
    change = light[:, 1:] - light[:, :-1]
    short = min(light.shape[-2:])
    window = min(WINDOW, short)
    moved = _windows(change, window).var(-1, unbiased=False)
    slope = _windows(slope_x.square() + slope_y.square(), window).mean(-1) + NOISE
    degrees = moved / (moved + slope * (HALFWAY * short) ** 2)
    fastest = degrees.topk(max(1, round(FASTEST * degrees.shape[2])), dim=2).values
    return fastest.mean((1, 2))


def _windows(maps: Tensor, size: int) -> Tensor:
    """``[B, T, H, W]`` to ``[B, T, windows, size * size]``; what does not fill a window is left out."""
    rows, columns = (n // size for n in maps.shape[-2:])
    maps = maps[..., : rows * size, : columns * size]
    return maps.unflatten(-2, (rows, size)).unflatten(-1, (columns, size)).transpose(-3, -2).flatten(-2).flatten(2, 3)


class Motion:
    """A measure of motion as a reward. See :class:`.protocol.Reward`."""

    differentiable = True
    needs: frozenset[str] = frozenset()
    per_frame = False

    def __init__(self, measure: Callable[[Tensor], Tensor], name: str) -> None:
        self.measure, self.name = measure, name

    def score(self, frames: Tensor, prompts: Sequence[str], *, reference: Tensor | None = None) -> Tensor:
        """Clips one after the other, where they lie; a single frame has no motion and scores 0."""
        check_clips(frames, prompts)
        return torch.cat([self.measure(unit_range(clip)) for clip in frames.split(1)])

    def to(self, device: torch.device | str) -> Motion:
        """Nothing to move; returns itself."""
        return self


def _load(request: Request) -> Motion:
    measure = mean_squared_difference if request.name == "motion" else dynamic_degree
    return Motion(measure, request.name)


ENTRIES = {
    "motion": RewardEntry(_load, "Motion: mean squared difference of neighbouring frames (0..1); a guard"),
    "dynamic_degree": RewardEntry(_load, "Motion: speed of the fastest parts, 0..1, by brightness constancy; a guard"),
}
