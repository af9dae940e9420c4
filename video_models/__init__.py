"""What paints: one file per model family, and :func:`load_video_model` to open any of them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from ..assets import TINY_WAN
from .base_models import BASE_MODELS, BaseModel
from .files import WeightFileError, parse_dtype
from .loading import ModelFiles

if TYPE_CHECKING:
    import torch

    from ..hub import Progress
    from .protocol import VideoModel

__all__ = ["BASE_MODELS", "BUILTIN", "FAMILIES", "ModelFiles", "WeightFileError", "detect", "load_video_model"]

FAMILIES = (
    "wan_files",
    "videocrafter_files",
    "cogvideox_files",
    "easyanimate_files",
    "modelscope_files",
    "opensora_files",
)
"""Modules with ``detect(folder) -> bool``, ``load(folder, *, dtype, device, text)`` and ``LAYOUTS``."""

BUILTIN = "builtin"
"""The name of the tiny model that comes with the pack."""

UNFINISHED = ".unfinished-download"


def load_video_model(
    source: str | Path | ModelFiles,
    *,
    dtype: str = "auto",
    device: torch.device | str = "cpu",
    text: bool = True,
    search: Sequence[str | Path] = (),
    download: bool = False,
    progress: Progress | None = None,
) -> VideoModel:
    """Open a video model of any known family.

    Args:
        source: ``builtin``, a model's folder, the name (or hub identifier) of one in ``search``, or the single
            files of a Wan model as ComfyUI keeps them.
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto`` for what the family's publisher runs.
        device: Where the networks are put.
        text: Whether to load the text encoder too; without it, embeddings must come from a cache.
        search: Folders in which to look for a model by its name.
        download: Fetch a known model that is in none of them into the first.
        progress: Bytes done and in total, of the download; may raise to cancel.

    Raises:
        WeightFileError: There is no such model here, no family knows it, or one of its files is bad.
        ValueError: ``dtype`` is unknown.
    """
    import torch

    chosen = parse_dtype(dtype)
    # Weights made under ComfyUI's inference mode could never carry a gradient.
    with torch.inference_mode(False):
        if isinstance(source, ModelFiles):
            from .wan_single import load_files

            return load_files(source, dtype=chosen, device=device, text=text)
        folder = _find_folder(str(source), search, download, progress)
        name = detect(folder)
        if name is not None:
            return _family(name).load(folder, dtype=chosen, device=device, text=text)
    layouts = [layout for name in FAMILIES for layout in _family(name).LAYOUTS]
    raise WeightFileError(f"{folder} is no model we know: looked for {'; '.join(layouts)}")


def detect(folder: Path) -> str | None:
    """The family of ``FAMILIES`` whose model a folder holds. Raises ``WeightFileError`` for unreadable files."""
    return next((name for name in FAMILIES if _family(name).detect(folder)), None)


def _family(name: str) -> ModuleType:
    return import_module(f".{name}", __name__)


def _find_folder(wanted: str, search: Sequence[str | Path], download: bool, progress: Progress | None) -> Path:
    if wanted == BUILTIN:
        if not TINY_WAN.is_dir():
            raise WeightFileError(f"the built-in model is missing from {TINY_WAN}; install the pack again")
        return TINY_WAN
    name = wanted.rstrip("/\\").replace("\\", "/").rpartition("/")[2]
    known = BASE_MODELS.get(name)
    places = [Path(wanted), *(Path(root) / part for root in search for part in (wanted, name))]
    folder = next((place for place in places if place.is_dir()), None)
    if folder is not None and (known is None or not (folder / UNFINISHED).exists()):
        return folder
    if folder is None and Path(wanted).is_file():
        raise WeightFileError(f"{wanted} is a file; give the folder that holds the whole model")
    if known is None or (folder is None and wanted not in (name, known.repository)):
        names = ", ".join((BUILTIN, *BASE_MODELS))
        raise WeightFileError(f"there is no folder {wanted}; give a model's folder or one of {names}")
    target = folder or (Path(search[0]) / name if search else None)
    if download and target:
        return _fetch(known, target, progress)
    state = "is only partly here" if folder else "is not here yet"
    looked = f" (looked in {', '.join(map(str, search))})" if search else ""
    place = str(target) if target else f"a folder called {name}, and give its path"
    raise WeightFileError(
        f"{name} {state}{looked}; allow the download of about {known.disk} GB, or put the files of {known.address} "
        f"into {place}"
    )


def _fetch(known: BaseModel, target: Path, progress: Progress | None) -> Path:
    """Download what the loader reads; a mark in the folder tells a download that was cut off from a whole model."""
    from ..hub import fetch_repository

    mark = target / UNFINISHED
    target.mkdir(parents=True, exist_ok=True)
    mark.touch()
    fetch_repository(known.repository, target, patterns=known.files, progress=progress)
    for part in known.parts:
        fetch_repository(part, target / part.rpartition("/")[2], patterns=known.files, progress=progress)
    mark.unlink()
    return target
