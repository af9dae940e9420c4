"""The decoder of Wan's VAE, one latent frame at a time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from .protocol import Carried
from .stations import Station, pass_through

CARRIED_FRAMES = 2
"""Of its input, what a causal convolution of three frames needs to see again."""


def decode_frame(
    vae: nn.Module,
    latents: Tensor,
    carried: Carried,
    context: Callable[[], AbstractContextManager],
    save_memory: bool,
) -> tuple[Tensor, Carried]:
    """Pixels of the next latent frame.

    Args:
        vae: ``AutoencoderKLWan``.
        latents: ``[B, C, 1, h, w]`` in the VAE's own scale.
        carried, context, save_memory: See :func:`.stations.pass_through`.

    Returns:
        ``[B, 3, 1 or 4, H, W]`` in -1..1, and what to carry on.
    """
    with context():
        x = vae.post_quant_conv(latents)
    x, carried = pass_through(_stations(vae.decoder, not carried), x, carried, context, save_memory)
    if vae.config.patch_size is not None:
        from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

        x = unpatchify(x, patch_size=vae.config.patch_size)
    return x.clamp(-1, 1), carried


def _stations(decoder: nn.Module, first: bool) -> list[Station]:
    def head(x: Tensor, before: Tensor | None = None) -> tuple:
        return _causal(decoder.conv_in, x, before)

    def tail(x: Tensor, before: Tensor | None = None) -> tuple:
        return _causal(decoder.conv_out, decoder.nonlinearity(decoder.norm_out(x)), before)

    return [head, _block(decoder.mid_block), *(_block(up, first_chunk=first) for up in decoder.up_blocks), tail]


def _block(block: nn.Module, **arguments: Any) -> Station:
    """diffusers' blocks fill a list in place: one entry a causal convolution at most."""
    entries = sum(type(module).__name__ == "WanCausalConv3d" for module in block.modules())

    def run(x: Tensor, *before: Any) -> tuple:
        features = list(before) or [None] * entries
        x = block(x, feat_cache=features, feat_idx=[0], **arguments)
        return (x, *features)

    return run


def _causal(conv: nn.Module, x: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
    """A causal convolution, and the end of its input that the next call needs."""
    seen = x[:, :, -CARRIED_FRAMES:]
    if seen.shape[2] < CARRIED_FRAMES and before is not None:
        seen = torch.cat([before[:, :, -1:], seen], dim=2)
    return conv(x, before), seen
