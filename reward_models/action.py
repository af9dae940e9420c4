"""VADER's action reward (arXiv 2407.08737): the probability of an action in VideoMAE's (arXiv 2203.12602) classes.

The classifier sees as many frames as it was trained on, spread evenly over the clip, each squashed to a square. (VADER
shows every second frame of a short clip instead and shortens the position table accordingly.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .files import Part, Repository, Request, RewardEntry
from .networks import build_renamed, read_config, read_weights
from .preprocess import IMAGENET_MEAN, IMAGENET_STD, normalize, squash, unit_range
from .scoring import check_clips

RENAMED = {"attention.q_bias": "attention.query.bias", "attention.v_bias": "attention.value.bias"}
"""Published names, and what later versions of transformers made of them."""
KEYWORDS = {
    "piano": "playing piano",
    "guitar": "playing guitar",
    "doughnut": "eating doughnuts",
    "beer": "drinking beer",
    "badminton": "playing badminton",
    "cello": "playing cello",
    "scooter": "riding scooter",
    "ballet": "dancing ballet",
    "pancake": "flipping pancake",
    "violin": "playing violin",
    "wood": "chopping wood",
    "watermelon": "eating watermelon",
}
"""What VADER's training prompts mention, and the class it takes for it."""


class ActionReward:
    """The softmax probability, 0..1, that a clip shows an action. See :class:`.protocol.Reward`.

    Args:
        classifier: ``transformers.VideoMAEForVideoClassification``.
        action: One of its classes; empty to find one in each prompt (see :func:`find_action`).

    Raises:
        ValueError: The classifier does not know the action.
    """

    name = "action"
    differentiable = True
    per_frame = False

    def __init__(self, classifier: nn.Module, action: str = "") -> None:
        self.classifier = classifier.eval().requires_grad_(False)
        self._labels = {label.lower(): int(number) for number, label in classifier.config.id2label.items()}
        self.action = action.strip().lower()
        if self.action and self.action not in self._labels:
            raise ValueError(f"the option action must be one of {', '.join(self._labels)}, got {action!r}")
        self.needs = frozenset() if self.action else frozenset({"prompt"})

    @property
    def device(self) -> torch.device:
        return next(self.classifier.parameters()).device

    def score(self, frames: Tensor, prompts: Sequence[str], *, reference: Tensor | None = None) -> Tensor:
        """Clips one after the other; frames may also be uint8, 0..255.

        Raises:
            ValueError: No class of the classifier is found in a prompt.
        """
        check_clips(frames, prompts)
        actions = [self.action or find_action(prompt, self._labels) for prompt in prompts]
        scores = [self._probability(clip, self._labels[action]) for clip, action in zip(frames, actions, strict=True)]
        return torch.stack(scores)

    def _probability(self, clip: Tensor, label: int) -> Tensor:
        config = self.classifier.config
        times = torch.linspace(0, clip.shape[1] - 1, config.num_frames).round().long()
        images = unit_range(clip[:, times].transpose(0, 1)).to(self.device)
        pixels = normalize(squash(images, config.image_size, "bilinear"), IMAGENET_MEAN, IMAGENET_STD)
        logits = self.classifier(pixel_values=pixels[None].to(self.classifier.dtype)).logits[0]
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(0)[label].to(clip.device)

    def to(self, device: torch.device | str) -> ActionReward:
        """Move the classifier; returns itself."""
        self.classifier.to(device)
        return self


def find_action(prompt: str, labels: Mapping[str, int]) -> str:
    """The class a prompt names: the one of most words that all stand in it, else by VADER's key words.

    Raises:
        ValueError: There is none.
    """
    words = re.findall(r"\w+", prompt.lower())
    named = [label for label in labels if set(re.findall(r"\w+", label)) <= set(words)]
    if named:
        return max(named, key=lambda label: (len(label.split()), len(label)))
    for word in words:
        label = KEYWORDS.get(word) or KEYWORDS.get(word.removesuffix("s"))
        if label in labels:
            return label
    raise ValueError(
        f"no action of the classifier is named in the prompt {prompt!r}; name one in it, or set the option action, "
        "such as 'playing piano'"
    )


def build_classifier(
    tensors: Mapping[str, Tensor], config: Mapping, source: object, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """``transformers.VideoMAEForVideoClassification`` of a publisher's ``config.json``."""
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    settings = VideoMAEConfig.from_dict(dict(config))
    return build_renamed(lambda: VideoMAEForVideoClassification(settings), tensors, RENAMED, source, dtype)


def _load(request: Request) -> ActionReward:
    folder = request.files["classifier"]
    weights = folder / "model.safetensors"
    wide = torch.promote_types(request.dtype, torch.float32)  # small; its gradients would vanish in half precision
    classifier = build_classifier(read_weights(weights), read_config(folder), weights, wide)
    return ActionReward(classifier.to(request.device), request.options["action"])


NAME = "videomae-base-finetuned-kinetics"
ENTRIES = {
    "action": RewardEntry(
        _load,
        "VADER's action: probability of an action of Kinetics-400 (0..1), named by the option or in the prompt",
        "VideoMAE's weights: CC-BY-NC-4.0",
        {"classifier": Part(NAME, Repository(f"MCG-NJU/{NAME}", ("config.json", "model.safetensors")))},
        options={"action": ()},
    )
}
