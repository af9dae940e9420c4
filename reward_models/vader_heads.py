"""VADER's heads on CLIP ViT-L/14 (arXiv 2407.08737): how well a frame compresses as JPEG, how rainy it is, how snowy.

A small network reads the image embedding scaled to length 1. Frames are squashed to a square with a bilinear filter, as
VADER does. No prompt is read. The heads are those of RewardMultiverse (github.com/RewardMultiverse/reward-multiverse).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..files import WeightFileError
from ..hub import RemoteFile
from .aesthetic import Tower, clip_tower
from .clip_score import CLIP_L14
from .files import Part, Request, RewardEntry
from .networks import linear_chain, read_config, read_weights
from .preprocess import normalize, squash
from .scoring import FrameReward

COMPRESSIBILITY = "jpeg_compressibility"


class HeadJudge(nn.Module):
    """An :class:`.scoring.ImageJudge`.

    Args:
        tower: Gives the embedding.
        head: From the embedding, of length 1, to one number.
        sign: -1 where VADER minimises the number, so that higher is better.
    """

    def __init__(self, tower: Tower, head: nn.Module, *, sign: int = 1) -> None:
        super().__init__()
        self.tower, self.network, self.head, self.sign = tower, tower.network, head, sign

    def forward(self, images: Tensor, texts: Sequence[None]) -> Tensor:
        pixels = normalize(squash(images, self.tower.size, "bilinear"), self.tower.mean, self.tower.std)
        embedding = self.tower.embed(pixels.to(self.network.dtype))
        wide = torch.promote_types(embedding.dtype, torch.float32)
        return self.sign * self.head(F.normalize(embedding.to(wide), dim=-1))[:, 0]


def weather_head(tensors: Mapping[str, Tensor], source: object, width: int, dtype: torch.dtype) -> nn.Sequential:
    """Linear layers without activation between, and a sigmoid behind: 0 to 1.

    Raises:
        WeightFileError: Another head.
    """
    if _numbers(tensors) != [0, 2, 4, 6, 7]:
        raise WeightFileError(f"{source} is no head for rain or snow; get rainy_reward.pt or snowy_reward.pt of VADER")
    return nn.Sequential(linear_chain(tensors, source, width, dtype), nn.Sigmoid())


def compression_head(tensors: Mapping[str, Tensor], source: object, width: int, dtype: torch.dtype) -> nn.Sequential:
    """Linear layers with ReLU between: the size of the picture as JPEG of quality 95, in kilobytes.

    The published file has layers of 512, 128 and 32, VADER's code one more of 256: the file decides.

    Raises:
        WeightFileError: Another head.
    """
    numbers = _numbers(tensors)
    if not numbers or numbers != list(range(0, 3 * len(numbers), 3)):  # between: ReLU and dropout
        raise WeightFileError(f"{source} is no head for compressibility; get compression_reward.pt of VADER")
    first, *rest = linear_chain(tensors, source, width, dtype)
    return nn.Sequential(first, *chain.from_iterable((nn.ReLU(), layer) for layer in rest))


def _numbers(tensors: Mapping[str, Tensor]) -> list[int]:
    """Of the layers, from names such as ``layers.3.weight``."""
    return sorted({int(number) for key in tensors for number in re.findall(r"^layers\.(\d+)\.", key)})


def _load(request: Request) -> FrameReward:
    folder, head = request.files["tower"], request.files["head"]
    weights = folder / "model.safetensors"
    tower = clip_tower(read_weights(weights), read_config(folder), weights, request.dtype)
    compresses = request.name == COMPRESSIBILITY
    make = compression_head if compresses else weather_head
    wide = torch.promote_types(request.dtype, torch.float32)
    judge = HeadJudge(tower, make(read_weights(head), head, tower.width, wide), sign=-1 if compresses else 1)
    return FrameReward(judge.to(request.device), request.name, reads_prompt=False)


def _entry(file: str, sha256: str, size: int, summary: str) -> RewardEntry:
    url = f"https://github.com/mihirp1998/VADER/raw/adaf2ef74763bd84dafaafe1eed98e209fae1843/assets/{file}"
    head = Part(file, RemoteFile(url, sha256=sha256, size=size))
    return RewardEntry(_load, summary, "head: none stated; CLIP ViT-L/14: MIT", {"head": head, "tower": CLIP_L14})


ENTRIES = {
    COMPRESSIBILITY: _entry(
        "compression_reward.pt",
        "4834909306ec3fd210805ad9eed6506338417ecf898aab7fa2d13f9c32ea2b2d",
        1857371,
        "VADER's JPEG compressibility: minus the estimated kilobytes; reads no prompt",
    ),
    "rainy": _entry(
        "rainy_reward.pt",
        "bfa1e0f38d6a8ed08637a72a141ea26fefe05632f5c160e952aa903f24ff80d3",
        3715200,
        "VADER's rain (0 to 1); reads no prompt",
    ),
    "snowy": _entry(
        "snowy_reward.pt",
        "dae251d2b71dd08b8d43f9ea8b2550ac60159ed02f54bede6162b0108d54f991",
        3715200,
        "VADER's snow (0 to 1); reads no prompt",
    ),
}
