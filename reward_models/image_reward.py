"""ImageReward (arXiv 2304.05977): what people prefer among pictures of a prompt, about -2 to 2; a held-out judge.

A BLIP (arXiv 2201.12086): the text encoder attends to the tokens of a ViT-L/16, linear layers read its first token,
and the result is shifted and scaled to mean 0 and deviation 1 on the authors' data. Frames by short side and centre
crop. The published file is read into transformers' BLIP classes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn

from ..files import WeightFileError
from ..hub import RemoteFile
from .files import Part, Repository, Request, RewardEntry
from .networks import below, build, linear_chain, read_json, read_weights, tokenizer_of
from .preprocess import CLIP_MEAN, CLIP_STD, normalize, resize_and_crop
from .scoring import FrameReward

MEAN, DEVIATION = 0.16717362830052426, 1.0333394966054072
TEXT_LENGTH = 35
HEAD_WIDTH = 64
"""Of an attention head in every BLIP; the file does not say it."""
VISION_NAMES = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^blocks\.(\d+)\.norm(\d)\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
    (r"^norm\.", "post_layernorm."),
)
"""From the names of the published file to those of transformers; the text encoder's are the same."""


class ImageRewardJudge(nn.Module):
    """An :class:`.scoring.ImageJudge`.

    Args:
        vision: ``transformers.BlipVisionModel``.
        text: ``transformers.BlipTextModel`` with cross attention.
        head: From the text's first token to one number; float32 or better.
        tokenize: A text to ids ``[1, 35]``, padded with 0.
    """

    def __init__(self, vision: nn.Module, text: nn.Module, head: nn.Module, tokenize: Callable[[str], Tensor]) -> None:
        super().__init__()
        self.vision, self.text, self.head, self.tokenize = vision, text, head, tokenize

    def forward(self, images: Tensor, texts: Sequence[Tensor]) -> Tensor:
        pixels = normalize(resize_and_crop(images, self.vision.config.image_size), CLIP_MEAN, CLIP_STD)
        seen = self.vision(pixel_values=pixels.to(self.vision.dtype)).last_hidden_state
        ids = torch.stack(list(texts))
        read = self.text(
            input_ids=ids,
            attention_mask=(ids != 0).long(),
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device),
        ).last_hidden_state[:, 0]
        score = self.head(read.to(torch.promote_types(read.dtype, torch.float32)))[:, 0]
        return (score - MEAN) / DEVIATION

    def encode_text(self, prompt: str) -> Tensor:
        return self.tokenize(prompt)[0].to(next(self.text.parameters()).device)


def build_vision(tensors: Mapping[str, Tensor], source: object, dtype: torch.dtype) -> nn.Module:
    """The ViT of an ``ImageReward.pt``, its size read from the shapes.

    Raises:
        WeightFileError: It is not there, or not whole.
    """
    from transformers import BlipVisionConfig, BlipVisionModel

    named = {}
    for name, tensor in below(tensors, "blip.visual_encoder.").items():
        for old, new in VISION_NAMES:
            name = re.sub(old, new, name)
        named[name] = tensor
    try:
        width, _, patch, _ = named["embeddings.patch_embedding.weight"].shape
        side = isqrt(named["embeddings.position_embedding"].shape[1] - 1)
        depth = 1 + max(int(name.split(".")[2]) for name in named if name.startswith("encoder.layers."))
        hidden = named["encoder.layers.0.mlp.fc1.weight"].shape[0]
    except (KeyError, ValueError, IndexError):
        raise WeightFileError(f"{source} holds no ViT of an ImageReward; get ImageReward.pt") from None
    settings = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=depth,
        num_attention_heads=max(1, width // HEAD_WIDTH),
        image_size=side * patch,
        patch_size=patch,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
        attention_dropout=0.0,
    )
    return build(lambda: BlipVisionModel(settings), named, source, dtype)


def build_text(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], source: object, dtype: torch.dtype
) -> nn.Module:
    """The BERT with cross attention of an ``ImageReward.pt``; ``config`` is ``med_config.json``."""
    from transformers import BlipTextConfig, BlipTextModel

    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    same += ("max_position_embeddings", "hidden_act", "layer_norm_eps", "pad_token_id")
    key = "blip.text_encoder.encoder.layer.0.crossattention.self.key.weight"
    try:
        settings = BlipTextConfig(
            **{name: config[name] for name in same},
            encoder_hidden_size=tensors[key].shape[1],
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            is_decoder=True,  # what makes transformers build the cross attention; the mask stays bidirectional
        )
    except KeyError as error:
        raise WeightFileError(f"{source} and its med_config.json lack {error}; get both published files") from None
    named = below(tensors, "blip.text_encoder.")
    return build(lambda: BlipTextModel(settings, add_pooling_layer=False), named, source, dtype)


def _load(request: Request) -> FrameReward:
    file, config = request.files["model"], read_json(request.files["config"])
    tensors, dtype = read_weights(file), request.dtype
    vision, text = build_vision(tensors, file, dtype), build_text(tensors, config, file, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    head = linear_chain(below(tensors, "mlp."), file, text.config.hidden_size, wide)
    tokenize = tokenizer_of(request.files["tokenizer"], TEXT_LENGTH)
    return FrameReward(ImageRewardJudge(vision, text, head, tokenize).to(request.device), request.name)


ENTRIES = {
    "image_reward": RewardEntry(
        _load,
        "ImageReward on its published scale (about -2 to 2); a held-out judge",
        "Apache-2.0",
        {
            "model": Part("ImageReward.pt", RemoteFile("hf:THUDM/ImageReward/ImageReward.pt")),
            "config": Part("med_config.json", RemoteFile("hf:THUDM/ImageReward/med_config.json")),
            "tokenizer": Part(
                "bert-base-uncased",
                Repository(
                    "google-bert/bert-base-uncased", ("tokenizer.json", "tokenizer_config.json"), ("vocab.txt",)
                ),
            ),
        },
    )
}
