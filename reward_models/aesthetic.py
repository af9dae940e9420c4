"""How beautiful a picture is, about 1 to 10: a head of linear layers on the embedding of a frozen vision tower.

v2 (github.com/christophschuhmann/improved-aesthetic-predictor) on CLIP ViT-L/14, v2.5
(github.com/discus0434/aesthetic-predictor-v2-5) on SigLIP so400m at 384 pixels. Frames are squashed to a square, as
VideoX-Fun does. No prompt is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..hub import RemoteFile
from .clip_score import CLIP_L14, WHOLE
from .files import Part, Repository, Request, RewardEntry
from .networks import below, build, linear_chain, read_config, read_weights
from .preprocess import CLIP_MEAN, CLIP_STD, normalize, squash
from .scoring import FrameReward

HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Tower:
    """A vision tower.

    Attributes:
        network: The transformers module.
        embed: Its embedding ``[N, width]`` of normalised pixels ``[N, 3, size, size]`` of any precision.
        width: Of the embedding.
        size: Of its pictures.
        mean: Of its pixels, a channel.
        std: The same.
    """

    network: nn.Module
    embed: Callable[[Tensor], Tensor]
    width: int
    size: int
    mean: Sequence[float] = CLIP_MEAN
    std: Sequence[float] = CLIP_STD


class AestheticJudge(nn.Module):
    """An :class:`.scoring.ImageJudge`.

    Args:
        tower: Gives the embedding, which is scaled to length 1.
        head: From it to one number; float32 or better.
    """

    def __init__(self, tower: Tower, head: nn.Module) -> None:
        super().__init__()
        self.tower, self.network, self.head = tower, tower.network, head

    def forward(self, images: Tensor, texts: Sequence[None]) -> Tensor:
        pixels = normalize(squash(images, self.tower.size), self.tower.mean, self.tower.std)
        embedding = self.tower.embed(pixels)
        wide = torch.promote_types(embedding.dtype, torch.float32)
        return self.head(F.normalize(embedding.to(wide), dim=-1))[:, 0]


def clip_tower(tensors: Mapping[str, Tensor], config: Mapping, source: object, dtype: torch.dtype) -> Tower:
    """The vision tower of a CLIP with its projection, from the tensors of a whole CLIP or of the tower alone."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    tensors = {key: value for key, value in tensors.items() if key.startswith(("vision_model.", "visual_projection."))}
    vision = dict(config.get("vision_config", config))
    if "visual_projection.weight" in tensors:
        vision["projection_dim"] = tensors["visual_projection.weight"].shape[0]
    settings = CLIPVisionConfig.from_dict(vision)
    network = build(lambda: CLIPVisionModelWithProjection(settings), tensors, source, dtype)
    width, size = settings.projection_dim, settings.image_size
    return Tower(network, lambda pixels: network(pixel_values=pixels.to(dtype)).image_embeds, width, size)


def siglip_tower(tensors: Mapping[str, Tensor], config: Mapping, source: object, dtype: torch.dtype) -> Tower:
    """The vision tower of a SigLIP, from the tensors of a whole SigLIP or of the tower alone."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    settings = SiglipVisionConfig.from_dict(dict(config.get("vision_config", config)))
    tensors = below(tensors, "vision_model.") or tensors

    def make() -> nn.Module:
        model = SiglipVisionModel(settings)
        return getattr(model, "vision_model", model)  # flat since transformers 5

    network = build(make, tensors, source, dtype)
    width, size = settings.hidden_size, settings.image_size
    return Tower(network, lambda pixels: network(pixel_values=pixels.to(dtype)).pooler_output, width, size, HALF, HALF)


def read_head(tensors: Mapping[str, Tensor], source: object, width: int, dtype: torch.dtype) -> nn.Sequential:
    """The linear layers of either version; they have no activation between, and stay in float32 or better."""
    tensors = {key.replace("_orig_mod.", ""): value for key, value in tensors.items()}  # saved while compiled
    return linear_chain(tensors, source, width, torch.promote_types(dtype, torch.float32))


def _load(request: Request, tower_of: Callable[..., Tower]) -> FrameReward:
    folder, head = request.files["tower"], request.files["head"]
    weights = folder / "model.safetensors"
    tower = tower_of(read_weights(weights), read_config(folder), weights, request.dtype)
    judge = AestheticJudge(tower, read_head(read_weights(head), head, tower.width, request.dtype))
    return FrameReward(judge.to(request.device), request.name, reads_prompt=False)


ENTRIES = {
    "aesthetic_v2": RewardEntry(
        lambda request: _load(request, clip_tower),
        "LAION's aesthetic predictor v2 (about 1 to 10); reads no prompt",
        "head: Apache-2.0; CLIP ViT-L/14: MIT",
        {
            "head": Part(
                "sac+logos+ava1-l14-linearMSE.pth",
                RemoteFile(
                    "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
                    "sac%2Blogos%2Bava1-l14-linearMSE.pth",
                    sha256="21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
                    size=3714759,
                ),
            ),
            "tower": CLIP_L14,
        },
    ),
    "aesthetic_v2.5": RewardEntry(
        lambda request: _load(request, siglip_tower),
        "aesthetic predictor v2.5 on SigLIP (about 1 to 10); reads no prompt",
        "head: AGPL-3.0; SigLIP so400m: Apache-2.0",
        {
            "head": Part(
                "aesthetic_predictor_v2_5.pth",
                RemoteFile(
                    "https://github.com/discus0434/aesthetic-predictor-v2-5/raw/main/models/aesthetic_predictor_v2_5.pth"
                ),
            ),
            "tower": Part("siglip-so400m-patch14-384", Repository("google/siglip-so400m-patch14-384", WHOLE)),
        },
    ),
}
