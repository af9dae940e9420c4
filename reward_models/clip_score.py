"""Cosine between a frame and the prompt in a CLIP model: the built-in tiny CLIP, OpenAI's, and PickScore.

PickScore (arXiv 2305.01569) is CLIP ViT-H/14 fine-tuned on human choices; its published score is
``exp(logit_scale) * cosine`` (about 20), while VideoX-Fun trains on the plain cosine (about 0.2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..assets import TINY_CLIP
from .files import Part, Repository, Request, RewardEntry
from .networks import build, read_config, read_weights, tokenizer_of
from .preprocess import CLIP_MEAN, CLIP_STD, normalize, resize_and_crop
from .scoring import FrameReward


class ClipJudge(nn.Module):
    """An :class:`.scoring.ImageJudge`; images by short side and centre crop.

    Args:
        clip: ``transformers.CLIPModel``.
        tokenize: A text to ids ``[1, L]``.
        scaled: Multiply by ``exp(logit_scale)``, the published scale.
    """

    def __init__(self, clip: nn.Module, tokenize: Callable[[str], Tensor], *, scaled: bool = False) -> None:
        super().__init__()
        self.clip, self.tokenize, self.scaled = clip, tokenize, scaled

    def forward(self, images: Tensor, texts: Sequence[Tensor]) -> Tensor:
        pixels = normalize(resize_and_crop(images, self.clip.config.vision_config.image_size), CLIP_MEAN, CLIP_STD)
        pooled = self.clip.vision_model(pixel_values=pixels.to(self.clip.dtype)).pooler_output
        score = cosine(self.clip.visual_projection(pooled), torch.stack(list(texts)))
        return score * self.clip.logit_scale.exp().to(score) if self.scaled else score

    def encode_text(self, prompt: str) -> Tensor:
        ids = self.tokenize(prompt).to(self.clip.logit_scale.device)
        return self.clip.text_projection(self.clip.text_model(input_ids=ids).pooler_output)[0]


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Of the last dimension, in float32 or better."""
    wide = torch.promote_types(a.dtype, torch.float32)
    return (F.normalize(a.to(wide), dim=-1) * F.normalize(b.to(wide), dim=-1)).sum(-1)


def build_clip(tensors: Mapping[str, Tensor], config: Mapping, source: object, dtype: torch.dtype) -> nn.Module:
    """``transformers.CLIPModel`` of the configuration a publisher's ``config.json`` holds."""
    from transformers import CLIPConfig, CLIPModel

    return build(lambda: CLIPModel(CLIPConfig.from_dict(dict(config))), tensors, source, dtype)


def _load(request: Request) -> FrameReward:
    folder = request.files["model"]
    weights = folder / "model.safetensors"
    clip = build_clip(read_weights(weights), read_config(folder), weights, request.dtype)
    length = clip.config.text_config.max_position_embeddings
    tokenize = tokenizer_of(request.files.get("tokenizer", folder), length)
    judge = ClipJudge(clip, tokenize, scaled=request.name.endswith("_scaled"))
    return FrameReward(judge.to(request.device), request.name)


WHOLE = ("config.json", "model.safetensors")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
MORE = ("special_tokens_map.json",)
LAION = "CLIP-ViT-H-14-laion2B-s32B-b79K"
TOKENIZER = Part(LAION, Repository(f"laion/{LAION}", TOKENIZER_FILES, MORE))
CLIP_L14 = Part("clip-vit-large-patch14", Repository("openai/clip-vit-large-patch14", WHOLE + TOKENIZER_FILES, MORE))
PICKSCORE = {
    "model": Part("PickScore_v1", Repository("yuvalkirstain/PickScore_v1", WHOLE)),
    "tokenizer": TOKENIZER,
}

ENTRIES = {
    "tiny_clip": RewardEntry(
        _load,
        "CLIP cosine of the built-in world of coloured shapes",
        "Apache-2.0",
        {"model": Part("tiny_clip", TINY_CLIP)},
    ),
    "pickscore": RewardEntry(_load, "PickScore, plain cosine, as trained on (about 0.2)", "MIT", PICKSCORE),
    "pickscore_scaled": RewardEntry(_load, "PickScore on its published scale (about 20)", "MIT", PICKSCORE),
    "clip_l14": RewardEntry(
        _load, "cosine of frame and prompt in OpenAI's CLIP ViT-L/14 (about 0.25)", "MIT", {"model": CLIP_L14}
    ),
}
