"""What travels along the wires between our nodes. All of it is immutable, because ComfyUI caches outputs."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass

from comfy_api.latest import io

from ..lora.adapter import LoraUse
from ..lora.files import LoraFile
from ..reward_models.protocol import Reward
from ..training.job import ModelSource, RewardSource
from ..video_models.protocol import VideoModel

VideoModelType = io.Custom("REWARD_LORA_VIDEO_MODEL")
RewardType = io.Custom("REWARD_LORA_REWARD")
LoraType = io.Custom("REWARD_LORA_LORA")
"""A :class:`..lora.files.LoraFile`."""


@dataclass(frozen=True)
class LoadedModel:
    """A video model and the LoRAs to use with it.

    Many nodes may hold the same loaded model, so a LoRA is a wish here, and becomes an adapter only while
    a node works (:func:`..lora.adapter.applied`).

    Attributes:
        model: Loaded once, shared.
        identity: What was loaded, and in which number type.
        uses: LoRAs in the order they were applied.
        source: How another process can load it; None if it cannot.
    """

    model: VideoModel
    identity: str
    uses: tuple[LoraUse, ...] = ()
    source: ModelSource | None = None

    def with_lora(self, use: LoraUse) -> LoadedModel:
        return dataclasses.replace(self, uses=(*self.uses, use))

    def fingerprint(self) -> list:
        """Plain data that differs whenever the model would paint otherwise."""
        uses = ([lora_digest(u.lora), u.strength, u.expert, u.start, u.end] for u in self.uses)
        return [self.identity, *uses]


@dataclass(frozen=True)
class LoadedReward:
    """A reward and where it came from.

    Attributes:
        reward: Loaded once, shared.
        identity: Its name and path.
        source: How another process can load it; None if it cannot.
    """

    reward: Reward
    identity: str
    source: RewardSource | None = None


def lora_digest(lora: LoraFile) -> str:
    """Hash of a LoRA's weights."""
    digest = hashlib.sha256()
    for name in sorted(lora.names):
        parts = []
        if module := lora.modules.get(name):
            digest.update(f"{name} {module.alpha}".encode())
            parts += [module.down, module.up]
        if offset := lora.offsets.get(name):
            digest.update(f"{name} {offset.weight is None}".encode())
            parts += [value for value in (offset.weight, offset.bias) if value is not None]
        for matrix in parts:
            digest.update(matrix.float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def split_lines(text: str) -> list[str]:
    """Prompts written one a line."""
    return [line.strip() for line in text.splitlines() if line.strip()]
