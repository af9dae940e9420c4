"""Cosine between a frame and the prompt in a CLIP model: the tiny CLIP of the built-in world, and PickScore.

PickScore (arXiv 2305.01569) is CLIP ViT-H/14 fine-tuned on human choices; its published score is
``exp(logit_scale) * cosine`` (about 20), while VideoX-Fun trains on the plain cosine (about 0.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..files import WeightFileError, read_safetensors
from .files import Part, Repository, Request, RewardEntry
from .preprocess import CLIP_MEAN, CLIP_STD, normalize, resize_and_crop

MAX_FRAMES_AT_ONCE = 32


class ClipScore:
    """Mean over the frames of the cosine between image and text embedding.

    Args:
        model: ``transformers.CLIPModel``.
        tokenizer: Its tokenizer.
        name: For logs and plots.
        scaled: Multiply by ``exp(logit_scale)``, the published scale.
    """

    differentiable = True
    needs = frozenset({"prompt"})

    def __init__(self, model: nn.Module, tokenizer: Any, name: str, *, scaled: bool = False) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer, self.name, self.scaled = tokenizer, name, scaled
        self._texts: dict[str, Tensor] = {}

    @classmethod
    def load(
        cls,
        folder: Path | str,
        name: str,
        *,
        scaled: bool = False,
        device: str = "cpu",
        tokenizer: Path | None = None,
    ) -> ClipScore:
        """Read a folder in the layout of transformers' ``CLIPModel``, weights in safetensors.

        Raises:
            WeightFileError: The weights are missing, damaged, or of another model.
        """
        from transformers import AutoTokenizer, CLIPConfig, CLIPModel

        tensors, _ = read_safetensors(Path(folder) / "model.safetensors")
        model = CLIPModel(CLIPConfig.from_pretrained(folder))
        expected = model.state_dict()
        tensors = {key: value.float() for key, value in tensors.items() if not key.endswith(".position_ids")}
        wrong = [key for key in expected if key not in tensors or tensors[key].shape != expected[key].shape]
        wrong = [key for key in wrong if not key.endswith(".position_ids")] + sorted(tensors.keys() - expected.keys())
        if wrong:
            raise WeightFileError(f"{folder} is no CLIP that fits its config.json: {wrong[0]} is missing or wrong")
        model.load_state_dict(tensors, strict=False)
        return cls(model.to(device), AutoTokenizer.from_pretrained(tokenizer or folder), name, scaled=scaled)

    @property
    def device(self) -> torch.device:
        return self.model.logit_scale.device

    def score(self, frames: Tensor, prompts: Sequence[str], *, reference: Tensor | None = None) -> Tensor:
        """See :class:`.protocol.Reward`. Frames are brought to the model's size by short side and centre crop."""
        if len(prompts) != frames.shape[0]:
            raise ValueError(f"{frames.shape[0]} videos need as many prompts, got {len(prompts)}")
        batch, _, count = frames.shape[:3]
        images = frames.transpose(1, 2).flatten(0, 1).to(self.device)
        size = self.model.config.vision_config.image_size
        pixels = normalize(resize_and_crop(images, size), CLIP_MEAN, CLIP_STD).to(self.model.dtype)
        embeddings = torch.cat([self._embed_images(part) for part in pixels.split(MAX_FRAMES_AT_ONCE)])
        texts = torch.stack([self._embed_text(prompt) for prompt in prompts])
        cosine = (embeddings.view(batch, count, -1) * texts[:, None]).sum(-1).mean(1).float()
        return cosine * self.model.logit_scale.detach().exp().float() if self.scaled else cosine

    def _embed_images(self, pixels: Tensor) -> Tensor:
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output
        return F.normalize(self.model.visual_projection(pooled), dim=-1)

    @torch.no_grad()
    def _embed_text(self, prompt: str) -> Tensor:
        if prompt not in self._texts:  # the text tower is frozen and the prompts of a run are few
            length = self.model.config.text_config.max_position_embeddings
            tokens = self.tokenizer(
                prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            )
            tokens = {
                key: value.to(self.device) for key, value in tokens.items() if key in ("input_ids", "attention_mask")
            }
            pooled = self.model.text_model(**tokens).pooler_output
            self._texts[prompt] = F.normalize(self.model.text_projection(pooled), dim=-1)[0].clone()
        return self._texts[prompt]

    def to(self, device: torch.device | str) -> ClipScore:
        """Move the model; returns itself."""
        self.model.to(device)
        self._texts.clear()
        return self


BUILT_IN = Path(__file__).resolve().parent.parent / "assets" / "tiny_clip"
TOKENIZER = Part(
    "CLIP-ViT-H-14-laion2B-s32B-b79K",
    Repository(
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        ("tokenizer.json", "tokenizer_config.json"),
        ("config.json", "special_tokens_map.json"),
    ),
)
PICKSCORE = {
    "model": Part("PickScore_v1", Repository("yuvalkirstain/PickScore_v1", ("config.json", "model.safetensors"))),
    "tokenizer": TOKENIZER,
}


def _load(request: Request) -> ClipScore:
    return ClipScore.load(
        request.files["model"],
        request.name,
        scaled=request.name.endswith("_scaled"),
        device=request.device,
        tokenizer=request.files.get("tokenizer"),
    )


ENTRIES = {
    "tiny_clip": RewardEntry(
        _load,
        "CLIP cosine of the built-in world of coloured shapes",
        "Apache-2.0",
        {"model": Part("tiny_clip", BUILT_IN)},
    ),
    "pickscore": RewardEntry(_load, "PickScore, plain cosine, as trained on (about 0.2)", "MIT", PICKSCORE),
    "pickscore_scaled": RewardEntry(_load, "PickScore on its published scale (about 20)", "MIT", PICKSCORE),
}
