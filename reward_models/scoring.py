"""From a judge of single images to a reward of clips: in chunks, texts once, differentiable."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .preprocess import unit_range

CHUNK = 4
"""Images a network sees at once: few enough for the caches of a CPU, and for its memory."""
ACCELERATED, ACCELERATED_WITHOUT_GRADIENT = 2, 8
"""How many times more an accelerator gets: enough to fill it."""
REMEMBERED_TEXTS = 1024
HALF_SCALES = (1024.0, 32.0, 1.0)
"""Gradients of a float16 network pass it this many times larger, or they would vanish; the next if they overflow."""


class ImageJudge(Protocol):
    """A frozen ``torch.nn.Module`` that scores images one by one.

    ``forward(images, texts)`` takes ``[N, 3, H, W]`` (RGB, 0..1, float32 or better, on the module's device) and N
    results of ``encode_text`` (None where the judge reads no prompt), and gives ``[N]``. An image's score depends on
    nothing but this image and its text.
    """

    def __call__(self, images: Tensor, texts: Sequence[Any]) -> Tensor: ...

    def encode_text(self, prompt: str) -> Any: ...


class FrameReward:
    """The mean over the frames of a clip of what a judge says of each. See :class:`.protocol.Reward`.

    Args:
        judge: An :class:`ImageJudge`.
        name: For logs and plots.
        reads_prompt: Whether the judge has an ``encode_text``; each distinct prompt passes it once.
        chunk: Images at once on a CPU; an accelerator gets more.
    """

    differentiable = True

    def __init__(self, judge: torch.nn.Module, name: str, *, reads_prompt: bool = True, chunk: int = CHUNK) -> None:
        self.judge = judge.eval().requires_grad_(False)
        self.name, self.chunk = name, chunk
        self.needs = frozenset({"prompt"} if reads_prompt else ())
        self._texts: OrderedDict[str, Any] = OrderedDict()

    @property
    def device(self) -> torch.device:
        return next(self.judge.parameters()).device

    def score(self, frames: Tensor, prompts: Sequence[str], *, reference: Tensor | None = None) -> Tensor:
        """Frames may also be uint8, 0..255, and lie on any device.

        Raises:
            ValueError: Frames of another shape, or not one prompt a clip.
        """
        check_clips(frames, prompts)
        texts = self._encode(prompts) if self.needs else [None] * len(prompts)

        def judge(images: Tensor, clips: list[int]) -> Tensor:
            return self.judge(images, [texts[clip] for clip in clips])

        half = any(parameter.dtype == torch.float16 for parameter in self.judge.parameters())
        return score_images(frames, judge, self.device, self.chunk, half=half).mean(1)

    def _encode(self, prompts: Sequence[str]) -> list[Any]:
        texts = {}
        with torch.inference_mode(False), torch.no_grad():  # what is remembered serves training as well
            for prompt in prompts:
                if prompt not in texts:
                    texts[prompt] = self._texts.pop(prompt) if prompt in self._texts else self.judge.encode_text(prompt)
        self._texts.update(texts)
        while len(self._texts) > REMEMBERED_TEXTS:
            self._texts.popitem(last=False)
        return [texts[prompt] for prompt in prompts]

    def to(self, device: torch.device | str) -> FrameReward:
        """Move the judge; returns itself."""
        if torch.device(device) != self.device:
            self.judge.to(device)
            self._texts.clear()
        return self


def check_clips(frames: Tensor, prompts: Sequence[str]) -> None:
    """Refuse frames that are not ``[B, 3, T, H, W]``, or prompts that are not B.

    Raises:
        ValueError: They are not.
    """
    if frames.ndim != 5 or frames.shape[1] != 3 or not frames.shape[2]:
        raise ValueError(f"frames must be [B, 3, T, H, W] with at least one frame, got {list(frames.shape)}")
    if len(prompts) != frames.shape[0]:
        raise ValueError(f"{frames.shape[0]} videos need as many prompts, got {len(prompts)}")


def score_images(
    frames: Tensor,
    judge: Callable[[Tensor, list[int]], Tensor],
    device: torch.device,
    chunk: int = CHUNK,
    *,
    half: bool = False,
) -> Tensor:
    """Score every frame by itself, at the memory of a chunk whatever their number.

    The exact gradient of a chunk is taken as soon as it is scored, and its graph is gone before the next: a score
    depends on its own image alone, so a gradient of scores is this gradient times one number an image.

    Args:
        frames: ``[B, 3, T, H, W]``, float 0..1 or uint8, on any device.
        judge: Takes ``[n, 3, H, W]`` on ``device``, float32 or better, and the clip each image is from; gives ``[n]``.
        device: Where the judge computes.
        chunk: Images at once.
        half: Whether the judge computes in float16.

    Returns:
        ``[B, T]``, float32 or better, where the frames lie.
    """
    if torch.is_grad_enabled() and frames.requires_grad:
        chunk *= 1 if device.type == "cpu" else ACCELERATED
        return _ScoreImages.apply(frames, judge, device, chunk, HALF_SCALES if half else (1.0,))
    chunk *= 1 if device.type == "cpu" else ACCELERATED_WITHOUT_GRADIENT
    with torch.no_grad():
        return _clips([judge(_images(frames, part, device), part[0]) for part in _parts(frames, chunk)], frames)


class _ScoreImages(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, frames: Tensor, judge: Callable, device: torch.device, chunk: int, scales: Sequence[float]
    ) -> Tensor:
        scores, gradient = [], torch.empty_like(frames)
        for part in _parts(frames, chunk):
            with torch.enable_grad():
                images = _images(frames, part, device).requires_grad_()
                scored = judge(images, part[0])
                for scale in scales:
                    last = scale == scales[-1]
                    (found,) = torch.autograd.grad(scored.sum() * scale, images, retain_graph=not last)
                    if last or found.isfinite().all():
                        break
            scores.append(scored.detach())
            gradient[part[0], :, part[1]] = (found / scale).to(gradient)
        ctx.save_for_backward(gradient)
        return _clips(scores, frames)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[:, None, :, None, None].to(gradient), None, None, None, None


def _parts(frames: Tensor, chunk: int) -> list[tuple[list[int], list[int]]]:
    """For every chunk the clips and the times of its images."""
    places = [(clip, time) for clip in range(frames.shape[0]) for time in range(frames.shape[2])]
    parts = [places[i : i + chunk] for i in range(0, len(places), chunk)]
    return [([clip for clip, _ in part], [time for _, time in part]) for part in parts]


def _images(frames: Tensor, part: tuple[list[int], list[int]], device: torch.device) -> Tensor:
    return unit_range(frames.detach()[part[0], :, part[1]].to(device))


def _clips(scores: list[Tensor], frames: Tensor) -> Tensor:
    together = torch.cat(scores).view(frames.shape[0], frames.shape[2])
    return together.to(frames.device, torch.promote_types(together.dtype, torch.float32))
