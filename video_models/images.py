"""Start and end images as the families' conditioning wants them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

GIVEN_NOISE = 0.0563
"""Standard deviation of the noise on given pixels (-1..1), for InP models that were trained with noise there."""


def fit_image(name: str, image: Tensor | None, batch: int, size: tuple[int, int]) -> Tensor | None:
    """An image ``[1 or batch, 3, H, W]`` in 0..1 at the size of the video, on the CPU.

    Raises:
        ValueError: Another shape.
    """
    if image is None:
        return None
    if image.ndim != 4 or image.shape[1] != 3 or image.shape[0] not in (1, batch):
        raise ValueError(f"the {name} image must be [1 or {batch}, 3, H, W], got {list(image.shape)}")
    image = image.detach().float().cpu()
    if image.shape[-2:] != size:
        image = F.interpolate(image, size, mode="bicubic", antialias=True)
    return image.clamp(0, 1)


def masked_latents(
    encode: Callable[[Tensor], Tensor],
    start: Tensor | None,
    end: Tensor | None,
    frames: int,
    latent_shape: Sequence[int],
    factor: float,
    noise: bool,
) -> Tensor:
    """What the InP models of CogVideoX-Fun and EasyAnimate see besides the noise: a mask, and the given frames.

    As ``prepare_mask_latents`` of VideoX-Fun's and EasyAnimate's pipelines. The mask is resized in time too, the
    first frame alone and the others among themselves; one that marks the last frame alone vanishes there, as published.

    Args:
        encode: From frames ``[B, 3, T, H, W]`` in -1..1 to scaled latents.
        start, end: ``[B, 3, H, W]`` in 0..1 of the video's size, on the CPU; without either everything is 0.
        frames: Of the video; those not given are -1.
        latent_shape: ``(C, t, h, w)``.
        factor: The VAE's scaling factor, by which the publisher multiplies the mask (1 = given) too.
        noise: Whether given pixels get noise, the same for every sample and every time.

    Returns:
        ``[B, 1 + C, t, h, w]``, the mask first.
    """
    channels, t, h, w = latent_shape
    images = [(image * 2 - 1, index) for image, index in ((start, 0), (end, frames - 1)) if image is not None]
    if not images:
        return torch.zeros(1, 1 + channels, t, h, w)
    video = torch.full((max(len(pixels) for pixels, _ in images), 3, frames, *images[0][0].shape[-2:]), -1.0)
    mask = torch.zeros(1, 1, frames, 1, 1)
    generator = torch.Generator().manual_seed(0)
    for pixels, index in images:
        if noise:
            noisy = pixels + GIVEN_NOISE * torch.randn(pixels.shape[1:], generator=generator)
            pixels = torch.where(pixels == -1, pixels, noisy)
        video[:, :, index], mask[:, :, index] = pixels, 1
    if t > 1:
        later = F.interpolate(mask[:, :, 1:], (t - 1, 1, 1), mode="trilinear")
        mask = torch.cat([mask[:, :, :1], later], dim=2)
    latents = encode(video).cpu()
    return torch.cat([(factor * mask).expand(len(latents), -1, -1, h, w), latents], dim=1)
