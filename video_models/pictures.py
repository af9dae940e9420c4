"""Videos through a VAE of pictures, each frame alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def decode_pictures(vae: nn.Module, latents: Tensor, together: int, *, save_memory: bool = False) -> Tensor:
    """Pixels ``[B, 3, T, H, W]`` of latents ``[B, C, T, h, w]``, differentiable.

    Args:
        vae: diffusers' ``AutoencoderKL``.
        latents: On the VAE's own scale.
        together: Frames it decodes in one call.
        save_memory: Checkpoint its blocks.
    """
    if save_memory:
        vae.enable_gradient_checkpointing()
    else:
        vae.disable_gradient_checkpointing()
    parts = latents.transpose(1, 2).flatten(0, 1).split(together)
    pixels = torch.cat([vae.decode(part, return_dict=False)[0] for part in parts])
    return pixels.unflatten(0, (latents.shape[0], -1)).transpose(1, 2)
