"""Where diffusers' ``EasyAnimateTransformer3DModel`` computes otherwise than the published model, the published way."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .rotary import rotary_tables

BASE_LATENTS = (60, 90)
"""Latent height and width the positions are counted on, whatever ``sample_height`` and ``sample_width`` say."""


def as_published(transformer: nn.Module) -> nn.Module:
    """Put :class:`Rotary` and :class:`SharedAttention` into diffusers' class."""
    config = transformer.config
    transformer.rope_embedding = Rotary(config.patch_size, config.attention_head_dim)
    for block in transformer.transformer_blocks:
        if block.txt_ff is None:
            block.attn1.set_processor(SharedAttention())
    return transformer


class Rotary(nn.Module):
    """For ``rope_embedding``, whose tables are not those the model was trained with."""

    def __init__(self, patch_size: int, head_dim: int) -> None:
        super().__init__()
        self._patch, self._head_dim = patch_size, head_dim

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Tables for latents ``[B, C, t, h, w]``."""
        t, h, w = latents.shape[2:]
        base = (BASE_LATENTS[0] // self._patch, BASE_LATENTS[1] // self._patch)
        return rotary_tables(self._head_dim, (t, h // self._patch, w // self._patch), base, latents.device)


class SharedAttention:
    """Attention of the blocks where text and video share all weights: half of the 7b models'.

    diffusers leaves the text without the output projection there.
    """

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Video and text after attention, from ``[B, N, C]`` and ``[B, L, C]``."""
        from diffusers.models.embeddings import apply_rotary_emb

        words = encoder_hidden_states.shape[1]
        joined = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        query, key, value = (
            project(joined).unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = (x if norm is None else norm(x) for x, norm in ((query, attn.norm_q), (key, attn.norm_k)))
        if image_rotary_emb is not None:
            query, key = (
                torch.cat([x[:, :, :words], apply_rotary_emb(x[:, :, words:], image_rotary_emb)], dim=2)
                for x in (query, key)
            )
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        output = attn.to_out[0](output.transpose(1, 2).flatten(2))
        return output[:, words:], output[:, :words]
