"""VADER's object removal (arXiv 2407.08737): 1 minus how sure a YOLOS detector (arXiv 2106.00666) is of an object.

A frame's reward is ``1 - mean score of the boxes of the target``; boxes count from a score of 0.2. A frame without such
a box has reward 1 and no gradient. VADER's own code forgets the frames before one without a box; here every frame
counts alike. Grounding DINO, VADER's other detector, is not offered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .files import Part, Repository, Request, RewardEntry
from .networks import build_renamed, read_config, read_weights
from .preprocess import IMAGENET_MEAN, IMAGENET_STD, normalize
from .scoring import FrameReward

HEIGHT = 512
THRESHOLD = 0.2
RENAMED = {"encoder.mid_position_embeddings": "encoder.interpolation.mid_position_embeddings"}
"""Published names, and what later versions of transformers made of them."""


class RemovalJudge(nn.Module):
    """An :class:`.scoring.ImageJudge`: 1 minus the mean score of the target's boxes.

    Args:
        detector: ``transformers.YolosForObjectDetection``.
        target: A label of its configuration, such as ``book``.

    Raises:
        ValueError: The detector does not know the target.
    """

    def __init__(self, detector: nn.Module, target: str) -> None:
        super().__init__()
        self.detector, self.label = detector, label_of(detector.config.id2label, target)

    def forward(self, images: Tensor, texts: Sequence[None]) -> Tensor:
        width = HEIGHT * images.shape[-1] // images.shape[-2]
        resized = F.interpolate(images, (HEIGHT, width), mode="bilinear")
        pixels = normalize(resized, IMAGENET_MEAN, IMAGENET_STD)
        logits = self.detector(pixel_values=pixels.to(self.detector.dtype)).logits
        shares = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)[..., :-1]  # last: no object
        best, labels = shares.max(-1)
        boxes = (labels == self.label) & (best > THRESHOLD)
        return 1 - (best * boxes).sum(1) / boxes.sum(1).clamp(min=1)


def label_of(labels: Mapping[int, str], name: str) -> int:
    """The number of a label.

    Raises:
        ValueError: There is none of this name.
    """
    for number, label in labels.items():
        if label.lower() == name.strip().lower():
            return int(number)
    known = ", ".join(sorted({label for label in labels.values() if label != "N/A"}))
    given = f"it does not know {name!r}" if name else "none is given"
    raise ValueError(f"object_removal needs the option target, the name of an object, and {given}; choose from {known}")


def build_detector(
    tensors: Mapping[str, Tensor], config: Mapping, source: object, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """``transformers.YolosForObjectDetection`` of a publisher's ``config.json``."""
    from transformers import YolosConfig, YolosForObjectDetection

    settings = YolosConfig.from_dict(dict(config))
    return build_renamed(lambda: YolosForObjectDetection(settings), tensors, RENAMED, source, dtype)


def _load(request: Request) -> FrameReward:
    folder = request.files["detector"]
    weights = folder / "model.safetensors"
    detector = build_detector(read_weights(weights), read_config(folder), weights, request.dtype)
    judge = RemovalJudge(detector, request.options["target"])
    return FrameReward(judge.to(request.device), request.name, reads_prompt=False)


ENTRIES = {
    "object_removal": RewardEntry(
        _load,
        "VADER's object removal with YOLOS: 1 minus the detector's score for the target (0..1); reads no prompt",
        "YOLOS: Apache-2.0",
        {"detector": Part("yolos-base", Repository("hustvl/yolos-base", ("config.json", "model.safetensors")))},
        options={"target": ()},
    )
}
