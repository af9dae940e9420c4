"""Which clips a user means, which prompts belong to them, and which of two sets form pairs."""

from __future__ import annotations

import csv
import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..training.prompts import PromptFileError, read_prompts

VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif", ".m4v")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
FILE_NAME = "filename"


@dataclass(frozen=True)
class Clip:
    """What is scored as one.

    Attributes:
        path: Its file, or the folder of its frames.
        frames: The pictures of the folder; empty for a file.
    """

    path: Path
    frames: tuple[Path, ...] = ()

    def read(self) -> Tensor:
        """``[1, 3, T, H, W]`` in 0..1.

        Raises:
            ValueError: A file that cannot be read, or frames of several sizes.
        """
        from ..training.media import read_video

        images = [read_video(path) for path in self.frames or (self.path,)]
        sizes = sorted({tuple(image.shape[-2:]) for image in images})
        if len(sizes) > 1:
            (height, width), (other_height, other_width) = sizes[:2]
            raise ValueError(
                f"the pictures in {self.path} differ in size ({width}x{height} and {other_width}x{other_height}), so "
                "they are not the frames of one clip; leave --as-clip out"
            )
        return torch.cat(images, 1)[None]


def gather(patterns: Sequence[str], as_clip: bool = False) -> list[Clip]:
    """The clips behind files, folders and patterns, each pattern's in the order of their names, none twice.

    Args:
        patterns: As the user wrote them.
        as_clip: The pictures of a folder are the frames of one clip.

    Raises:
        ValueError: One of them leads to nothing.
    """
    clips: list[Clip] = []
    for pattern in patterns:
        named = os.path.exists(pattern) or not glob.has_magic(pattern)
        paths = [Path(pattern)] if named else [Path(path) for path in sorted(glob.glob(pattern, recursive=True))]
        found = [clip for path in paths for clip in (_inside(path, as_clip) if path.is_dir() else [Clip(path)])]
        if not named:  # a pattern also meets what lies beside the clips
            found = [clip for clip in found if clip.frames or clip.path.suffix.lower() in VIDEOS + PICTURES]
        if not found:
            raise ValueError(f"{pattern} leads to no video or picture; known are {' '.join(VIDEOS + PICTURES)}")
        clips += found
    return list(dict.fromkeys(clips))


def _inside(folder: Path, as_clip: bool) -> list[Clip]:
    """Videos, then pictures."""
    files = sorted(folder.iterdir())
    pictures = tuple(file for file in files if file.suffix.lower() in PICTURES)
    videos = [Clip(file) for file in files if file.suffix.lower() in VIDEOS]
    if as_clip and pictures:
        return [*videos, Clip(folder, pictures)]
    return [*videos, *map(Clip, pictures)]


def pair(a: Sequence[Clip], b: Sequence[Clip]) -> tuple[list[Clip], list[Clip]]:
    """The same clips of both sides, by name if they share any, else by order.

    Raises:
        ValueError: Names that only one side has, or unlike numbers.
    """
    names_a, names_b = ({clip.path.stem: clip for clip in side} for side in (a, b))
    if not names_a.keys() & names_b.keys():
        if len(a) != len(b):
            raise ValueError(f"A has {len(a)} clips and B {len(b)}, and no name is shared, so they cannot be paired")
        return list(a), list(b)
    lonely = sorted(names_a.keys() ^ names_b.keys())
    if lonely or len(names_a) != len(a) or len(names_b) != len(b):
        what = f"{lonely[0]} is on one side only" if lonely else "a name occurs twice on one side"
        raise ValueError(f"A and B are paired by their names, but {what}; give both the same names")
    return list(names_a.values()), [names_b[name] for name in names_a]


def prompts_for(clips: Sequence[Clip], given: Sequence[str], source: str) -> list[str]:
    """One prompt a clip; empty where nothing gives any.

    Args:
        clips: The clips.
        given: Prompts: one for all, or one a clip.
        source: Where they are instead: a file, or ``filename``.

    Raises:
        ValueError: Both are given, or not one a clip, or a file that cannot be used.
    """
    if source and given:
        raise ValueError("give --prompt or --prompts, not both")
    if source == FILE_NAME:
        return [prompt_of_name(clip.path) for clip in clips]
    if source.endswith(".csv"):
        known = read_prompt_table(Path(source))
        keys = [(str(clip.path), clip.path.as_posix(), clip.path.name, clip.path.stem) for clip in clips]
        found = [next((known[key] for key in names if key in known), None) for names in keys]
        if None in found:
            raise PromptFileError(f"{source} has no row whose file is {clips[found.index(None)].path.name}")
        return found
    prompts = read_prompts(source) if source else list(given) or [""]
    if len(prompts) not in (1, len(clips)):
        raise ValueError(f"give one prompt, or one a file: {len(clips)} files, {len(prompts)} prompts")
    return prompts * len(clips) if len(prompts) == 1 else prompts


def prompt_of_name(path: Path) -> str:
    """``a_red_circle-003.mp4`` and ``a red circle-seed-7.png`` to ``a red circle``."""
    name = re.sub(r"([-_ ]+(seed|step)?[-_ ]*\d+)+_?$", "", path.stem, flags=re.IGNORECASE)
    spaced = name.replace("_", " ")
    return " ".join((spaced if " " in spaced else spaced.replace("-", " ")).split())


def read_prompt_table(path: Path) -> dict[str, str]:
    """Prompts by file, from a CSV file with columns ``file`` and ``prompt``.

    Raises:
        PromptFileError: The file or one of its columns is missing.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise PromptFileError(f"{path} cannot be read as a CSV file in UTF-8 ({error})") from None
    if not rows or not {"file", "prompt"} <= rows[0].keys():
        found = ", ".join(map(str, rows[0])) if rows else "no row"
        raise PromptFileError(f"{path} needs the columns file and prompt, and at least one row; it has {found}")
    return {row["file"]: (row["prompt"] or "").strip() for row in rows if row["file"]}
