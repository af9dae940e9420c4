"""Relative words: what a reward gains when a wanted phrase, and not an unwanted one, stands before the prompt.

Semantic Relative Preference Optimization (SRPO, arXiv 2509.06942): whatever a reward likes of any picture, such as
colours or an artefact that fools it, is in both scores and falls out of their difference, gradient included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .protocol import Reward


@dataclass(frozen=True)
class Words:
    """Two phrases to compare.

    Attributes:
        positive: What the videos shall have more of, such as ``Realistic photo``; empty is the prompt as it is.
        negative: What they shall have less of, such as ``CG Render``; empty is the prompt as it is.
    """

    positive: str = ""
    negative: str = ""

    def __bool__(self) -> bool:
        return bool(self.positive or self.negative)

    def spell(self) -> str:
        """As options of a reward are written."""
        return ", ".join(f"{name}={text}" for name, text in vars(self).items() if text)


class Relative:
    """A reward of a difference: ``score(positive. prompt) - score(negative. prompt)``.

    Judging costs twice the time. The scale is that of the difference, around 0.

    Args:
        reward: Reads the prompt.
        words: At least one phrase.

    Raises:
        ValueError: A reward that does not read the prompt, or phrases that are the same.
    """

    def __init__(self, reward: Reward, words: Words) -> None:
        if "prompt" not in reward.needs:
            raise ValueError(
                f"{reward.name} does not read the prompt, so the words {words.spell()} would change nothing; "
                "leave them out, or take a reward that reads it, such as hps_v2.1"
            )
        if words.positive == words.negative:
            raise ValueError(f"positive and negative must be different words, got {words.positive!r} for both")
        self.reward, self.words = reward, words
        self.name = f"{reward.name}[{words.spell()}]"
        self.differentiable, self.needs = reward.differentiable, reward.needs
        self.per_frame = getattr(reward, "per_frame", True)

    def score(self, frames: Tensor, prompts: Sequence[str], *, reference: Tensor | None = None) -> Tensor:
        """See :class:`.protocol.Reward`."""
        wanted, unwanted = (
            self.reward.score(frames, [f"{phrase}. {prompt}" if phrase else prompt for prompt in prompts],
                              reference=reference)
            for phrase in (self.words.positive, self.words.negative)
        )  # fmt: skip
        return wanted - unwanted

    def to(self, device: torch.device | str) -> Relative:
        """Move the reward, if it can be moved; returns itself."""
        if hasattr(self.reward, "to"):
            self.reward.to(device)
        return self
