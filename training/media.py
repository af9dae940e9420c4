"""What a person looks at: videos, contact sheets and the reward curve."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..files import write_atomically
from ..garbage import garbage_freed

VISIBLE = 256
"""Smaller frames are enlarged to about this many pixels, each pixel a square block, in files made for the eye."""


PREVIEW_SIZE = 192
"""Pixels along the longer side of a preview."""
PREVIEW_FRAMES = 24


def to_uint8(frames: Tensor) -> np.ndarray:
    """``[3, T, H, W]`` in 0..1 to ``[T, H, W, 3]`` uint8, enlarged if tiny, cut to even sizes for video codecs."""
    array = (frames.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()
    factor = max(1, VISIBLE // max(array.shape[1:3]))
    array = array.repeat(factor, axis=1).repeat(factor, axis=2)
    height, width = array.shape[1] // 2 * 2, array.shape[2] // 2 * 2
    return np.ascontiguousarray(array[:, :height, :width])


def write_video(path: Path | str, frames: Tensor, fps: int) -> Path:
    """Write ``[3, T, H, W]`` in 0..1 as an H.264 mp4."""
    import av

    array = to_uint8(frames)

    def encode(target: Path) -> None:
        with av.open(str(target), "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=fps, options={"crf": "15"})
            stream.height, stream.width, stream.pix_fmt = array.shape[1], array.shape[2], "yuv420p"
            for image in array:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())

    return write_atomically(path, encode)


def write_preview(path: Path | str, frames: Tensor, fps: int) -> Path:
    """Write ``[3, T, H, W]`` in 0..1 as a small animated WebP that plays for ever, for reports."""
    from PIL import Image

    array = to_uint8(frames)
    every = -(-len(array) // PREVIEW_FRAMES)
    images = [Image.fromarray(image) for image in array[::every]]
    for image in images:
        image.thumbnail((PREVIEW_SIZE, PREVIEW_SIZE))
    first, *others = images
    timing = {"duration": round(1000 * every / fps), "loop": 0}
    return write_atomically(
        path,
        lambda target: first.save(
            target, format="WEBP", save_all=True, append_images=others, quality=75, method=2, **timing
        ),
    )


def read_video(path: Path | str, max_frames: int = 0) -> Tensor:
    """Read a video or picture as ``[3, T, H, W]`` in 0..1. Raises as :func:`read_frames`."""
    return torch.stack(list(islice(read_frames(path), max_frames or None)), dim=1).float() / 255


def read_frames(path: Path | str) -> Iterator[Tensor]:
    """Frames ``[3, H, W]``, uint8, of a video or picture, one by one, upright as its camera noted.

    Raises:
        ValueError: The file is missing or holds no picture.
    """
    import av

    path, empty = Path(path), True
    if not path.is_file():
        raise ValueError(f"{path}: there is no such video or picture")
    try:
        with av.open(str(path), metadata_errors="replace") as container:  # titles in any encoding
            for frame in container.decode(video=0):
                turns = round(getattr(frame, "rotation", 0) / 90)  # older releases of PyAV do not tell
                yield torch.from_numpy(np.rot90(frame.to_ndarray(format="rgb24"), turns).copy()).permute(2, 0, 1)
                empty = False
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"{path.name} cannot be read as a video or picture ({error})") from None
    if empty:
        raise ValueError(f"{path.name} holds no frames")


@garbage_freed()
def contact_sheet(
    rows: Sequence[Tensor], row_labels: Sequence[str], column_labels: Sequence[str] = (), frame: int | str = "strip"
) -> np.ndarray:
    """A labelled picture of clips.

    Args:
        rows: Each ``[N, 3, T, H, W]``: a row shows its clips side by side.
        row_labels: One a row.
        column_labels: One a clip, or none.
        frame: Index of the frame to show, or ``strip`` for first, middle and last.

    Returns:
        ``[H, W, 3]`` uint8.
    """
    from matplotlib.figure import Figure

    count = rows[0].shape[0]
    figure = Figure(figsize=(1.1 + 1.9 * count, 0.35 + len(rows) * (0.85 if frame == "strip" else 1.9)), dpi=110)
    axes = figure.subplots(len(rows), count, squeeze=False)
    for r, clips in enumerate(rows):
        for c in range(count):
            images = to_uint8(clips[c])
            picked = [0, len(images) // 2, len(images) - 1] if frame == "strip" else [int(frame)]
            axes[r][c].imshow(np.concatenate([images[i] for i in picked], axis=1))
            axes[r][c].set_xticks([])
            axes[r][c].set_yticks([])
            if c == 0:
                axes[r][c].set_ylabel(row_labels[r], fontsize=9, rotation=0, ha="right", va="center")
            if r == 0 and column_labels:
                axes[r][c].set_title(_wrap(column_labels[c], 30), fontsize=7)
    figure.tight_layout()
    return figure_pixels(figure)


def _wrap(text: str, width: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width))


@dataclass(frozen=True)
class Curve:
    """Values over the steps.

    Attributes:
        label: In the legend.
        points: (step, value) or (step, value, low, high): with an interval that is drawn as a band.
    """

    label: str
    points: Sequence[tuple[float, ...]]


@garbage_freed()
def reward_curve(
    batches: Sequence[tuple[int, float]],
    evaluations: Sequence[tuple[float, ...]],
    name: str,
    heldout: Sequence[Curve] = (),
    guarded: Sequence[Curve] = (),
    best: int | None = None,
) -> np.ndarray:
    """The reward over the steps, above what the guards watch, as a picture.

    Args:
        batches: (step, mean reward of the training batch): noisy, drawn faintly.
        evaluations: (step, mean reward on fixed prompts and seeds), with an interval or not: the honest curve.
        name: Of the reward.
        heldout: Rewards that are not trained on, one panel together.
        guarded: Ratios to the base model, one panel together.
        best: The best step, marked in every panel.

    Returns:
        ``[H, W, 3]`` uint8.
    """
    from matplotlib.figure import Figure

    lower = [
        (curves, label) for curves, label in ((heldout, "held-out gain\n(deviations)"), (guarded, "/ base")) if curves
    ]
    heights = [2.2, *[1] * len(lower)]
    figure = Figure(figsize=(7, 4 + 1.6 * len(lower)), dpi=110)
    panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    if batches:
        panels[0].plot(*zip(*batches, strict=True), color="tab:gray", alpha=0.45, linewidth=1, label="training batches")
    if evaluations:
        _draw(panels[0], Curve("fixed prompts and seeds", evaluations), "tab:blue")
    panels[0].set_ylabel(name)
    for axes, (curves, label), level in zip(panels[1:], lower, (0, 1) if heldout else (1,), strict=False):
        for index, curve in enumerate(curves):
            _draw(axes, curve, f"C{index + 1}")
        axes.axhline(level, color="black", linewidth=0.8)
        low, high = axes.get_ylim()  # so that small changes look small
        axes.set_ylim(min(low, level - 0.15), max(high, level + 0.15))
        axes.set_ylabel(label)
    for axes in panels:
        if best is not None:
            axes.axvline(best, color="tab:green", linestyle=":", label="best step")
        axes.grid(alpha=0.25)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="best", fontsize=8)
    panels[-1].set_xlabel("step")
    figure.tight_layout()
    return figure_pixels(figure)


def _draw(axes, curve: Curve, color: str) -> None:
    steps, values, *interval = zip(*curve.points, strict=True)
    axes.plot(steps, values, color=color, marker="o", markersize=4, label=curve.label)
    if interval:
        axes.fill_between(steps, *interval, color=color, alpha=0.15, linewidth=0)


def figure_pixels(figure) -> np.ndarray:
    """A matplotlib figure as ``[H, W, 3]`` uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def png_bytes(image: np.ndarray) -> bytes:
    """``[H, W, 3]`` uint8 as a PNG file."""
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(image).save(content, format="PNG")
    return content.getvalue()


def write_png(path: Path | str, image: np.ndarray) -> Path:
    """Write ``[H, W, 3]`` uint8."""
    from PIL import Image

    return write_atomically(path, lambda target: Image.fromarray(image).save(target, format="PNG"))
