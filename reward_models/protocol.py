"""What every reward offers to training, nodes and the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Reward(Protocol):
    """Judges videos. One object trains a LoRA, scores a clip in a graph and ranks seeds.

    A reward may also be a plain module-level object of your own: only these members are used.

    Attributes:
        name: Short name for logs, files and plots.
        differentiable: Whether a gradient reaches the frames; only such a reward can train.
        needs: Which of ``"prompt"`` and ``"reference"`` must be given.
    """

    name: str
    differentiable: bool
    needs: frozenset[str]

    def score(self, frames: Tensor, prompts: Sequence[str], *, reference: Tensor | None = None) -> Tensor:
        """Score a batch.

        Args:
            frames: ``[B, 3, T, H, W]``, RGB, float, 0..1.
            prompts: One text a sample.
            reference: ``[B, 3, T, H, W]`` when the reward needs one.

        Returns:
            ``[B]`` float32, higher is better, on the model's published scale; a sample's score
            never depends on its neighbours in the batch.
        """
        ...
