"""VideoCrafter2's denoiser: a Stable-Diffusion UNet with temporal convolutions and temporal transformers.

Parameters carry the names of the published ``model.ckpt`` (below ``model.diffusion_model.``), down to the
misspelt ``temopral_conv``. Paper: arXiv 2401.09047.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .embeddings import sinusoids

GROUPS = 32
INIT_HEADS = 8
"""Heads of the temporal transformer right after the first convolution, whatever its width."""

DROPOUT = 0.1
"""In the temporal convolutions, as published; without effect here, for a model is used in eval mode."""


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of the network in the publisher's terms; the defaults are VideoCrafter2's.

    Attributes:
        in_channels, out_channels: Of the latents.
        model_channels: Width of the finest level.
        channel_mult: Width of each level as a multiple of it; the picture halves from level to level.
        num_res_blocks: Residual blocks a level (one more on the way up).
        attention_resolutions: Downsampling factors whose levels have transformers; the middle always has.
        num_head_channels: Width of an attention head.
        transformer_depth: Blocks of a spatial transformer, and of the temporal one at the input.
        temporal_transformer_depth: Blocks of every other temporal transformer.
        context_dim: Width of the text tokens.
    """

    in_channels: int = 4
    out_channels: int = 4
    model_channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (1, 2, 4)
    num_head_channels: int = 64
    transformer_depth: int = 1
    temporal_transformer_depth: int = 1
    context_dim: int = 1024

    def to_dict(self) -> dict[str, Any]:
        """For peft, whose older releases ask networks so."""
        return asdict(self)


@dataclass(frozen=True)
class Condition:
    """What every block is told besides its input.

    Attributes:
        embedding: ``[B, 4 * model_channels]`` of timestep and frame rate.
        context: Text tokens ``[B, L, context_dim]``.
        frames: Frames a video; blocks see ``[B * frames, C, H, W]``.
    """

    embedding: Tensor
    context: Tensor
    frames: int


def to_video(x: Tensor, frames: int) -> Tensor:
    """``[B * T, C, H, W]`` as ``[B, C, T, H, W]``."""
    return x.unflatten(0, (-1, frames)).transpose(1, 2)


def to_frames(x: Tensor) -> Tensor:
    """``[B, C, T, H, W]`` as ``[B * T, C, H, W]``."""
    return x.transpose(1, 2).flatten(0, 1)


class TemporalConv(nn.Module):
    """Four convolutions over three frames each, with one residual around all of them."""

    def __init__(self, channels: int) -> None:
        super().__init__()

        def stage(*dropout: nn.Module) -> nn.Sequential:
            convolution = nn.Conv3d(channels, channels, (3, 1, 1), padding=(1, 0, 0))
            return nn.Sequential(nn.GroupNorm(GROUPS, channels), nn.SiLU(), *dropout, convolution)

        self.conv1 = stage()
        self.conv2, self.conv3, self.conv4 = (stage(nn.Dropout(DROPOUT)) for _ in range(3))

    def forward(self, video: Tensor) -> Tensor:
        return video + self.conv4(self.conv3(self.conv2(self.conv1(video))))


class ResBlock(nn.Module):
    """Two convolutions a frame, told the time between them, and a temporal convolution behind."""

    def __init__(self, channels: int, out_channels: int, embedding: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, out_channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, out_channels),
            nn.SiLU(),
            nn.Identity(),  # where the publisher has a dropout of 0
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)
        self.temopral_conv = TemporalConv(out_channels)

    def forward(self, x: Tensor, condition: Condition) -> Tensor:
        time = self.emb_layers(condition.embedding).repeat_interleave(condition.frames, dim=0)
        hidden = self.out_layers(self.in_layers(x) + time[:, :, None, None])
        return to_frames(self.temopral_conv(to_video(self.skip_connection(x) + hidden, condition.frames)))


class Attention(nn.Module):
    """Multi-head attention of tokens to themselves, or to a context."""

    def __init__(self, width: int, context_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        parts = (self.to_q(x), self.to_k(context), self.to_v(context))
        query, key, value = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        return self.to_out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class GatedGelu(nn.Module):
    """A linear layer whose second half of channels, through an exact GELU, gates the first."""

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * out_width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Gated GELU to four times the width and back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GatedGelu(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the text (or, without text, self-attention again), feed-forward."""

    def __init__(self, width: int, heads: int, context_width: int | None = None) -> None:
        super().__init__()
        self.attn1 = Attention(width, width, heads)
        self.attn2 = Attention(width, context_width or width, heads)
        self.ff = FeedForward(width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Tokens ``[N, L, C]``; a context ``[B, M, D]`` serves the ``N / B`` sequences of its sample."""
        normed = self.norm1(x)
        x = x + self.attn1(normed, normed)
        normed = self.norm2(x)
        if context is None:
            x = x + self.attn2(normed, normed)
        else:  # every query stands alone, so a sample's sequences may ask as one
            x = x + self.attn2(normed.reshape(len(context), -1, x.shape[2]), context).view_as(x)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Attention among the pixels of each frame, and of each pixel to the text."""

    def __init__(self, channels: int, heads: int, depth: int, context_width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        blocks = [TransformerBlock(channels, heads, context_width) for _ in range(depth)]
        self.transformer_blocks = nn.ModuleList(blocks)
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, condition: Condition) -> Tensor:
        tokens = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))
        for block in self.transformer_blocks:
            tokens = block(tokens, condition.context)
        return x + self.proj_out(tokens).transpose(1, 2).view_as(x)


class TemporalTransformer(nn.Module):
    """Attention among the frames of each pixel, which have no position: any number of frames will do."""

    def __init__(self, channels: int, width: int, heads: int, depth: int, convolution: bool = False) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels, eps=1e-6)
        self.proj_in = nn.Conv1d(channels, width, 1) if convolution else nn.Linear(channels, width)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(width, heads) for _ in range(depth))
        self.proj_out = nn.Conv1d(width, channels, 1) if convolution else nn.Linear(width, channels)

    def forward(self, x: Tensor, condition: Condition) -> Tensor:
        frames, (height, width) = condition.frames, x.shape[2:]
        tokens = self.norm(to_video(x, frames)).permute(0, 3, 4, 2, 1).flatten(0, 2)  # [B * H * W, T, C]
        tokens = self._project(self.proj_in, tokens)
        for block in self.transformer_blocks:
            tokens = block(tokens)
        tokens = self._project(self.proj_out, tokens).unflatten(0, (-1, height, width))
        return x + to_frames(tokens.permute(0, 4, 3, 1, 2))

    @staticmethod
    def _project(layer: nn.Module, tokens: Tensor) -> Tensor:
        if isinstance(layer, nn.Conv1d):
            return layer(tokens.transpose(1, 2)).transpose(1, 2)
        return layer(tokens)


class Convolution(nn.Conv2d):
    """A 3x3 convolution that takes a condition it does not need, as the other layers of a stage do."""

    def forward(self, x: Tensor, condition: Condition) -> Tensor:
        return super().forward(x)


class Downsample(nn.Module):
    """Halves height and width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, condition: Condition) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Doubles height and width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, condition: Condition) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Stage(nn.ModuleList):
    """Layers one after the other."""

    def forward(self, x: Tensor, condition: Condition) -> Tensor:
        for layer in self:
            x = layer(x, condition)
        return x


class VideoCrafterUNet(nn.Module):
    """Predicts the noise in the latents of a video.

    Args:
        config: Sizes.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        base, embedding = config.model_channels, 4 * config.model_channels
        self.time_embed, self.fps_embedding = (
            nn.Sequential(nn.Linear(base, embedding), nn.SiLU(), nn.Linear(embedding, embedding)) for _ in range(2)
        )

        def transformers(channels: int) -> list[nn.Module]:
            heads = channels // config.num_head_channels
            return [
                SpatialTransformer(channels, heads, config.transformer_depth, config.context_dim),
                TemporalTransformer(channels, channels, heads, config.temporal_transformer_depth),
            ]

        self.input_blocks = nn.ModuleList([Stage([Convolution(config.in_channels, base, 3, padding=1)])])
        init_width = INIT_HEADS * config.num_head_channels
        self.init_attn = Stage(
            [TemporalTransformer(base, init_width, INIT_HEADS, config.transformer_depth, convolution=True)]
        )
        channels, skips, last = base, [base], len(config.channel_mult) - 1
        for level, multiple in enumerate(config.channel_mult):
            for _ in range(config.num_res_blocks):
                layers = [ResBlock(channels, multiple * base, embedding)]
                channels = multiple * base
                if 2**level in config.attention_resolutions:
                    layers += transformers(channels)
                self.input_blocks.append(Stage(layers))
                skips.append(channels)
            if level < last:
                self.input_blocks.append(Stage([Downsample(channels)]))
                skips.append(channels)
        self.middle_block = Stage(
            [
                ResBlock(channels, channels, embedding),
                *transformers(channels),
                ResBlock(channels, channels, embedding),
            ]
        )
        self.output_blocks = nn.ModuleList()
        for level in range(last, -1, -1):
            for index in range(config.num_res_blocks + 1):
                width = config.channel_mult[level] * base
                layers = [ResBlock(channels + skips.pop(), width, embedding)]
                channels = width
                if 2**level in config.attention_resolutions:
                    layers += transformers(channels)
                if level and index == config.num_res_blocks:
                    layers.append(Upsample(channels))
                self.output_blocks.append(Stage(layers))
        self.out = nn.Sequential(
            nn.GroupNorm(GROUPS, base), nn.SiLU(), nn.Conv2d(base, config.out_channels, 3, padding=1)
        )

    def enable_gradient_checkpointing(self) -> None:
        """Recompute each stage in the backward pass instead of keeping what is inside it."""
        self.gradient_checkpointing = True

    def disable_gradient_checkpointing(self) -> None:
        self.gradient_checkpointing = False

    def _run(self, stage: Stage, x: Tensor, condition: Condition) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(stage, x, condition, use_reentrant=False)
        return stage(x, condition)

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor, fps: Tensor) -> Tensor:
        """The noise.

        Args:
            x: Noisy latents ``[B, C, T, H, W]``; height and width divisible by the levels' halvings.
            timestep: ``[B]``, 0..999.
            context: Text tokens ``[B, L, context_dim]``.
            fps: Frames a second ``[B]``.

        Returns:
            Shaped like ``x``.
        """
        wide = torch.promote_types(x.dtype, torch.float32)  # 16 bits cannot tell the timesteps apart
        embedding = 0
        for layers, number in ((self.time_embed, timestep), (self.fps_embedding, fps)):
            embedding = embedding + layers(sinusoids(number.to(wide), self.config.model_channels).to(x.dtype))
        condition = Condition(embedding, context, x.shape[2])
        hidden = self._run(self.init_attn, self.input_blocks[0](to_frames(x), condition), condition)
        skips = [hidden]
        for stage in self.input_blocks[1:]:
            hidden = self._run(stage, hidden, condition)
            skips.append(hidden)
        hidden = self._run(self.middle_block, hidden, condition)
        for stage in self.output_blocks:
            hidden = self._run(stage, torch.cat([hidden, skips.pop()], dim=1), condition)
        return to_video(self.out(hidden), condition.frames)
