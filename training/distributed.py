"""Several processes, one LoRA: each samples its own prompts and noise, and gradients are averaged step by step.

Start them with ``reward-lora train --devices N`` (:mod:`.workers`), or ``torchrun --nproc-per-node N -m reward_lora.cli
train ...``. The frozen model is whole in every process, and only the LoRA's gradients travel, unless it is divided
among them (:mod:`.sharding`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .events import TrainingStopped

PATIENCE = timedelta(hours=6)
"""How long a process waits for the others; the first one evaluates and saves while they do."""

_TRANSPORT = re.compile(r"gloo/|NCCL")
"""In the messages of both."""

T = TypeVar("T")


class PeerLost(TrainingStopped):
    """Another process of the run has ended, so this one cannot go on."""


@dataclass(frozen=True)
class Group:
    """The processes of a run.

    Attributes:
        rank: Of this one.
        size: How many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes files and speaks to the user."""
        return self.rank == 0

    def share(self, parameters: Iterable[Tensor]) -> None:
        """Give every process the first one's values."""
        if self.size > 1:
            with _together():
                for parameter in parameters:
                    torch.distributed.broadcast(parameter.data, src=0)

    def average(self, parameters: Iterable[nn.Parameter], counts: bool) -> int:
        """Average gradients in place over the processes that have one.

        Args:
            parameters: In the same order everywhere; a missing gradient is zero.
            counts: Whether this process has a gradient; one that could not be judged contributes nothing.

        Returns:
            How many processes had one; with none, the gradients are zero.
        """
        parameters = list(parameters)
        if self.size == 1:
            return int(counts)
        # By Gloo, which notices a process that is gone; NCCL, which carries the gradients, would wait for it.
        count = sum(self.gather(counts))
        total = torch.cat(
            [(p.grad if counts and p.grad is not None else torch.zeros_like(p)).flatten() for p in parameters]
        )
        with _together():
            torch.distributed.all_reduce(total)
        parts = (total / max(1, count)).split([p.numel() for p in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter).clone()
        return count

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, by rank, in every process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _together():
            torch.distributed.all_gather_object(values, value)
        return values

    def in_turn(self, make: Callable[[], T], *, one_by_one: bool = False) -> T:
        """What ``make`` gives, made by the first process before all others: it may fetch files that they then find.

        Args:
            make: Called once in every process.
            one_by_one: Let the others take turns too, so that only one at a time needs the memory of making it.
        """
        made = None
        for turn in range(self.size if one_by_one else min(2, self.size)):
            if turn == (self.rank if one_by_one else min(1, self.rank)):
                made = make()
            self.gather(None)
        return made


@contextmanager
def _together() -> Iterator[None]:
    """Around what all processes do: the end of another one is the end of the run."""
    try:
        yield
    except RuntimeError as error:
        raise _alone(error) from None


@contextmanager
def told_when_alone() -> Iterator[None]:
    """Around a whole run, whose networks may be shared too: raises :class:`PeerLost` when another process has ended."""
    try:
        yield
    except TrainingStopped:
        raise
    except RuntimeError as error:
        if not _TRANSPORT.search(str(error)):
            raise
        raise _alone(error) from None


def _alone(error: RuntimeError) -> PeerLost:
    return PeerLost(
        f"another process of this run has ended ({str(error).splitlines()[0]}); "
        "what was learned is saved: start the same command again to go on"
    )


@contextmanager
def joined(device: str) -> Iterator[Group]:
    """The group that torchrun, or :mod:`.workers`, started this process in; a group of one without it.

    Args:
        device: Where this process computes: ``cuda:<LOCAL_RANK>`` with several GPUs. There tensors travel by NCCL, and
            what lies on the CPU by Gloo; where PyTorch has no NCCL (Windows) all do by Gloo.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Group()
        return
    backend = "gloo"
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if torch.distributed.is_nccl_available() else "gloo"
    torch.distributed.init_process_group(backend, timeout=PATIENCE)
    try:
        yield Group(torch.distributed.get_rank(), size)
    finally:
        torch.distributed.destroy_process_group()


def own_device(device: str) -> str:
    """The GPU of this process among several started together: the one of its number; any other device as given."""
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return device
