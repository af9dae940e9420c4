"""The decoder of CogVideoX's VAE as stations."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .stations import Station, with_tree


def decoder_stations(decoder: nn.Module, latents: Tensor) -> list[Station]:
    """``CogVideoXDecoder3D`` for one chunk; every norm looks at the chunk's own ``latents``."""

    def tail(x: Tensor, carried: Any) -> tuple[Tensor, dict]:
        carried, new = carried or {}, {}
        x, new["norm"] = decoder.norm_out(x, latents, conv_cache=carried.get("norm"))
        x, new["conv"] = decoder.conv_out(decoder.conv_act(x), conv_cache=carried.get("conv"))
        return x, new

    def block(module: nn.Module) -> Station:
        return with_tree(lambda x, carried: module(x, None, latents, conv_cache=carried))

    head = with_tree(lambda x, carried: decoder.conv_in(x, conv_cache=carried))
    return [head, block(decoder.mid_block), *map(block, decoder.up_blocks), with_tree(tail)]
