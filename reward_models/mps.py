"""MPS, Multi-dimensional Preference Score (arXiv 2405.14705): CLIP ViT-H/14 whose image tokens look at the prompt.

A text that names what to judge (the condition) decides which tokens of the prompt count; four cross layers let the
image read those; the score is the cosine between the prompt and the image's class token, about -0.1 to 0.3. Here the
relevance of a token is taken relative to its own prompt, not to the whole batch as in public code: a score never
depends on its neighbours. Frames are squashed to 224x224.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..hub import RemoteFile
from .clip_score import LAION, MORE, TOKENIZER_FILES, build_clip, cosine
from .files import Part, Repository, Request, RewardEntry
from .networks import below, build, read_config, read_weights, tokenizer_of
from .preprocess import CLIP_MEAN, CLIP_STD, normalize, squash
from .scoring import FrameReward

CONDITION = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, "
    "texture, quantity, attributes, position, number, location, word, things."
)
RELEVANT = 0.01
"""A token counts if its relevance exceeds this part of the highest of its prompt."""


class Norm(nn.Module):
    """Layer norm whose bias is a buffer, as published."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.register_buffer("bias", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias)


def swiglu(x: Tensor) -> Tensor:
    """The second half gates the first."""
    value, gate = x.chunk(2, dim=-1)
    return F.silu(gate) * value


class Read(nn.Module):
    """Image tokens attend to prompt tokens, one key and value for all heads; a feed-forward runs beside.

    Args:
        width: Of a token.
        heads: Of the queries.
        head: Width of each.
        hidden: Of the feed-forward.
    """

    def __init__(self, width: int, heads: int, head: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = Norm(width)
        self.to_q = nn.Linear(width, heads * head, bias=False)
        self.to_kv = nn.Linear(width, 2 * head, bias=False)
        self.to_out = nn.Linear(heads * head, width, bias=False)
        self.ff = nn.ModuleDict(
            {"0": nn.Linear(width, 2 * hidden, bias=False), "2": nn.Linear(hidden, width, bias=False)}
        )

    def forward(self, x: Tensor, context: Tensor, keep: Tensor) -> Tensor:
        """``x`` [N, I, width], ``context`` [N, L, width], ``keep`` [N, L] to [N, I, width]."""
        x = self.norm(x)
        read = attend(self.to_q(x), *self.to_kv(context).chunk(2, dim=-1), self.heads, keep[:, None, None])
        return self.to_out(read) + self.ff["2"](swiglu(self.ff["0"](x)))


class Mix(nn.Module):
    """Image tokens attend to each other with rotary positions, a feed-forward beside, one projection for all."""

    def __init__(self, width: int, heads: int, head: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.parts = heads, (heads * head, head, head, 2 * hidden)
        self.norm = Norm(width)
        self.fused_attn_ff_proj = nn.Linear(width, sum(self.parts), bias=False)
        self.attn_out = nn.Linear(heads * head, width, bias=False)
        self.ff_out = nn.ModuleDict({"1": nn.Linear(hidden, width, bias=False)})

    def forward(self, x: Tensor, tokens: int | None = None) -> Tensor:
        """``[N, I, width]`` to the same; only the first ``tokens`` of it are computed, if given."""
        x = self.norm(x)
        weight_q, weight_kv, weight_ff = self.fused_attn_ff_proj.weight.split(
            (self.parts[0], self.parts[1] * 2, self.parts[3])
        )
        first = x[:, :tokens]
        key, value = F.linear(x, weight_kv).chunk(2, dim=-1)
        query = F.linear(first, weight_q).unflatten(-1, (self.heads, -1))
        query = rotate(query.transpose(1, 2)).transpose(1, 2).flatten(2)
        read = attend(query, rotate(key), value, self.heads)
        return self.attn_out(read) + self.ff_out["1"](swiglu(F.linear(first, weight_ff)))


def rotate(x: Tensor) -> Tensor:
    """Rotary positions 0, 1, ... along the last but one dimension, base 10000, halves paired."""
    half = x.shape[-1] // 2
    wide = torch.promote_types(x.dtype, torch.float32)
    speeds = 10000.0 ** (-torch.arange(half, device=x.device, dtype=wide) / half)
    angles = torch.arange(x.shape[-2], device=x.device, dtype=wide)[:, None] * speeds
    cos, sin = angles.cos().to(x), angles.sin().to(x)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, keep: Tensor | None = None) -> Tensor:
    """``query`` [N, I, heads * d]; ``key`` and ``value`` [N, L, d] serve every head. Gives [N, I, heads * d]."""
    query = query.unflatten(-1, (heads, -1)).transpose(1, 2)
    shared = (query.shape[0], heads, -1, -1)
    read = F.scaled_dot_product_attention(
        query, key[:, None].expand(shared), value[:, None].expand(shared), attn_mask=keep
    )
    return read.transpose(1, 2).flatten(2)


class MpsNetwork(nn.Module):
    """The cross layers above a CLIP; sizes as in their weights.

    Args:
        sizes: Width of a token, heads, width of a head, hidden width.
        layers: Their number.
    """

    def __init__(self, sizes: tuple[int, int, int, int], layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([Read(*sizes), Mix(*sizes)]) for _ in range(layers))

    def forward(self, x: Tensor, context: Tensor, keep: Tensor) -> Tensor:
        """The class token ``[N, width]``. The last layer computes no other."""
        for i, (read, mix) in enumerate(self.layers):
            x = x + read(x, context, keep)
            tokens = 1 if i == len(self.layers) - 1 else None
            x = x[:, :tokens] + mix(x, tokens)
        return x[:, 0]


class MpsJudge(nn.Module):
    """An :class:`.scoring.ImageJudge`.

    Args:
        clip: ``transformers.CLIPModel``.
        cross: The layers above it.
        tokenize: A text to ids ``[1, L]``, padded.
    """

    def __init__(self, clip: nn.Module, cross: MpsNetwork, tokenize: Callable[[str], Tensor]) -> None:
        super().__init__()
        self.clip, self.cross, self.tokenize = clip, cross, tokenize
        self._condition: Tensor | None = None

    def forward(self, images: Tensor, texts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        hidden = self.clip.vision_model(pixel_values=self.pixels(images).to(self.clip.dtype)).last_hidden_state
        tokens, whole, keep = (torch.stack(part) for part in zip(*texts, strict=True))
        return cosine(self.cross(self.clip.visual_projection(hidden), tokens, keep), whole)

    def pixels(self, images: Tensor) -> Tensor:
        """What the vision tower sees of ``[N, 3, H, W]``."""
        return normalize(squash(images, self.clip.config.vision_config.image_size), CLIP_MEAN, CLIP_STD)

    def encode_text(self, prompt: str) -> tuple[Tensor, Tensor, Tensor]:
        """The prompt's tokens ``[L, width]``, its summary ``[width]``, and which tokens count ``[L]``."""
        device = self.clip.logit_scale.device
        if self._condition is None or self._condition.device != device:
            self._condition = self._tokens(CONDITION)[0]
        tokens, whole = self._tokens(prompt)
        relevance = (self._condition.float() @ tokens.float().T).amax(0)
        return tokens, whole, relevance / relevance.max() > RELEVANT

    def _tokens(self, text: str) -> tuple[Tensor, Tensor]:
        output = self.clip.text_model(input_ids=self.tokenize(text).to(self.clip.logit_scale.device))
        return self.clip.text_projection(output.last_hidden_state[0]), self.clip.text_projection(
            output.pooler_output[0]
        )


def build_mps(
    tensors: Mapping[str, Tensor], config: Mapping, source: object, dtype: torch.dtype
) -> tuple[nn.Module, MpsNetwork]:
    """CLIP and the layers above it, from weights in their published names.

    Args:
        tensors: ``model.*`` is the CLIP, ``cross_model.*`` the rest.
        config: Of the CLIP, as in its ``config.json``.
        source: Where they are from, for errors.
        dtype: Of the networks.
    """
    clip = build_clip(below(tensors, "model."), config, source, dtype)
    cross = {key.replace(".fn.", "."): value for key, value in below(tensors, "cross_model.").items()}
    width = clip.config.projection_dim
    head = cross["layers.0.0.to_kv.weight"].shape[0] // 2 if "layers.0.0.to_kv.weight" in cross else 64
    heads = cross["layers.0.0.to_q.weight"].shape[0] // head if "layers.0.0.to_q.weight" in cross else 16
    hidden = cross["layers.0.0.ff.2.weight"].shape[1] if "layers.0.0.ff.2.weight" in cross else 4 * width
    layers = len({key.split(".")[1] for key in cross}) or 4
    return clip, build(lambda: MpsNetwork((width, heads, head, hidden), layers), cross, source, dtype)


def _load(request: Request) -> FrameReward:
    path, folder = request.files["weights"], request.files["clip"]
    clip, cross = build_mps(read_weights(path), read_config(folder), path, request.dtype)
    tokenize = tokenizer_of(folder, clip.config.text_config.max_position_embeddings)
    return FrameReward(MpsJudge(clip, cross, tokenize).to(request.device), request.name)


ENTRIES = {
    "mps": RewardEntry(
        _load,
        "MPS, human preference in many dimensions, plain cosine",
        "MPS: not stated (github.com/Kwai-Kolors/MPS); CLIP ViT-H/14: MIT",
        {
            "weights": Part(
                "MPS_overall.pth",
                RemoteFile(
                    "https://pai-aigc-photog.oss-cn-hangzhou.aliyuncs.com/easyanimate/Third_Party/MPS_overall.pth",
                    md5="1491cbbbd20565747fe07e7572e2ac56",
                ),
            ),
            "clip": Part(LAION, Repository(f"laion/{LAION}", ("config.json", *TOKENIZER_FILES), MORE)),
        },
    )
}
