"""What a person looks at: videos, contact sheets and the reward curve."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..files import write_atomically

VISIBLE = 256
"""Smaller frames are enlarged to about this many pixels, each pixel a square block, in files made for the eye."""


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
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                turns = round(getattr(frame, "rotation", 0) / 90)  # older releases of PyAV do not tell
                yield torch.from_numpy(np.rot90(frame.to_ndarray(format="rgb24"), turns).copy()).permute(2, 0, 1)
                empty = False
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"{path.name} cannot be read as a video or picture ({error})") from None
    if empty:
        raise ValueError(f"{path.name} holds no frames")


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


def reward_curve(
    batches: Sequence[tuple[int, float]], evaluations: Sequence[tuple[int, float]], name: str
) -> np.ndarray:
    """The reward over the steps as a picture.

    Args:
        batches: (step, mean reward of the training batch): noisy, drawn faintly.
        evaluations: (step, mean reward on fixed prompts and seeds): the honest curve.
        name: Of the reward.

    Returns:
        ``[H, W, 3]`` uint8.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=110)
    axes = figure.subplots()
    if batches:
        axes.plot(*zip(*batches, strict=True), color="tab:gray", alpha=0.45, linewidth=1, label="training batches")
    if evaluations:
        axes.plot(*zip(*evaluations, strict=True), color="tab:blue", marker="o", label="fixed prompts and seeds")
    axes.set_xlabel("step")
    axes.set_ylabel(name)
    axes.grid(alpha=0.25)
    if batches or evaluations:
        axes.legend(loc="best", fontsize=8)
    figure.tight_layout()
    return figure_pixels(figure)


def figure_pixels(figure) -> np.ndarray:
    """A matplotlib figure as ``[H, W, 3]`` uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def write_png(path: Path | str, image: np.ndarray) -> Path:
    """Write ``[H, W, 3]`` uint8."""
    from PIL import Image

    return write_atomically(path, lambda target: Image.fromarray(image).save(target, format="PNG"))
