"""The decoder of Wan's VAE as a pure function of one latent frame and of what its causal convolutions carry on.

diffusers keeps the carried features inside the VAE and decodes a whole clip in one graph. Here they come in and go
out, so that the gradient of a clip can be taken one latent frame at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .protocol import Carried

CARRIED_FRAMES = 2
"""Of its input, what a causal convolution of three frames needs to see again."""


def decode_frame(
    vae: nn.Module, latents: Tensor, carried: Carried, context: Callable[[], Any], save_memory: bool
) -> tuple[Tensor, Carried]:
    """Pixels of the next latent frame.

    Args:
        vae: ``AutoencoderKLWan``.
        latents: ``[B, C, 1, h, w]`` in the VAE's own scale.
        carried: What the call before returned; empty at the first frame.
        context: Makes the context in which the network runs.
        save_memory: Keep each block's input alone for the backward pass, and compute the rest again.

    Returns:
        ``[B, 3, 1 or 4, H, W]`` in -1..1, and what to carry on.
    """
    first = not carried
    blocks = _blocks(vae, first)
    before = list(carried) if carried else [None] * sum(slots for _, slots in blocks)
    after: list[Any] = []
    x = latents
    with context():
        x = vae.post_quant_conv(x)
    for run, slots in blocks:
        mine, before = before[:slots], before[slots:]
        if save_memory and torch.is_grad_enabled():
            x, *new = checkpoint(run, x, *mine, use_reentrant=False, context_fn=lambda: (context(), context()))
        else:
            with context():
                x, *new = run(x, *mine)
        after += new
    if vae.config.patch_size is not None:
        from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

        x = unpatchify(x, patch_size=vae.config.patch_size)
    return x.clamp(-1, 1), tuple(after)


def _blocks(vae: nn.Module, first: bool) -> list[tuple[Callable[..., tuple], int]]:
    """The decoder's stations in order, as ``(x, *carried) -> (x, *carried)``, with how much each carries."""
    decoder = vae.decoder

    def tail(x: Tensor, before: Tensor | None) -> tuple:
        return _causal(decoder.conv_out, decoder.nonlinearity(decoder.norm_out(x)), before)

    up = [_station(block, first_chunk=first) for block in decoder.up_blocks]
    return [(lambda x, before: _causal(decoder.conv_in, x, before), 1), _station(decoder.mid_block), *up, (tail, 1)]


def _station(block: nn.Module, **arguments: Any) -> tuple[Callable[..., tuple], int]:
    kind = "WanCausalConv3d"
    slots = sum(type(module).__name__ == kind for module in block.modules())

    def run(x: Tensor, *before: Any) -> tuple:
        carried = list(before)
        x = block(x, feat_cache=carried, feat_idx=[0], **arguments)
        return (x, *carried)

    return run, slots


def _causal(conv: nn.Module, x: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
    """A causal convolution, and the end of its input that the next call needs."""
    seen = x[:, :, -CARRIED_FRAMES:]
    if seen.shape[2] < CARRIED_FRAMES and before is not None:
        seen = torch.cat([before[:, :, -1:], seen], dim=2)
    return conv(x, before), seen
