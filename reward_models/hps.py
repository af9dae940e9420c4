"""HPS v2 (arXiv 2306.09341): CLIP ViT-H/14 fine-tuned on human preferences; plain cosine, about 0.2 to 0.35.

Three ways to bring a frame to 224x224: ``official``, that of HPSv2's own package (long side, black bars);
``videox-fun``, that of VideoX-Fun's training (squashed); ``vader``, that of VADER's (squashed, bilinear). The first two
agree on square frames alone, and scores of one are not comparable with those of another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..hub import RemoteFile
from .clip_score import cosine
from .files import Part, Request, RewardEntry
from .networks import build, read_weights
from .preprocess import CLIP_MEAN, CLIP_STD, normalize, resize_and_pad, squash
from .scoring import FrameReward

PREPROCESSING: dict[str, Callable[[Tensor, int], Tensor]] = {
    "official": resize_and_pad,
    "videox-fun": squash,
    "vader": partial(squash, mode="bilinear"),
}
ARCHITECTURE = "ViT-H-14"


class HpsJudge(nn.Module):
    """An :class:`.scoring.ImageJudge`.

    Args:
        clip: ``open_clip.CLIP``.
        tokenize: A text to ids ``[1, L]``.
        preprocessing: A key of :data:`PREPROCESSING`.
    """

    def __init__(self, clip: nn.Module, tokenize: Callable[[str], Tensor], preprocessing: str = "official") -> None:
        super().__init__()
        self.clip, self.tokenize, self.fit = clip, tokenize, PREPROCESSING[preprocessing]

    def forward(self, images: Tensor, texts: Sequence[Tensor]) -> Tensor:
        pixels = normalize(self.fit(images, self.clip.visual.image_size[0]), CLIP_MEAN, CLIP_STD)
        return cosine(self.clip.encode_image(pixels.to(self.clip.logit_scale.dtype)), torch.stack(list(texts)))

    def encode_text(self, prompt: str) -> Tensor:
        return self.clip.encode_text(self.tokenize(prompt).to(self.clip.logit_scale.device))[0]


class ForClassToken(nn.Module):
    """The last block of a vision tower, computed for the class token alone: nobody reads the others after it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``[N, L, width]``, in older releases ``[L, N, width]``, to L = 1."""
        block = self.block
        first = (slice(None), slice(1)) if block.attn.batch_first else slice(1)
        normed = block.ln_1(x)
        x = x[first] + block.ls_1(block.attn(normed[first], normed, normed, need_weights=False)[0])
        return x + block.ls_2(block.mlp(block.ln_2(x)))


def build_hps(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], source: object, dtype: torch.dtype
) -> nn.Module:
    """``open_clip.CLIP`` of a configuration in open_clip's terms."""
    from open_clip import CLIP

    clip = build(lambda: CLIP(**config), tensors, source, dtype)
    blocks = clip.visual.transformer.resblocks
    blocks[-1] = ForClassToken(blocks[-1])
    return clip


def _load(request: Request) -> FrameReward:
    import open_clip

    path = request.files["weights"]
    clip = build_hps(read_weights(path), open_clip.get_model_config(ARCHITECTURE), path, request.dtype)
    length = clip.context_length
    judge = HpsJudge(clip, lambda text: open_clip.tokenize([text], length), request.options["preprocessing"])
    return FrameReward(judge.to(request.device), request.name)


def _entry(version: str, file: str) -> RewardEntry:
    return RewardEntry(
        _load,
        f"HPS {version}, human preference, plain cosine (about 0.2 to 0.35)",
        "Apache-2.0",
        {"weights": Part(file, RemoteFile(f"hf:xswu/HPSv2/{file}"))},
        {"preprocessing": tuple(PREPROCESSING)},
    )


ENTRIES = {
    "hps_v2.1": _entry("v2.1", "HPS_v2.1_compressed.pt"),
    "hps_v2": _entry("v2.0", "HPS_v2_compressed.pt"),
}
