"""The decoder of EasyAnimate's VAE (MagViT) as stations."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .stations import Station, remembering

FEATURES = "prev_features"
"""Where its causal convolutions keep the end of what they saw."""


def decoder_stations(decoder: nn.Module) -> list[Station]:
    """``EasyAnimateDecoder`` for one chunk."""
    out = remembering(decoder.conv_out, FEATURES)

    def tail(x: Tensor, *before: Any) -> tuple:
        if decoder.spatial_group_norm:  # every frame by itself
            frames = decoder.conv_norm_out(x.transpose(1, 2).flatten(0, 1))
            x = frames.unflatten(0, (x.shape[0], -1)).transpose(1, 2)
        else:
            x = decoder.conv_norm_out(x)
        return out(decoder.conv_act(x), *before)

    blocks = [decoder.conv_in, decoder.mid_block, *decoder.up_blocks]
    return [*(remembering(block, FEATURES) for block in blocks), tail]
