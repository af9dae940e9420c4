"""Several processes, one LoRA: each samples its own prompts and noise, and gradients are averaged step by step.

Start them with ``torchrun --nproc-per-node N -m reward_lora.cli train ...``. The frozen model is whole in every
process; only the LoRA's gradients travel.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from .events import TrainingStopped

PATIENCE = timedelta(hours=6)
"""How long a process waits for the others; the first one evaluates and saves while they do."""


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
        like = parameters[0]
        flat = [(p.grad if counts and p.grad is not None else torch.zeros_like(p)).flatten() for p in parameters]
        total = torch.cat([*flat, like.new_tensor([float(counts)])])
        with _together():
            torch.distributed.all_reduce(total)
        count = int(total[-1])
        parts = (total[:-1] / max(1, count)).split([p.numel() for p in parameters])
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


@contextmanager
def _together() -> Iterator[None]:
    """Around what all processes do: the end of another one is the end of the run."""
    try:
        yield
    except RuntimeError as error:
        raise TrainingStopped(
            f"another process of this run has ended ({str(error).splitlines()[0]}); "
            "what was learned is saved: start the same command again to go on"
        ) from None


@contextmanager
def joined(device: str) -> Iterator[Group]:
    """The group that torchrun started this process in; a group of one without it.

    Args:
        device: Where this process computes: ``cuda:<LOCAL_RANK>`` with several GPUs; decides on NCCL or Gloo.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Group()
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    backend = "nccl" if device.startswith("cuda") else "gloo"
    torch.distributed.init_process_group(backend, timeout=PATIENCE)
    try:
        yield Group(torch.distributed.get_rank(), size)
    finally:
        torch.distributed.destroy_process_group()
