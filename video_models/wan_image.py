"""Start and end images as Wan takes them: mask and masked latents, and CLIP's view.

As diffusers' ``WanImageToVideoPipeline.prepare_latents`` and VideoX-Fun's ``pipeline_wan_fun_inpaint.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLIP_TOKENS = 257
"""Tokens of one image: 16x16 patches and the class token."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def given_frames(
    encode: Callable[[Tensor], Tensor],
    start: Tensor | None,
    end: Tensor | None,
    latent_shape: Sequence[int],
    stride: int,
) -> Tensor:
    """The channels beside the noisy latents, ``[B, stride + C, t, h, w]``: the mask (1 = given), then the latents.

    Without images everything is 0: text to video, as VideoX-Fun trains it. Frames to be made are mid-gray.

    Args:
        encode: From frames ``[B, 3, T, H, W]`` in -1..1 to normalised latents.
        start, end: ``[B, 3, H, W]`` in 0..1 of the video's size, on the CPU, or None.
        latent_shape: ``(C, t, h, w)``.
        stride: Frames a latent frame stands for.
    """
    channels, t, h, w = latent_shape
    frames = (t - 1) * stride + 1
    given = [(image, index) for image, index in ((start, 0), (end, frames - 1)) if image is not None]
    if not given:
        return torch.zeros(1, stride + channels, t, h, w)
    video = torch.zeros(max(len(image) for image, _ in given), 3, frames, *given[0][0].shape[-2:])
    mask = torch.zeros(1, 1, frames, h, w)
    for image, index in given:
        video[:, :, index] = image * 2 - 1
        mask[:, :, index] = 1
    # The first latent frame stands for one frame, so its mask is repeated to fill its channel group.
    mask = torch.cat([mask[:, :, :1].expand(-1, -1, stride, -1, -1), mask[:, :, 1:]], dim=2)
    mask = mask.view(1, t, stride, h, w).transpose(1, 2)
    latents = encode(video).cpu()
    return torch.cat([mask.expand(len(latents), -1, -1, -1, -1), latents], dim=1)


@torch.no_grad()
def clip_tokens(encoder: nn.Module, image: Tensor) -> Tensor:
    """CLIP ViT-H tokens of the last but one layer ``[B, 257, 1280]``; bicubic to 224, no crop, as published.

    Args:
        encoder: ``CLIPVisionModel``.
        image: ``[B, 3, H, W]`` in 0..1.
    """
    parameter, size = next(encoder.parameters()), encoder.config.image_size
    pixels = F.interpolate(image.float(), (size, size), mode="bicubic", align_corners=False)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    pixels = ((pixels.cpu() - mean) / std).to(parameter.device, parameter.dtype)
    return encoder(pixels, output_hidden_states=True).hidden_states[-2]
