"""Decoding a clip and the exact gradient of it, at the memory of one chunk of a causal decoder.

A causal video VAE paints chunk after chunk, each from its own latents and from features carried over from the
chunks before. Backwards, latest chunk first, the gradient of what was carried is passed on to the chunk that made it:
the exact vector-Jacobian product, whatever the length of the clip. (Cutting it there gives another gradient.)

What the chunks carried waits for the way back: one boundary's features for every chunk, or, in less memory, those of
every n-th boundary, from which the others are made again, the last stretch first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..video_models.protocol import Carried, Tick, VideoModel


@dataclass(frozen=True)
class Decoder:
    """How a model's latents are decoded.

    Attributes:
        model: The video model.
        tick: Called before every chunk.
        save_memory: Checkpoint the decoder's blocks while the gradient is taken.
        keep_on: Where carried features wait for the way back; None leaves them where they were made.
        keep_every: Of how many boundaries one is kept; the others are decoded again, once each. See :func:`sparse`.
    """

    model: VideoModel
    tick: Tick
    save_memory: bool = False
    keep_on: torch.device | None = None
    keep_every: int = 1

    def split(self, latents: Tensor) -> list[Tensor]:
        """Latents ``[B, C, t, h, w]`` by chunks."""
        return list(latents.split(list(self.model.chunks(latents.shape[2])), dim=2))

    def with_graph(self, latents: Tensor) -> Tensor:
        """Frames of a single chunk, or of all, in one autograd graph."""
        frames, carried = [], ()
        for part in self.split(latents):
            self.tick("decode")
            clip, carried = self.model.decode_chunk(part, carried, save_memory=self.save_memory)
            frames.append(clip)
        return torch.cat(frames, dim=2)

    @torch.no_grad()
    def forward(self, latents: Tensor) -> tuple[list[Tensor], list[Carried | None]]:
        """Frames of every chunk, and what each chunk was given from the one before: None where it is not kept."""
        frames, given, carried = [], [], ()
        for i, part in enumerate(self.split(latents)):
            self.tick("decode")
            given.append(self._keep(carried) if i % self.keep_every == 0 else None)
            clip, carried = self.model.decode_chunk(part, carried)
            frames.append(clip)
        return frames, given

    def backward(self, latents: Tensor, given: Sequence[Carried | None], gradients: Sequence[Tensor]) -> Tensor:
        """``d loss / d latents`` from ``d loss / d frames`` of every chunk.

        Args:
            latents: What :meth:`forward` was given, ``[B, C, t, h, w]``.
            given: What it returned beside the frames.
            gradients: Of every chunk's frames.
        """
        parts, given, carried_gradient = self.split(latents), list(given), ()
        result = [torch.zeros_like(part) for part in parts]
        for i in range(len(parts) - 1, -1, -1):
            if not carried_gradient and not gradients[i].any():
                continue  # nobody looked at this chunk or at a later one
            if given[i] is None:
                self._make_again(parts, given, i)
            self.tick("decode")
            result[i], carried_gradient = self._chunk_gradient(parts[i], given[i], gradients[i], carried_gradient)
            given[i + 1 :] = []
        return torch.cat(result, dim=2)

    @torch.no_grad()
    def _make_again(self, parts: Sequence[Tensor], given: list[Carried | None], last: int) -> None:
        """Fill ``given`` from the nearest boundary that was kept up to the ``last``."""
        start = max(i for i in range(last) if given[i] is not None)
        carried = tuple(self._move(entry, parts[start].device) for entry in given[start])
        for i in range(start, last):
            self.tick("decode")
            _, carried = self.model.decode_chunk(parts[i], carried)
            given[i + 1] = self._keep(carried)

    def _keep(self, carried: Carried) -> Carried:
        """What is carried, where it waits, and none of the storage of what it was cut from."""
        return tuple(own(self._move(entry, self.keep_on)) for entry in carried)

    def _chunk_gradient(
        self, latents: Tensor, given: Carried, of_frames: Tensor, of_carried: Carried
    ) -> tuple[Tensor, Carried]:
        """Gradients of one chunk to its latents, and to what it was given (None for what is no tensor)."""
        latents = latents.detach().requires_grad_()
        given = tuple(_leaf(self._move(entry, latents.device)) for entry in given)
        with torch.enable_grad():
            frames, carried = self.model.decode_chunk(latents, given, save_memory=self.save_memory)
        pairs = [(frames, of_frames)]
        pairs += [
            (made, gradient)
            for made, gradient in zip(carried, of_carried, strict=True)
            if gradient is not None and isinstance(made, Tensor) and made.requires_grad
        ] if of_carried else []  # fmt: skip
        tensors = [entry for entry in given if _passes(entry)]
        outputs, upstream = zip(*pairs, strict=True)
        found = torch.autograd.grad(outputs, [latents, *tensors], upstream, allow_unused=True)
        to_latents = torch.zeros_like(latents) if found[0] is None else found[0]
        rest = iter(found[1:])
        return to_latents, tuple(next(rest) if _passes(entry) else None for entry in given)

    @staticmethod
    def _move(entry: object, device: torch.device | None) -> object:
        return entry.to(device) if isinstance(entry, Tensor) and device is not None else entry


def sparse(boundaries: int) -> int:
    """The ``keep_every`` that keeps least: the root, for those kept and those of one stretch made again.

    Of 21 chunks 4 + 4 boundaries wait instead of 20, for another decoding without gradient.
    """
    return max(1, round(math.sqrt(boundaries)))


def own(entry: object) -> object:
    """A tensor with a storage of its size; a view would keep all it was cut from."""
    if isinstance(entry, Tensor) and entry.untyped_storage().nbytes() > entry.nbytes:
        return entry.clone(memory_format=torch.contiguous_format)
    return entry


def _leaf(entry: object) -> object:
    """A tensor of its own that collects a gradient, with a storage of its size; anything that cannot, as it is."""
    if not (isinstance(entry, Tensor) and entry.is_floating_point()):
        return entry
    leaf = entry.detach().requires_grad_()
    leaf.register_hook(own)  # it was joined to what the chunk brought, and its gradient is cut from that of both
    return leaf


def _passes(entry: object) -> bool:
    return isinstance(entry, Tensor) and entry.requires_grad
