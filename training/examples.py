"""What a run trains on: prompts, and with them the pictures a video starts and ends with or is compared to."""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..reward_models.protocol import Reward
from ..video_models.protocol import ModelSpec
from .media import read_frames
from .prompts import PromptFileError, read_rows, read_text

PICTURES = ("start_image", "end_image", "reference")
COLUMNS = ("prompt", "video", "image", *PICTURES)
"""Of ``metadata.csv``; ``video`` and ``image`` stand for start image and reference in one."""
MEDIA = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".mp4", ".mov", ".mkv", ".webm", ".avi"))
KEPT = 1 << 30
"""Bytes of pictures, and of what was computed from them, that stay in memory."""


@dataclass(frozen=True)
class Picture:
    """A picture or video. Examples may share one, so that it is read once.

    Attributes:
        source: Its file, or frames ``[3, T, H, W]`` in 0..1.
    """

    source: Path | Tensor

    def frames(self) -> Iterator[Tensor]:
        """Frames ``[3, H, W]`` in bytes. Raises ``ValueError`` if the file cannot be read."""
        if isinstance(self.source, Tensor):
            return iter((self.source.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8).unbind(1))
        return read_frames(self.source)

    @cached_property
    def digest(self) -> str:
        """Of the content."""
        digest = hashlib.sha256()
        if isinstance(self.source, Tensor):
            digest.update(repr(tuple(self.source.shape)).encode())
            for frame in self.frames():
                digest.update(frame.contiguous().numpy())
        else:
            with self.source.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()


@dataclass(frozen=True)
class Example:
    """One thing to train on. Pictures may be given as files or frames, see :class:`Picture`.

    Attributes:
        prompt: What to paint.
        start_image: What the video begins with; of a clip, its first frame.
        end_image: What it ends with; of a clip, its first frame.
        reference: What the reward compares the video with, such as the person's face. Of a clip its first frame is
            left out, as Reward FL (ROLL) does: there it is the start image, which every video repeats.
    """

    prompt: str
    start_image: Picture | None = None
    end_image: Picture | None = None
    reference: Picture | None = None

    def __post_init__(self) -> None:
        for name, picture in self.pictures.items():
            if not isinstance(picture, Picture):
                object.__setattr__(self, name, Picture(picture))

    @property
    def pictures(self) -> dict[str, Picture]:
        """Those it has, by their names."""
        given = {name: getattr(self, name) for name in PICTURES}
        return {name: picture for name, picture in given.items() if picture is not None}

    @property
    def identity(self) -> str:
        """The prompt, and a digest of the content of every picture: all that a step depends on."""
        return "\n".join([self.prompt, *(f"{name} {picture.digest}" for name, picture in self.pictures.items())])


def as_examples(given: Iterable[str | Example]) -> list[Example]:
    """Prompts are examples without pictures."""
    return [Example(one) if isinstance(one, str) else one for one in given]


def read_examples(path: Path | str) -> list[Example]:
    """Read what to train on.

    Args:
        path: A ``.txt`` (one prompt a line). A ``.jsonl`` of objects with a ``prompt`` and perhaps ``start_image``,
            ``end_image`` and ``reference``. A folder with a ``metadata.csv`` (or that file), its columns ``prompt`` and
            ``video`` or ``image``, as ROLL and DiffSynth have it: the clip's first frame is the start image, and the
            clip the reference. Or a folder of pictures or clips, each with its prompt in a ``.txt`` of its name. All
            paths are relative to the file that names them, and stay in its folder.

    Raises:
        PromptFileError: Nothing there, a broken row, or a picture that is missing or cannot be read; says which.
    """
    path = Path(path)
    if path.is_dir():
        return _read_table(path / "metadata.csv") if (path / "metadata.csv").is_file() else _read_captions(path)
    if path.suffix == ".csv":
        return _read_table(path)
    known: dict[Path, Picture] = {}
    return [_example(row, path, f"{path.name}, line {number}", known) for number, row in read_rows(path)]


def _read_table(path: Path) -> list[Example]:
    table = csv.reader(io.StringIO(read_text(path), newline=""))
    try:
        lines = [(table.line_num, [value.strip() for value in values]) for values in table if values]
    except csv.Error as error:
        raise PromptFileError(f"{path.name}, line {table.line_num}: no comma-separated values ({error})") from None
    (_, columns), *rows = lines or [(0, [])]
    unknown = sorted(set(columns) - set(COLUMNS))
    if unknown or "prompt" not in columns or not set(columns) - {"prompt"}:
        wrong = f"the unknown column {unknown[0]!r}" if unknown else f"the columns {', '.join(columns) or 'none'}"
        known = ", ".join(COLUMNS)
        raise PromptFileError(f"{path.name} has {wrong}; write video,prompt or image,prompt (known: {known})")
    if not rows:
        raise PromptFileError(f"{path.name} holds no rows; write video,prompt first, then a clip in each line")
    examples, known = [], {}
    for number, values in rows:
        place = f"{path.name}, line {number}"
        if len(values) != len(columns):
            many = f"{len(values)} values where there are {len(columns)} columns"
            raise PromptFileError(f'{place}: {many}; put a prompt with commas in "quotes"')
        examples.append(_example(dict(zip(columns, values, strict=True)), path, place, known))
    return examples


def _read_captions(folder: Path) -> list[Example]:
    examples = []
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() not in MEDIA or file.name.startswith("."):
            continue
        caption = file.with_suffix(".txt")
        if not caption.is_file():
            raise PromptFileError(f"{file.name} has no prompt; write it into {caption.name} beside it")
        row = {"prompt": " ".join(read_text(caption).split()), "image": file.name}
        examples.append(_example(row, file, caption.name, {}))
    if not examples:
        raise PromptFileError(f"{folder} holds neither a metadata.csv nor pictures with prompts in .txt files")
    return examples


def _example(row: Mapping[str, Any], path: Path, place: str, known: dict[Path, Picture]) -> Example:
    """A row of a file at ``path``; ``place`` begins its errors, ``known`` are the pictures seen so far."""
    if not row["prompt"]:
        raise PromptFileError(f"{place}: the prompt is empty")
    whole = row.get("video") or row.get("image")
    named = {"start_image": whole, "reference": whole} if whole else {}
    named |= {name: row[name] for name in PICTURES if row.get(name)}
    return Example(row["prompt"], **{name: _picture(path, str(file), place, known) for name, file in named.items()})


def _picture(path: Path, name: str, place: str, known: dict[Path, Picture]) -> Picture:
    """The picture that a file at ``path`` names. Links may lead anywhere, names may not."""
    folder = os.path.abspath(path.parent)
    file = Path(os.path.normpath(os.path.join(folder, name)))
    if not file.is_relative_to(folder):
        raise PromptFileError(f"{place}: {name} lies outside of {folder}; put it there and name it by its path within")
    if file not in known:
        try:
            next(read_frames(file))
        except ValueError as error:
            raise PromptFileError(f"{place}: {error}") from None
        known[file] = Picture(file)
    return known[file]


def check_examples(examples: Sequence[Example], what: str, spec: ModelSpec, reward: Reward) -> None:
    """Raise ``ValueError`` if the model cannot begin with their pictures, or the reward has nothing to compare with.

    Args:
        examples: Called ``what`` in the message.
        what: Such as "training prompts".
        spec: Of the model.
        reward: That judges.
    """
    for name, plain in (("start_image", "a start image"), ("end_image", "an end image")):
        having = sum(name in example.pictures for example in examples)
        if having and not spec.image_to_video:
            raise ValueError(
                f"{spec.name} is a text-to-video model, and {having} of {len(examples)} {what} have {plain}; "
                "take an image-to-video model, or leave the images out"
            )
        if 0 < having < len(examples):
            raise ValueError(f"{having} of {len(examples)} {what} have {plain}; give one to all of them or to none")
    lacking = sum(example.reference is None for example in examples)
    if "reference" in reward.needs and lacking:
        raise ValueError(
            f"the reward {reward.name} needs a reference, which {lacking} of {len(examples)} {what} lack; give a "
            "folder with clips or pictures and a metadata.csv of video,prompt or image,prompt"
        )


class Store:
    """Tensors that were costly to make, by name; beyond a number of bytes the ones not used for longest go.

    Args:
        limit: Bytes. The newest stays whatever its size.
    """

    def __init__(self, limit: int = KEPT) -> None:
        self._limit, self._size = limit, 0
        self._kept: OrderedDict[str, Sequence[Mapping[str, Tensor]]] = OrderedDict()

    def get(self, name: str, make: Callable[[], Sequence[Mapping[str, Tensor]]]) -> Sequence[Mapping[str, Tensor]]:
        """What ``make`` gives, or gave before."""
        if name in self._kept:
            self._kept.move_to_end(name)
            return self._kept[name]
        made = self._kept[name] = make()
        self._size += _bytes(made)
        while self._size > self._limit and len(self._kept) > 1:
            self._size -= _bytes(self._kept.popitem(last=False)[1])
        return made


def _bytes(groups: Sequence[Mapping[str, Tensor]]) -> int:
    return sum(tensor.nbytes for group in groups for tensor in group.values())


def still(picture: Picture, width: int, height: int) -> Tensor:
    """Its first frame ``[1, 3, height, width]`` in 0..1: scaled to fill the size, and cut at both sides alike."""
    scaled = _scaled(next(picture.frames()), width, height, max)
    top, left = (scaled.shape[1] - height) // 2, (scaled.shape[2] - width) // 2
    return scaled[None, :, top : top + height, left : left + width].float() / 255


def clip(picture: Picture, width: int, height: int, frames: int) -> Tensor:
    """Its frames after the first, or its only one, ``[3, T, height, width]`` in bytes: whole, with black around.

    T is 1 for a picture and ``frames - 1`` for every clip: the frames of a shorter one are repeated evenly.
    """
    images = []
    for frame in islice(picture.frames(), max(2, frames)):
        scaled = _scaled(frame, width, height, min)
        down, right = height - scaled.shape[1], width - scaled.shape[2]
        images.append(F.pad(scaled, (right // 2, right - right // 2, down // 2, down - down // 2)))
    images, wanted = images[1:] or images, max(1, frames - 1)
    count = len(images)
    return torch.stack([images[i * count // wanted] for i in range(wanted if count > 1 else 1)], dim=1)


def together(clips: Sequence[Tensor]) -> Tensor:
    """Results of :func:`clip` as a reference ``[B, 3, T, H, W]`` in 0..1; beside clips a picture stands still."""
    longest = max(one.shape[1] for one in clips)
    return torch.stack([one.expand(-1, longest, -1, -1) for one in clips]).float() / 255


def _scaled(frame: Tensor, width: int, height: int, choose: Callable[[float, float], float]) -> Tensor:
    """``[3, H, W]`` in bytes, scaled by the larger or the smaller of the factors that fit its sides."""
    scale = choose(height / frame.shape[1], width / frame.shape[2])
    size = [max(1, round(side * scale)) for side in frame.shape[1:]]
    return F.interpolate(frame[None], size, mode="bicubic", antialias=True)[0]
