"""Numbers as sinusoids."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sinusoids(numbers: Tensor, width: int) -> Tensor:
    """``[B, width]`` of floating-point numbers ``[B]``: cosines first, frequencies ``10000^(-i / (width / 2))``."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=numbers.dtype, device=numbers.device))
    angles = numbers[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)
