"""Names of Wan's VAEs: the publisher's, and those of diffusers' ``AutoencoderKLWan``.

The publisher's names are those of ``wan/modules/vae.py`` (16 channels) and ``wan/modules/vae2_2.py`` (48 channels,
whose levels are modules of their own with a shortcut around them) in Wan-Video/Wan2.1 and Wan2.2.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .wan_keys import NUMBERED, rename, strip_prefix

_VAE_LAYER = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}
_VAE_HALF = {
    "conv1": "conv_in",
    "middle.0": "mid_block.resnets.0",
    "middle.1": "mid_block.attentions.0",
    "middle.2": "mid_block.resnets.1",
    "head.0": "norm_out",
    "head.2": "conv_out",
}
_VAE = {"conv1": "quant_conv", "conv2": "post_quant_conv"}
_LAYER = re.compile(r"encoder\.downsamples\.(\d+)\.(?:downsamples\.(\d+)\.)?")


STATISTICS_48 = {
    "latents_mean": (
        -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
        0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
        -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
        -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
    ),
    "latents_std": (
        0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
        0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
        0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
        0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
    ),
}  # fmt: skip
"""Of Wan2.2's latents, by channel, as its publisher measured them; diffusers' defaults are those of Wan2.1."""


def convert_vae(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The publisher's ``WanVAE_`` tensors (with or without ``model.``) as ``AutoencoderKLWan``'s.

    Wan2.1 numbers the decoder's blocks in one row; diffusers groups them by level: the residual blocks, one more
    than in the encoder, then an upsampler except after the last level. In Wan2.2 the publisher groups them too.
    """
    tensors = strip_prefix(tensors)
    config = vae_config(tensors)
    per_level = config["num_res_blocks"] + 2
    converted = {}
    for name, tensor in tensors.items():
        half, _, inner = name.partition(".")
        match = NUMBERED.fullmatch(inner)
        if half not in ("encoder", "decoder"):
            new = rename(name, _VAE) or name
        elif match is None or match[1] not in ("downsamples.", "upsamples.", "middle."):
            new = f"{half}.{rename(inner, _VAE_HALF) or inner}"
        elif match[1] == "middle.":
            place = f"middle.{match[2]}"
            new = f"{half}.{_VAE_HALF.get(place, place)}.{rename(match[3], _VAE_LAYER) or match[3]}"
        elif config["is_residual"]:
            new = f"{half}.{match[1].replace('samples', '_blocks')}{match[2]}.{_in_level(match[1], match[3])}"
        elif match[1] == "downsamples.":
            new = f"{half}.down_blocks.{match[2]}.{rename(match[3], _VAE_LAYER) or match[3]}"
        else:
            level, place = divmod(int(match[2]), per_level)
            block = f"resnets.{place}" if place < per_level - 1 else "upsamplers.0"
            new = f"{half}.up_blocks.{level}.{block}.{rename(match[3], _VAE_LAYER) or match[3]}"
        converted[new] = tensor
    return converted


def _in_level(direction: str, name: str) -> str:
    """Below a level of Wan2.2's: its residual blocks, then the module that changes the resolution."""
    match = NUMBERED.fullmatch(name)
    if match is None or match[1] != direction:
        return name
    if match[3].startswith(("resample.", "time_conv.")):
        return f"{direction.removesuffix('s.')}r.{match[3]}"
    return f"resnets.{match[2]}.{rename(match[3], _VAE_LAYER) or match[3]}"


def vae_config(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of ``AutoencoderKLWan``, read from the publisher's tensors.

    Raises:
        ValueError: The tensors are no Wan VAE.
    """
    tensors = strip_prefix(tensors)
    needed = ("encoder.conv1", "conv2", "decoder.conv1", "decoder.head.2")
    lacking = [name for name in needed if f"{name}.weight" not in tensors]
    if lacking:
        raise ValueError(f"no Wan VAE: {lacking[0]}.weight is missing")
    (dim, pixels, *_), (latents, *_), (decoder_width, *_), (painted, *_) = (
        tensors[f"{name}.weight"].shape for name in needed
    )
    residual = any(name.startswith("encoder.downsamples.0.downsamples.") for name in tensors)
    levels = _levels(tensors)
    counts = {len(widths) for widths, _ in levels}
    if len(counts) != 1 or 0 in counts:
        raise ValueError("no Wan VAE: its encoder's levels differ in their number of residual blocks")
    temporal = [time for _, time in levels[:-1]]
    multiples = [widths[-1] // dim for widths, _ in levels]
    patch = math.isqrt(pixels // 3)
    config = {
        "base_dim": dim,
        "decoder_base_dim": decoder_width // multiples[-1],
        "z_dim": latents,
        "dim_mult": multiples,
        "num_res_blocks": counts.pop(),
        "temperal_downsample": temporal,
        "is_residual": residual,
        "in_channels": pixels,
        "out_channels": painted,
        "patch_size": patch if patch > 1 else None,
        "scale_factor_temporal": 2 ** sum(temporal),
        "scale_factor_spatial": 2 ** len(temporal) * patch,
    }
    return config | STATISTICS_48 if latents == 48 else config


def _levels(tensors: Mapping[str, Tensor]) -> list[tuple[list[int], bool]]:
    """The encoder's levels: the widths of their residual blocks, and whether they halve the frames."""
    places = {match[0]: (int(match[1]), int(match[2] or 0)) for match in map(_LAYER.match, tensors) if match}
    levels: list[tuple[list[int], bool]] = [([], False)]
    for place in sorted(places, key=places.get):
        if f"{place}residual.6.weight" in tensors:
            levels[-1][0].append(tensors[f"{place}residual.6.weight"].shape[0])
        elif f"{place}resample.1.weight" in tensors:
            levels[-1] = (levels[-1][0], f"{place}time_conv.weight" in tensors)
            levels.append(([], False))
    return levels
