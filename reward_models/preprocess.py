"""Differentiable image preprocessing for judges: antialiased, bicubic, not clamped, as torchvision's on tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def unit_range(images: Tensor) -> Tensor:
    """Bytes 0..255 to float32 0..1; half precision to float32; other floats as they are."""
    if images.dtype == torch.uint8:
        return images.float() / 255
    return images.to(torch.promote_types(images.dtype, torch.float32))


def resize(images: Tensor, height: int, width: int, mode: str = "bicubic") -> Tensor:
    """``[N, 3, H, W]`` to ``[N, 3, height, width]``, whatever its aspect."""
    if images.shape[-2:] == (height, width):
        return images
    return F.interpolate(images, (height, width), mode=mode, antialias=True, align_corners=False)


def squash(images: Tensor, size: int, mode: str = "bicubic") -> Tensor:
    """To ``size x size``, the aspect lost (VideoX-Fun's and VADER's way)."""
    return resize(images, size, size, mode)


def resize_and_crop(images: Tensor, size: int) -> Tensor:
    """Short side to ``size`` keeping the aspect, then the centre ``size x size``."""
    height, width = images.shape[-2:]
    if height <= width:
        images = resize(images, size, int(size * width / height))
    else:
        images = resize(images, int(size * height / width), size)
    top, left = (round((n - size) / 2) for n in images.shape[-2:])
    return images[..., top : top + size, left : left + size]


def resize_and_pad(images: Tensor, size: int) -> Tensor:
    """Long side to ``size`` keeping the aspect, then black around it (the way of HPSv2's own package)."""
    scale = size / max(images.shape[-2:])
    images = resize(images, *(max(1, round(n * scale)) for n in images.shape[-2:]))
    height, width = (size - n for n in images.shape[-2:])
    return F.pad(images, (width // 2, width - width // 2, height // 2, height - height // 2))


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """``(x - mean) / std`` a channel."""
    shape = (1, -1, 1, 1)
    return (images - torch.tensor(mean).view(shape).to(images)) / torch.tensor(std).view(shape).to(images)
