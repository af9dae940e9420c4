"""Differentiable image preprocessing for judges. Bicubic, antialiased, not clamped, as torchvision's on tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """``[N, 3, H, W]`` to ``[N, 3, height, width]``."""
    if images.shape[-2:] == (height, width):
        return images
    return F.interpolate(images, (height, width), mode="bicubic", antialias=True, align_corners=False)


def resize_and_crop(images: Tensor, size: int) -> Tensor:
    """Short side to ``size`` keeping the aspect, then the centre ``size x size``."""
    height, width = images.shape[-2:]
    if height <= width:
        images = resize(images, size, int(size * width / height))
    else:
        images = resize(images, int(size * height / width), size)
    top, left = (round((n - size) / 2) for n in images.shape[-2:])
    return images[..., top : top + size, left : left + size]


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """``(x - mean) / std`` a channel."""
    shape = (1, -1, 1, 1)
    return (images - torch.tensor(mean).view(shape).to(images)) / torch.tensor(std).view(shape).to(images)
