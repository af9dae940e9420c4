"""Views of the judged frames: small random changes that a good video survives and an adversarial pattern does not.

A judge that sees only one rendering of the frames can be pleased by a texture that means nothing to a person. The
gradient averaged over several random views (crop and resize, rotation, colour, noise, missing patches) favours what
pleases it in all of them, as expectation over transformation does (Athalye et al., arXiv 1707.07397).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

ZOOM = 0.15
"""The largest share of the width and height that a crop leaves out."""
ROTATION = math.radians(5)
JITTER = 0.1
"""Largest relative change of contrast and saturation, and absolute change of brightness."""
NOISE = 0.02
"""Standard deviation."""
DROPOUT = 0.1
"""Share of the patches that are covered by the clip's mean colour."""
PATCHES = 8
"""Patches along the shorter side."""


def augmented(frames: Tensor, seed: int) -> Tensor:
    """A random view of every clip, differentiable; the same crop, colours and patches in all frames of a clip.

    Args:
        frames: ``[B, 3, T, H, W]`` in 0..1.
        seed: The only source of chance, whatever the device.

    Returns:
        Frames of the same shape in 0..1. The last clamp passes gradients on as if it were not there.
    """
    generator = torch.Generator().manual_seed(seed)
    batch, _, count, height, width = frames.shape

    def draw(*shape: int) -> Tensor:
        """Uniform in -1..1."""
        return (torch.rand(shape, generator=generator) * 2 - 1).to(frames)

    zoom = 1 - ZOOM * draw(batch).abs()
    shift = (1 - zoom)[:, None] * draw(batch, 2)  # the crop stays inside
    angle = ROTATION * draw(batch)
    brightness, contrast, saturation = (JITTER * draw(3, batch)).view(3, batch, 1, 1, 1, 1)
    hidden = _patches(draw, batch, height, width) < 2 * DROPOUT - 1

    view = _crop(frames, zoom, shift, angle)
    gray = view.mean(1, keepdim=True)
    view = gray + (1 + saturation) * (view - gray)
    mean = view.mean((1, 2, 3, 4), keepdim=True)
    view = mean + (1 + contrast) * (view - mean) + brightness
    view = torch.where(hidden, view.mean((2, 3, 4), keepdim=True), view)
    view = view + NOISE * torch.randn(view.shape, generator=generator).to(view)
    return view + (view.clamp(0, 1) - view).detach()


def _patches(draw, batch: int, height: int, width: int) -> Tensor:
    """Uniform numbers in -1..1, one a patch, ``[B, 1, 1, H, W]``."""
    size = max(1, min(height, width) // PATCHES)
    numbers = draw(batch, 1, -(-height // size), -(-width // size))
    whole = numbers.repeat_interleave(size, 2).repeat_interleave(size, 3)
    return whole[:, :, None, :height, :width]


def _crop(frames: Tensor, zoom: Tensor, shift: Tensor, angle: Tensor) -> Tensor:
    """Turn, crop and resize back to the same size; what lies beyond the edge is mirrored."""
    batch, channels, count, height, width = frames.shape
    cos, sin, aspect = angle.cos() * zoom, angle.sin() * zoom, width / height
    rows = (torch.stack([cos, -sin / aspect, shift[:, 0]], 1), torch.stack([sin * aspect, cos, shift[:, 1]], 1))
    grid = F.affine_grid(torch.stack(rows, 1), [batch, 1, height, width], align_corners=False)
    images = frames.transpose(1, 2).flatten(0, 1)
    moved = F.grid_sample(images, grid.repeat_interleave(count, 0), padding_mode="reflection", align_corners=False)
    return moved.view(batch, count, channels, height, width).transpose(1, 2)
