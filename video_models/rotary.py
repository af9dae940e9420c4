"""Rotary position tables of video transformers, as they were trained: the grid leaves out its end point.

Newer diffusers spaces the same grid otherwise, so its tables differ wherever the crop does not start at 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

THETA = 10000.0


def centre_crop(height: int, width: int, base_height: int, base_width: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Where a picture lies on the base grid when it is fitted into it: ``(top, left), (bottom, right)``."""
    if height / width > base_height / base_width:
        fitted = base_height, round(base_height / height * width)
    else:
        fitted = round(base_width / width * height), base_width
    top, left = (round((base - size) / 2) for base, size in zip((base_height, base_width), fitted, strict=True))
    return (top, left), (top + fitted[0], left + fitted[1])


def rotary_tables(
    head_dim: int, size: tuple[int, int, int], base: tuple[int, int], device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[t * h * w, head_dim]`` float32, time slowest; a quarter of the channels for time.

    As VideoX-Fun's ``get_3d_rotary_pos_embed``.

    Args:
        head_dim: Channels of an attention head, a multiple of 16.
        size: Patches ``(t, h, w)``.
        base: Patches ``(h, w)`` of the size the model was trained for.
        device: Where the tables are wanted.
    """
    start, stop = centre_crop(*size[1:], *base)
    spans = [(0, size[0], head_dim // 4), *((a, b, head_dim // 8 * 3) for a, b in zip(start, stop, strict=True))]
    angles = []
    for axis, (first, last, channels) in enumerate(spans):
        steps = torch.arange(size[axis], dtype=torch.float64)
        positions = (first + steps * ((last - first) / size[axis])).float()
        frequencies = 1.0 / THETA ** (torch.arange(0, channels, 2, dtype=torch.float32) / channels)
        shape = [1, 1, 1, channels]
        shape[axis] = size[axis]
        angle = torch.outer(positions, frequencies).repeat_interleave(2, dim=1)
        angles.append(angle.to(device).view(shape).expand(*size, channels))
    joined = torch.cat(angles, dim=-1).flatten(0, 2)
    return joined.cos(), joined.sin()
