"""The optimisers of the two transformers: Muon for the matrices of their blocks, AdamW for the rest."""

from collections.abc import Callable, Iterable

import torch
from torch import nn


def create(blocks: Iterable[nn.Module], model: nn.Module, rate: float, muon_rate: float) -> list[torch.optim.Optimizer]:
    """Create the optimisers.

    On these models Muon (Jordan et al. 2024; `torch.optim.Muon`) reaches a loss in about two
    thirds of AdamW's steps, at equal time per step.

    Args:
        blocks: transformer blocks of `model`, whose matrices Muon orthogonalises.
        model: everything to train.
        rate: AdamW's learning rate.
        muon_rate: Muon's, scaled to AdamW's size of update.

    Raises:
        RuntimeError: PyTorch is older than 2.9. Only building needs Muon; the built models load without it.
    """
    if not hasattr(torch.optim, "Muon"):
        raise RuntimeError(f"building the tiny models needs torch 2.9 or newer, this is {torch.__version__}")
    matrices = [p for block in blocks for p in block.parameters() if p.dim() == 2]
    inside = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in inside]
    return [
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=1e-2),
        torch.optim.Muon(
            matrices, lr=muon_rate, weight_decay=1e-2, momentum=0.95, ns_steps=5, adjust_lr_fn="match_rms_adamw"
        ),
    ]


def pacing(steps: int) -> Callable[[int], float]:
    """The learning rate's course: 100 steps of warm-up, hold, and a linear fall over the last 40 %."""
    return lambda step: min(1.0, (step + 1) / 100, 0.02 + 0.98 * (steps - step) / (0.4 * steps))


def update(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    schedules: list[torch.optim.lr_scheduler.LRScheduler],
    loss: torch.Tensor,
) -> None:
    """One optimiser step with the gradient's norm clipped to 1."""
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer, schedule in zip(optimizers, schedules, strict=True):
        optimizer.step()
        schedule.step()
