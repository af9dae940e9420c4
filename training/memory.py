"""How a step is fitted into the memory there is: four plans, each slower and smaller than the one before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from ..reward_models.protocol import Reward
from ..video_models.protocol import Tick, VideoModel

MemoryChoice = Literal["auto", "fast", "balanced", "small", "offload"]

LARGE = 200_000_000
"""Parameters of a network from which ``auto`` checkpoints its blocks."""


@dataclass(frozen=True)
class MemoryPlan:
    """One way to make a step. All give the same gradient, but for rounding.

    Attributes:
        name: As the setting ``memory`` calls it.
        checkpoint_blocks: In the replay, keep each block's input alone and compute the rest again.
        checkpoint_vae: The same in the VAE's decoder, while the judge takes its gradient; and of what it carries from
            chunk to chunk, keep every n-th boundary alone and compute the rest again (:func:`.decoding.sparse`).
        batched_guidance: Both guidance branches in one call of the rollout. (The replay takes them one by one.)
        swap: Have on the device only what a phase needs: the denoiser to walk, VAE and reward to judge.
        offload: The frozen weights of the denoiser's blocks stay in main memory and visit the device one by one,
            the next on its way while one works.
    """

    name: str
    checkpoint_blocks: bool
    checkpoint_vae: bool
    batched_guidance: bool
    swap: bool
    offload: bool = False


PLANS = (
    MemoryPlan("fast", False, False, True, False),
    MemoryPlan("balanced", True, False, True, False),
    MemoryPlan("small", True, True, False, True),
    MemoryPlan("offload", True, True, False, True, offload=True),
)


def plan_for(choice: str, model: VideoModel) -> MemoryPlan:
    """The plan called ``choice``; ``auto`` is fast for a small model and balanced for a large one.

    Raises:
        ValueError: No such plan.
    """
    if choice not in get_args(MemoryChoice):
        raise ValueError(f"memory must be one of {', '.join(get_args(MemoryChoice))}, got {choice!r}")
    if choice == "auto":
        largest = max(sum(p.numel() for p in network.parameters()) for network in model.denoisers.values())
        choice = "balanced" if largest >= LARGE else "fast"
    return next(plan for plan in PLANS if plan.name == choice)


def smaller(plan: MemoryPlan) -> MemoryPlan | None:
    """The next smaller plan, or None."""
    index = PLANS.index(plan) + 1
    return PLANS[index] if index < len(PLANS) else None


def peak_memory(device: torch.device) -> int:
    """Bytes that were used at most on a GPU, or resident bytes of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import psutil

    return psutil.Process().memory_info().rss


def free_memory(device: torch.device | str) -> int:
    """Bytes that a run may use: free ones of a GPU, available ones of main memory."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available


class Placement:
    """A tick that first brings to the device what the phase needs, and takes away what it does not.

    The text encoder leaves as soon as anything else begins. VAE and reward, and the denoiser, make room for each
    other where the plan says so.

    Args:
        model: Works in turn with the reward.
        reward: May be None.
        tick: Called once everything is in place.
        plan: May be replaced between steps.
        device: Where work is done.
        rest: Where the others wait; where everything is after :meth:`clear`.
    """

    def __init__(
        self,
        model: VideoModel,
        reward: Reward | None,
        tick: Tick,
        plan: MemoryPlan,
        device: torch.device,
        rest: torch.device | str = "cpu",
    ) -> None:
        self.plan = plan
        self._model, self._reward, self._tick, self._device, self._rest = model, reward, tick, device, rest
        self._here = {"text", "denoiser", "judge"} if model.device == device else set()

    def __call__(self, phase: str) -> None:
        needed = {"text": "text", "decode": "judge", "reward": "judge"}.get(phase, "denoiser")
        together = {needed} if self.plan.swap or needed == "text" else {"denoiser", "judge"}
        leaving = {"text"} - {needed} | ({"denoiser", "judge"} - {needed} if self.plan.swap else set())
        for part in sorted(self._here & leaving):
            self._move(part, self._rest)
        for part in sorted(together - self._here):
            self._move(part, self._device)
        self._here = self._here - leaving | together
        self._tick(phase)

    def clear(self) -> None:
        """Everything to where it rests."""
        for part in sorted(self._here):
            self._move(part, self._rest)
        self._here.clear()

    def _move(self, part: str, device: torch.device | str) -> None:
        self._model.to(device, "vae" if part == "judge" else part)
        if part == "judge" and hasattr(self._reward, "to"):
            self._reward.to(device)


@contextmanager
def checkpointed_blocks(model: VideoModel, on: bool) -> Iterator[None]:
    """Checkpoint the blocks of every denoiser for the length of a ``with`` statement."""
    switched = [network for network in model.denoisers.values() if on and not _is_on(network)]
    try:
        for network in switched:
            network.enable_gradient_checkpointing()
        yield
    finally:
        for network in switched:
            network.disable_gradient_checkpointing()


def _is_on(network: torch.nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in network.modules())
