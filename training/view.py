"""What of a video the reward gets to see: which latents are decoded, which of their frames count, and how much."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..reward_models.protocol import Reward
from ..video_models.protocol import VideoModel
from .seeds import seed_for

FrameChoice = Literal["even", "random"]
LatentChoice = Literal["first", "random"]


@dataclass(frozen=True)
class View:
    """What of a video the reward gets to see.

    Attributes:
        latents: How many latent frames the judged frames come from; 0 is all.
        frames: How many of their frames the reward sees; 0 is all.
        choice: ``even``: spread evenly, first and last included; ``random``: drawn anew at every step, so that
            all frames are seen in time.
        save_memory: Checkpoint the blocks of the VAE's decoder while the gradient is taken, and keep what it carries
            at every n-th boundary alone (:func:`.decoding.sparse`).
        seed: Of all chance in it.
        augment: How many random views of these frames (:mod:`.augment`) the reward is averaged over; 0 is the frames
            themselves.
        latent_choice: ``first``: from the first latent frame on; ``random``: any, drawn anew at every step. A causal
            decoder needs all latents before the last one drawn: they are decoded and have their part in the gradient,
            which is exact; those behind it are not decoded.
        weights: Of the gradients at the frames, from the video's first frame to its last: spread evenly over it, with
            straight lines between them, and brought to a mean of 1. Empty is 1 everywhere.
    """

    latents: int = 1
    frames: int = 0
    choice: FrameChoice = "even"
    save_memory: bool = False
    seed: int = 0
    augment: int = 0
    latent_choice: LatentChoice = "first"
    weights: tuple[float, ...] = ()

    @property
    def several(self) -> bool:
        """Whether it holds more than one frame, of a video that has them, so that motion can be seen in it."""
        return self.latents != 1 and self.frames != 1

    def pick(self, total: int) -> list[int]:
        """Indices of the frames to see, ascending, of ``total`` in question."""
        if self.frames <= 0 or self.frames >= total:
            return list(range(total))
        if self.choice == "random":
            return sorted(random.Random(self.seed).sample(range(total), self.frames))
        return torch.linspace(0, total - 1, self.frames).long().tolist()

    def draw(self, total: int) -> list[int]:
        """Indices of the latent frames to see, ascending, of ``total``."""
        count = min(self.latents, total) or total
        if self.latent_choice == "random":
            return sorted(random.Random(seed_for("latents", self.seed)).sample(range(total), count))
        return list(range(count))

    def part(self, model: VideoModel, latents: Tensor) -> Tensor:
        """Those of the latents ``[B, C, t, h, w]`` that must be decoded, from the first on."""
        total = latents.shape[2]
        last = self.draw(total)[-1]
        if self.latent_choice == "first":
            return latents[:, :, : last + 1]
        ends = list(accumulate(model.chunks(total)))  # whole chunks, for these are the clip's own
        return latents[:, :, : ends[bisect_right(ends, last)]]

    def shown(self, model: VideoModel, total: int, decoded: int) -> tuple[list[int], Tensor | None]:
        """Which frames the reward sees, and how much each counts.

        Args:
            model: Whose latents they are.
            total: Latent frames of the video.
            decoded: Frames that :meth:`part` became.

        Returns:
            Indices among the decoded frames, ascending, and their weights ``[T]``; None where all are 1.
        """
        if self.latent_choice == "first":
            shown = self.pick(decoded)
            return shown, self._weights(decoded, shown)
        start = model.spec.frames_of
        drawn = [frame for i in self.draw(total) for frame in range(start(i), min(start(i + 1), decoded))]
        shown = [drawn[i] for i in self.pick(len(drawn))]
        return shown, self._weights(max(start(total), decoded), shown)

    def _weights(self, frames: int, shown: Sequence[int]) -> Tensor | None:
        if len(set(self.weights)) < 2 or frames == 1:
            return None
        points = torch.tensor(self.weights, dtype=torch.float64)[None, None]
        along = F.interpolate(points, frames, mode="linear", align_corners=True)[0, 0]
        return (along / along.mean())[list(shown)]

    def check(self, reward: Reward) -> None:
        """Raise ``ValueError`` if single frames are to be weighed for a reward that judges none."""
        if self.weights and not getattr(reward, "per_frame", True):
            raise ValueError(
                f"judged_weights weigh frames that are judged one by one, and the reward {reward.name} judges what "
                "happens between them; leave judged_weights empty"
            )
