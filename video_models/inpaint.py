"""Start and end images as the InP models of VideoX-Fun and EasyAnimate take them: a mask and masked latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

REFERENCE_NOISE = 0.0563
"""Of pixels in -1..1, for models with ``add_noise_in_inpaint_model``; the publisher's default."""

NOISE_SEED = 0


def fit_image(name: str, image: Tensor | None, batch: int, size: tuple[int, int]) -> Tensor | None:
    """An image ``[1 or batch, 3, H, W]`` in 0..1 on the CPU, resized to ``size``; raises ``ValueError``."""
    if image is None:
        return None
    if image.ndim != 4 or image.shape[1] != 3 or image.shape[0] not in (1, batch):
        raise ValueError(f"the {name} image must be [1 or {batch}, 3, H, W], got {list(image.shape)}")
    image = image.detach().float().cpu()
    if image.shape[-2:] != size:
        image = F.interpolate(image, size, mode="bicubic", antialias=True)
    return image.clamp(0, 1)


def resize_mask(mask: Tensor, size: Sequence[int]) -> Tensor:
    """``[B, 1, T, H, W]`` to latent ``size`` ``(t, h, w)``: the first frame alone, the others among themselves."""
    first = F.interpolate(mask[:, :, :1], (1, *size[1:]), mode="trilinear")
    if size[0] == 1:
        return first
    return torch.cat([first, F.interpolate(mask[:, :, 1:], (size[0] - 1, *size[1:]), mode="trilinear")], dim=2)


def inpaint_latents(
    encode: Callable[[Tensor], Tensor],
    start: Tensor | None,
    end: Tensor | None,
    *,
    frames: int,
    latent_shape: Sequence[int],
    factor: float,
    noise: float = 0.0,
) -> Tensor:
    """The channels beside the noisy latents, ``[B, 1 + C, t, h, w]``: the mask (given is ``factor``), then the latents.

    Without images everything is 0: text to video. Frames to be made are -1 (black) for the VAE. A mask of the
    last frame alone is too short to be seen in the latents' mask, as published; its latents are.

    Args:
        encode: From frames ``[B, 3, T, H, W]`` in -1..1 to scaled latents.
        start, end: ``[B, 3, H, W]`` in 0..1 of the video's size, on the CPU, or None.
        frames: Of the video.
        latent_shape: ``(C, t, h, w)``.
        factor: The VAE's scaling factor, by which the publisher multiplies the mask too.
        noise: Standard deviation of the noise on given frames; the same for every call.
    """
    given = [(image * 2 - 1, index) for image, index in ((start, 0), (end, frames - 1)) if image is not None]
    if not given:
        return torch.zeros(1, 1 + latent_shape[0], *latent_shape[1:])
    height, width = given[0][0].shape[-2:]
    video = -torch.ones(max(len(image) for image, _ in given), 3, frames, height, width)
    mask = torch.zeros(1, 1, frames, height, width)
    generator = torch.Generator().manual_seed(NOISE_SEED)
    for image, index in given:
        if noise:  # black stays black, as published
            image = image + noise * torch.randn(image.shape, generator=generator) * (image != -1)
        video[:, :, index] = image
        mask[:, :, index] = 1
    latents = encode(video).float().cpu()
    return torch.cat([factor * resize_mask(mask, latent_shape[1:]).expand(len(latents), -1, -1, -1, -1), latents], 1)
