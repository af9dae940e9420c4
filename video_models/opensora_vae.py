"""Open-Sora 1.2's video VAE: Stable Diffusion's for each frame, and behind it one of our own along time.

Names are those of the published ``OpenSora-VAE-v1.2``; source: the publisher's ``opensora/models/vae`` at v1.2.0.
The temporal part takes 17 frames, five latents, at a time. Its convolutions look back only, but its norms run over
all frames of a chunk, so no frame is independent of a later one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .files import count_numbered
from .pictures import decode_pictures

SPATIAL_SCALE = 0.18215
"""Between the two parts, whatever the spatial one's own configuration says."""

MICRO_FRAMES = 17

MICRO_BATCH = 4
"""Frames the spatial part sees at once; it looks at each alone."""


@dataclass(frozen=True)
class TemporalConfig:
    """Sizes of the temporal part; the defaults are Open-Sora 1.2's.

    Attributes:
        in_out_channels: Of the spatial part's latents.
        latent_embed_dim, embed_dim: Of the latents within and without.
        filters: Width at the level of frames.
        num_res_blocks: Residual blocks a level.
        channel_multipliers: Width of each level as a multiple of ``filters``.
        temporal_downsample: Behind which of them, but the last, time halves.
        num_groups: Of the norms.
    """

    in_out_channels: int = 4
    latent_embed_dim: int = 4
    embed_dim: int = 4
    filters: int = 128
    num_res_blocks: int = 4
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 4)
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    num_groups: int = 32

    @property
    def stride(self) -> int:
        """Frames a latent stands for."""
        return 2 ** sum(self.temporal_downsample)


class CausalConv3d(nn.Module):
    """A convolution padded with zeros, in time only in front."""

    def __init__(self, channels: int, out_channels: int, kernel: int, *, stride: int = 1, bias: bool = True) -> None:
        super().__init__()
        side = kernel // 2
        self.padding = (side, side, side, side, kernel - stride, 0)
        self.conv = nn.Conv3d(channels, out_channels, kernel, stride=(stride, 1, 1), bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.padding))


class ResBlock(nn.Module):
    """Two convolutions and what comes in."""

    def __init__(self, channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels)
        self.conv1 = CausalConv3d(channels, out_channels, 3, bias=False)
        self.norm2 = nn.GroupNorm(groups, out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels, 3, bias=False)
        if channels != out_channels:
            self.conv3 = CausalConv3d(channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return hidden + (self.conv3(x) if hasattr(self, "conv3") else x)


class Encoder(nn.Module):
    """From the spatial part's latents to moments."""

    def __init__(self, config: TemporalConfig) -> None:
        super().__init__()
        groups, channels = config.num_groups, config.filters
        self.conv_in = CausalConv3d(config.in_out_channels, channels, 3, bias=False)
        self.block_res_blocks, self.conv_blocks = nn.ModuleList(), nn.ModuleList()
        for level, multiplier in enumerate(config.channel_multipliers):
            blocks = nn.Sequential()
            for _ in range(config.num_res_blocks):
                blocks.append(ResBlock(channels, multiplier * config.filters, groups))
                channels = multiplier * config.filters
            self.block_res_blocks.append(blocks)
            if level < len(config.temporal_downsample):
                halve = config.temporal_downsample[level]
                self.conv_blocks.append(CausalConv3d(channels, channels, 3, stride=2) if halve else nn.Identity())
        blocks = (ResBlock(channels, channels, groups) for _ in range(config.num_res_blocks))
        self.res_blocks = nn.Sequential(*blocks)
        self.norm1 = nn.GroupNorm(groups, channels)
        self.conv2 = CausalConv3d(channels, 2 * config.latent_embed_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level, blocks in enumerate(self.block_res_blocks):
            x = blocks(x)
            if level < len(self.conv_blocks):
                x = self.conv_blocks[level](x)
        return self.conv2(F.silu(self.norm1(self.res_blocks(x))))


class Decoder(nn.Module):
    """From latents to those of the spatial part."""

    def __init__(self, config: TemporalConfig) -> None:
        super().__init__()
        groups, channels = config.num_groups, config.channel_multipliers[-1] * config.filters
        self.conv1 = CausalConv3d(config.latent_embed_dim, channels, 3)
        blocks = (ResBlock(channels, channels, groups) for _ in range(config.num_res_blocks))
        self.res_blocks = nn.Sequential(*blocks)
        levels, doublings = [], []
        for level in range(len(config.channel_multipliers) - 1, -1, -1):
            width = config.channel_multipliers[level] * config.filters
            blocks = nn.Sequential()
            for _ in range(config.num_res_blocks):
                blocks.append(ResBlock(channels, width, groups))
                channels = width
            levels.append(blocks)
            if level:
                double = config.temporal_downsample[level - 1]
                doublings.append(CausalConv3d(width, 2 * width, 3) if double else nn.Identity())
        # Built from the latents on, named from the frames on.
        self.block_res_blocks, self.conv_blocks = nn.ModuleList(levels[::-1]), nn.ModuleList(doublings[::-1])
        self.norm1 = nn.GroupNorm(groups, channels)
        self.conv_out = CausalConv3d(channels, config.in_out_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.res_blocks(self.conv1(x))
        for level in range(len(self.block_res_blocks) - 1, -1, -1):
            x = self.block_res_blocks[level](x)
            if level and isinstance(self.conv_blocks[level - 1], CausalConv3d):
                doubled = self.conv_blocks[level - 1](x).unflatten(1, (-1, 2))  # two frames in neighbouring channels
                x = doubled.movedim(2, 3).flatten(2, 3)
        return self.conv_out(F.silu(self.norm1(x)))


class TemporalVae(nn.Module):
    """The part along time.

    Args:
        config: Sizes.
    """

    def __init__(self, config: TemporalConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = CausalConv3d(2 * config.latent_embed_dim, 2 * config.embed_dim, 1)
        self.post_quant_conv = CausalConv3d(config.embed_dim, config.latent_embed_dim, 1)

    def encode(self, x: Tensor) -> Tensor:
        """Mean and log variance ``[B, 2 * embed_dim, t, h, w]`` of ``[B, C, T, h, w]``, filled up in front."""
        return self.quant_conv(self.encoder(F.pad(x, (0, 0, 0, 0, -x.shape[2] % self.config.stride, 0))))

    def decode(self, latents: Tensor, frames: int) -> Tensor:
        """The last of the frames that ``[B, embed_dim, t, h, w]`` stand for, as many as a multiple allows."""
        return self.decoder(self.post_quant_conv(latents))[:, :, -frames % self.config.stride :]


class OpenSoraVae(nn.Module):
    """Both parts.

    Args:
        spatial: diffusers' ``AutoencoderKL``.
        temporal: Sizes of the temporal part.
        micro_frames: Frames the temporal part takes at once.
    """

    def __init__(self, spatial: nn.Module, temporal: TemporalConfig, micro_frames: int = MICRO_FRAMES) -> None:
        super().__init__()
        self.spatial_vae = nn.ModuleDict({"module": spatial})
        self.temporal_vae = TemporalVae(temporal)
        self.micro_frames = micro_frames
        for name in ("scale", "shift"):
            self.register_buffer(name, torch.zeros(1, temporal.embed_dim, 1, 1, 1))

    def decode(self, latents: Tensor, frames: int | None = None, *, save_memory: bool = False) -> Tensor:
        """Pixels ``[B, 3, T, H, W]`` around -1..1 of latents ``[B, C, t, h, w]`` as the denoiser sees them.

        Args:
            latents: Any number of them.
            frames: How many frames they stand for; by :func:`frames_of` if not given.
            save_memory: Checkpoint the temporal part, and the blocks of the spatial one.
        """
        spatial, chunks = self.spatial_vae["module"], self.decode_time(latents, frames, save_memory=save_memory)
        parts = [decode_pictures(spatial, c / SPATIAL_SCALE, MICRO_BATCH, save_memory=save_memory) for c in chunks]
        return torch.cat(parts, dim=2)

    def decode_time(self, latents: Tensor, frames: int | None = None, *, save_memory: bool = False) -> Iterator[Tensor]:
        """What the spatial part is given, ``[B, C, T, h, w]`` of each chunk."""
        stride = self.temporal_vae.config.stride
        if frames is None:
            frames = frames_of(latents.shape[2], self.micro_frames, stride)
        latents = latents * self.scale.to(latents) + self.shift.to(latents)
        for chunk in latents.split(latents_of(self.micro_frames, self.micro_frames, stride), dim=2):
            count = min(self.micro_frames, frames)
            if save_memory and torch.is_grad_enabled():
                yield checkpoint(self.temporal_vae.decode, chunk, count, use_reentrant=False)
            else:
                yield self.temporal_vae.decode(chunk, count)
            frames -= count

    def encode_space(self, pixels: Tensor) -> Tensor:
        """The spatial part's latents (means) ``[B, C, T, h, w]`` of ``[B, 3, T, H, W]`` in -1..1."""
        pictures = pixels.transpose(1, 2).flatten(0, 1).split(MICRO_BATCH)
        means = torch.cat([self.spatial_vae["module"].encode(part).latent_dist.mode() for part in pictures])
        return SPATIAL_SCALE * means.unflatten(0, (pixels.shape[0], -1)).transpose(1, 2)

    def encode_time(self, middle: Tensor) -> Tensor:
        """Moments of the spatial part's latents, chunk by chunk; not yet on the denoiser's scale."""
        return torch.cat([self.temporal_vae.encode(chunk) for chunk in middle.split(self.micro_frames, 2)], dim=2)

    def encode(self, pixels: Tensor) -> Tensor:
        """Latents (means) as the denoiser sees them of ``[B, 3, T, H, W]`` in -1..1."""
        return self.normalised(self.encode_time(self.encode_space(pixels)))

    def normalised(self, moments: Tensor) -> Tensor:
        """The means of moments, as the denoiser sees them."""
        means = moments.chunk(2, dim=1)[0]
        return (means - self.shift.to(means)) / self.scale.to(means)


def latents_of(frames: int, micro_frames: int = MICRO_FRAMES, stride: int = 4) -> int:
    """Latents of so many frames: whole chunks, and of the rest one for every begun ``stride``."""
    whole, rest = divmod(frames, micro_frames)
    return whole * -(-micro_frames // stride) + -(-rest // stride)


def frames_of(latents: int, micro_frames: int = MICRO_FRAMES, stride: int = 4) -> int:
    """Frames of so many latents; of a begun chunk the fewest that give them, for the first stands for one."""
    whole, rest = divmod(latents, -(-micro_frames // stride))
    return whole * micro_frames + (rest and (rest - 1) * stride + 1)


def temporal_config(tensors: Mapping[str, Tensor]) -> TemporalConfig:
    """Sizes of the temporal part as its names and shapes tell them.

    Raises:
        KeyError: A tensor that every such network has is missing.
    """
    before = "temporal_vae.encoder."
    first, last = tensors[f"{before}conv_in.conv.weight"], tensors["temporal_vae.post_quant_conv.conv.weight"]
    filters, levels = first.shape[0], count_numbered(tensors, f"{before}block_res_blocks.")
    widths = [tensors[f"{before}block_res_blocks.{i}.0.conv1.conv.weight"].shape[0] for i in range(levels)]
    return TemporalConfig(
        in_out_channels=first.shape[1],
        latent_embed_dim=last.shape[0],
        embed_dim=last.shape[1],
        filters=filters,
        num_res_blocks=count_numbered(tensors, f"{before}res_blocks."),
        channel_multipliers=tuple(width // filters for width in widths),
        temporal_downsample=tuple(f"{before}conv_blocks.{i}.conv.weight" in tensors for i in range(levels - 1)),
    )


def spatial_config(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of ``AutoencoderKL`` for the spatial part.

    Raises:
        KeyError: A tensor that every such network has is missing.
    """
    before = "spatial_vae.module."
    blocks = f"{before}encoder.down_blocks."
    levels = range(count_numbered(tensors, blocks))
    return spatial_arguments(
        block_out_channels=[tensors[f"{blocks}{i}.resnets.0.conv1.weight"].shape[0] for i in levels],
        layers_per_block=count_numbered(tensors, f"{blocks}0.resnets."),
        latent_channels=tensors[f"{before}post_quant_conv.weight"].shape[0],
    )


def spatial_arguments(*, block_out_channels: Sequence[int], **more: Any) -> dict[str, Any]:
    """Arguments of an ``AutoencoderKL`` of plain blocks."""
    levels = len(block_out_channels)
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    return {"block_out_channels": list(block_out_channels), **kinds, **more}
