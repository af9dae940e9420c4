"""What the networks are told of a batch: the denoiser its texts and images, the reward what to compare with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..reward_models.protocol import Reward
from ..video_models.protocol import Conditioning, Tick, VideoModel
from .config import TrainConfig
from .examples import Example, Picture, Store, clip, still, together
from .prompts import EmbeddingStore


class Inputs:
    """Conditioning and references of batches; what was encoded or read stays in memory up to a bound.

    Args:
        model: Encodes.
        config: Settings with every default filled in.
        tick: Called before every call of a large model.
        cache: Folder for text embeddings; None keeps them in memory.
    """

    def __init__(self, model: VideoModel, config: TrainConfig, tick: Tick, cache: Path | None) -> None:
        self._model, self._config, self._tick = model, config, tick
        self._latent_shape = model.spec.latent_shape(config.width, config.height, config.frames)
        self._texts, self._pictures = EmbeddingStore(model, cache), Store()

    def prepare(self, examples: Sequence[Example]) -> None:
        """Encode every prompt."""
        guided = self._config.guidance_scale != 1
        prompts = [example.prompt for example in examples]
        self._texts.prepare([*prompts, *([self._config.negative_prompt] if guided else [])], self._tick)

    def any_text(self) -> Tensor:
        """The embedding of one of the prompts, for its shape."""
        return self._texts.any()

    def conditioning(self, examples: Sequence[Example]) -> Conditioning:
        """Of a batch, where the denoiser works. With images it is made example by example, and kept."""
        if not any(example.pictures.keys() - {"reference"} for example in examples):
            self._tick("rollout")  # the denoiser is where the conditioning shall be
            return self._model.conditioning(*self._embeddings(examples), self._latent_shape)
        parts = [
            self._pictures.get(f"given {replace(e, reference=None).identity}", partial(self._given, e))
            for e in examples
        ]
        self._tick("rollout")
        device = self._model.device
        return Conditioning(
            *({key: torch.cat([part[key] for part in same]).to(device) for key in same[0]}
              for same in zip(*parts, strict=True))
        )  # fmt: skip

    def _given(self, example: Example) -> list[Mapping[str, Tensor]]:
        """The branches of one example's conditioning, on the CPU."""
        self._tick("decode")  # the VAE, which encodes the images, is where it works
        c, pictures = self._config, example.pictures
        images = {name: still(pictures[name], c.width, c.height) for name in pictures if name != "reference"}
        made = self._model.conditioning(*self._embeddings([example]), self._latent_shape, **images)
        branches = [made.positive] if made.negative is None else [made.positive, made.negative]
        return [{key: value.cpu() for key, value in branch.items()} for branch in branches]

    def _embeddings(self, examples: Sequence[Example]) -> tuple[list[Tensor], list[Tensor] | None]:
        """Of the prompts, and with guidance of the negative prompt as often."""
        guided = self._config.guidance_scale != 1
        negative = [self._texts[self._config.negative_prompt]] * len(examples) if guided else None
        return [self._texts[example.prompt] for example in examples], negative

    def reference(self, examples: Sequence[Example], reward: Reward) -> Tensor | None:
        """What the reward compares a batch with, ``[B, 3, T, H, W]`` on the CPU, if it compares at all."""
        if "reference" not in reward.needs:
            return None
        c = self._config

        def read(picture: Picture) -> list[Mapping[str, Tensor]]:
            return [{"frames": clip(picture, c.width, c.height, c.frames)}]

        kept = [self._pictures.get(f"reference {e.reference.digest}", partial(read, e.reference)) for e in examples]
        return together([one["frames"] for (one,) in kept])
