"""Open-Sora 1.2's denoiser, STDiT3: a diffusion transformer whose blocks look at space and at time in turn.

Parameters carry the names of the published ``OpenSora-STDiT-v3``. Source: the publisher's ``opensora/models/stdit``
at v1.2.0 and its report.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .embeddings import sinusoids

NUMBER_WIDTH = 256
"""Sinusoids of a timestep or a frame rate."""

EPSILON = 1e-6


@dataclass(frozen=True)
class STDiT3Config:
    """Sizes of the network in the publisher's terms; the defaults are STDiT3-XL/2's.

    Attributes:
        depth: Pairs of a spatial and a temporal block.
        hidden_size: Width of the tokens.
        num_heads: Of attention.
        mlp_ratio: Width of a block's MLP as a multiple of the tokens'.
        caption_channels: Width of the text tokens.
        model_max_length: Text tokens of the learned empty caption.
        in_channels: Of the latents.
        patch_size: Latent frames, rows and columns of a token.
        pred_sigma: Whether as many channels as the velocity has follow it, unused.
        input_sq_size: Height and width in pixels at which positions are counted one by one.
    """

    depth: int = 28
    hidden_size: int = 1152
    num_heads: int = 16
    mlp_ratio: float = 4.0
    caption_channels: int = 4096
    model_max_length: int = 300
    in_channels: int = 4
    patch_size: tuple[int, int, int] = (1, 2, 2)
    pred_sigma: bool = True
    input_sq_size: int = 512

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.pred_sigma else 1)

    def to_dict(self) -> dict[str, Any]:
        """For peft, whose older releases ask networks so."""
        return asdict(self)


class NumberEmbedder(nn.Module):
    """A number per sample as a vector."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(NUMBER_WIDTH, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, numbers: Tensor) -> Tensor:
        """``[B, C]`` of floating-point numbers ``[B]``."""
        return self.mlp(sinusoids(numbers, NUMBER_WIDTH).to(self.mlp[0].weight.dtype))


class Mlp(nn.Module):
    """Two linear layers around a GELU in its tanh form."""

    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class CaptionEmbedder(nn.Module):
    """Text tokens at the width of the network; holds the caption that stands for none."""

    def __init__(self, channels: int, width: int, tokens: int) -> None:
        super().__init__()
        self.y_proj = Mlp(channels, width, width)
        self.register_buffer("y_embedding", torch.zeros(tokens, channels))

    def forward(self, text: Tensor) -> Tensor:
        return self.y_proj(text)


class Rotary(nn.Module):
    """Turns pairs of neighbouring channels by an angle that grows with the position."""

    def __init__(self, head_width: int) -> None:
        super().__init__()
        powers = torch.arange(0, head_width, 2, dtype=torch.float32) / head_width
        self.freqs = nn.Parameter(10000**-powers, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Rotates ``[..., T, D]`` by the positions 0..T-1."""
        wide = torch.promote_types(x.dtype, torch.float32)
        angles = torch.arange(x.shape[-2], device=x.device, dtype=wide)[:, None] * self.freqs.to(wide)
        even, odd = x.to(wide).unflatten(-1, (-1, 2)).unbind(-1)
        turned = (even * angles.cos() - odd * angles.sin(), odd * angles.cos() + even * angles.sin())
        return torch.stack(turned, dim=-1).flatten(-2).to(x.dtype)


class SelfAttention(nn.Module):
    """Attention of tokens ``[N, L, C]`` to each other, with normalised queries and keys."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm, self.k_norm = (nn.RMSNorm(width // heads, eps=EPSILON) for _ in range(2))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rotary: Rotary | None) -> Tensor:
        query, key, value = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key = self.q_norm(query), self.k_norm(key)
        if rotary is not None:
            query, key = rotary(query), rotary(key)
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attention of tokens ``[B, N, C]`` to text ``[B, L, C]``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_linear = nn.Linear(width, width)
        self.kv_linear = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        query = self.q_linear(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        key, value = self.kv_linear(text).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None])
        return self.proj(attended.transpose(1, 2).flatten(2))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm of tokens ``[B, T, S, C]``, with a shift and a scale ``[B, T or 1, 1, C]`` of the time."""
    return F.layer_norm(x, x.shape[-1:], eps=EPSILON) * (1 + scale) + shift


class Block(nn.Module):
    """Self-attention in space or in time, attention to the text, MLP."""

    def __init__(self, config: STDiT3Config) -> None:
        super().__init__()
        width = config.hidden_size
        self.scale_shift_table = nn.Parameter(torch.zeros(6, width))
        self.attn = SelfAttention(width, config.num_heads)
        self.cross_attn = CrossAttention(width, config.num_heads)
        self.mlp = Mlp(width, int(config.mlp_ratio * width), width)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor, time: Tensor, rotary: Rotary | None) -> Tensor:
        """Tokens ``[B, T, S, C]``; with a rotary embedding attention runs along T, without along S.

        Args:
            x: Tokens.
            text: ``[B, L, C]``.
            mask: Which of the text is real, ``[B, L]`` bool.
            time: ``[B, 1 or T, 6, C]``, the same for every block.
            rotary: Of temporal blocks.
        """
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (self.scale_shift_table + time)[:, :, None].unbind(3)
        normed = modulate(x, shift, scale)
        if rotary is None:
            attended = self.attn(normed.flatten(0, 1), None).view_as(x)
        else:
            columns = normed.transpose(1, 2)  # [B, S, T, C]
            attended = self.attn(columns.flatten(0, 1), rotary).view_as(columns).transpose(1, 2)
        x = x + gate * attended
        x = x + self.cross_attn(x.flatten(1, 2), text, mask).view_as(x)
        normed = modulate(x, mlp_shift, mlp_scale)
        return x + mlp_gate * self.mlp(normed)


class FinalLayer(nn.Module):
    """From tokens to the values of their patches."""

    def __init__(self, width: int, values: int) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.zeros(2, width))
        self.linear = nn.Linear(width, values)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """``[B, T, S, values]`` of tokens and of their ``time [B, C]``."""
        return self.linear(self.normed(x, time))

    def normed(self, x: Tensor, time: Tensor) -> Tensor:
        """The tokens as ``linear`` gets them."""
        shift, scale = (self.scale_shift_table + time[:, None]).unflatten(0, (-1, 1, 1)).unbind(3)
        return modulate(x, shift, scale)


class PatchEmbedder(nn.Module):
    """Patches of latents as tokens."""

    def __init__(self, config: STDiT3Config) -> None:
        super().__init__()
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, config.patch_size, stride=config.patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, rows, columns, C]``; what does not fill a patch is filled with zeros behind."""
        missing = [-size % patch for size, patch in zip(x.shape[2:], self.proj.kernel_size, strict=True)]
        return self.proj(F.pad(x, [0, missing[2], 0, missing[1], 0, missing[0]])).permute(0, 2, 3, 4, 1)


def positions(rows: int, columns: int, width: int, scale: float, dtype: torch.dtype) -> Tensor:
    """Where a token is, ``[rows * columns, width]``: sinusoids of the column, then of the row.

    Both run to the same end, so that the picture is square; ``scale`` is its size in units of the one on which
    positions are counted one by one.
    """
    base = round((rows * columns) ** 0.5)
    frequencies = 10000 ** -(torch.arange(width // 4, dtype=dtype) / (width // 4))

    def encoded(count: int) -> Tensor:
        angles = torch.arange(count, dtype=dtype)[:, None] * (base / count / scale) * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    across, down = encoded(columns).expand(rows, -1, -1), encoded(rows)[:, None].expand(-1, columns, -1)
    return torch.cat([across, down], dim=2).flatten(0, 1)


class STDiT3(nn.Module):
    """Predicts the velocity from noise to data of latents.

    Args:
        config: Sizes.
    """

    def __init__(self, config: STDiT3Config) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        width, patch = config.hidden_size, math.prod(config.patch_size)
        self.x_embedder = PatchEmbedder(config)
        self.t_embedder, self.fps_embedder = (NumberEmbedder(width) for _ in range(2))
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.y_embedder = CaptionEmbedder(config.caption_channels, width, config.model_max_length)
        self.rope = Rotary(width // config.num_heads)
        self.spatial_blocks, self.temporal_blocks = (
            nn.ModuleList(Block(config) for _ in range(config.depth)) for _ in range(2)
        )
        self.final_layer = FinalLayer(width, patch * config.out_channels)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute each block in the backward pass instead of keeping what is inside it."""
        self.gradient_checkpointing = True

    def disable_gradient_checkpointing(self) -> None:
        self.gradient_checkpointing = False

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        text: Tensor,
        mask: Tensor,
        fps: Tensor,
        size: tuple[float, float],
        clean: Tensor | None = None,
    ) -> Tensor:
        """The velocity and, with ``pred_sigma``, as many channels that mean nothing here.

        Args:
            x: Noisy latents ``[B, C, T, H, W]``.
            timestep: ``[B]``, 1000 noise, 0 data.
            text: ``[B, L, caption_channels]``.
            mask: Which of the text is real, ``[B, L]`` bool.
            fps: Frames a second ``[B]``.
            size: Height and width of the video in pixels.
            clean: ``[B, T]`` bool, frames that are given and hold no noise; None if there are none.

        Returns:
            ``[B, out_channels, T, H, W]``.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        tokens = self.x_embedder(x)
        rows, columns, width = tokens.shape[2:]
        scale = (size[0] * size[1]) ** 0.5 / self.config.input_sq_size
        tokens = tokens.flatten(2, 3) + positions(rows, columns, width, scale, wide).to(tokens)
        rate = self.fps_embedder(fps.to(wide))
        noisy, still = (self.t_embedder(t.to(wide)) + rate for t in (timestep, torch.zeros_like(timestep)))
        time = noisy[:, None]
        if clean is not None:
            time = torch.where(clean[:, :, None], still[:, None], time)
        modulation = self.t_block(time).unflatten(2, (6, -1))
        text = self.y_embedder(text)
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            for block, rotary in ((spatial, None), (temporal, self.rope)):
                if self.gradient_checkpointing and torch.is_grad_enabled():
                    tokens = checkpoint(block, tokens, text, mask, modulation, rotary, use_reentrant=False)
                else:
                    tokens = block(tokens, text, mask, modulation, rotary)
        values = self.final_layer(tokens, noisy)
        if clean is not None:  # the published network norms these tokens twice; it has learnt so
            given = self.final_layer(self.final_layer.normed(tokens, noisy), still)
            values = torch.where(clean[:, :, None, None], given, values)
        return self._unpatched(values.unflatten(2, (rows, columns)))[..., : x.shape[2], : x.shape[3], : x.shape[4]]

    def _unpatched(self, values: Tensor) -> Tensor:
        """``[B, C, T, H, W]`` of ``[B, T, rows, columns, values]``, whose channels run fastest within a patch."""
        values = values.unflatten(4, (*self.config.patch_size, -1))  # [B, T, R, S, t, r, s, C]
        return values.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
