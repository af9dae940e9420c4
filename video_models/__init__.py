"""What paints: one file per model family, and :func:`load_video_model` to open any of them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from .files import WeightFileError, parse_dtype

if TYPE_CHECKING:
    import torch

    from .protocol import VideoModel

__all__ = ["BASE_MODELS", "BUILTIN", "FAMILIES", "WeightFileError", "load_video_model"]

FAMILIES = ("wan_files", "videocrafter_files", "cogvideox_files")
"""Modules with ``detect(folder) -> bool``, ``load(folder, *, dtype, device, text)`` and ``LAYOUTS``."""

BUILTIN = "builtin"
"""The name of the tiny model that comes with the pack."""

BASE_MODELS = {
    "Wan2.1-Fun-1.3B-InP": "alibaba-pai/Wan2.1-Fun-1.3B-InP",
    "Wan2.1-Fun-14B-InP": "alibaba-pai/Wan2.1-Fun-14B-InP",
    "Wan2.1-Fun-V1.1-1.3B-InP": "alibaba-pai/Wan2.1-Fun-V1.1-1.3B-InP",
    "Wan2.1-Fun-V1.1-14B-InP": "alibaba-pai/Wan2.1-Fun-V1.1-14B-InP",
    "Wan2.1-T2V-1.3B": "Wan-AI/Wan2.1-T2V-1.3B",
    "Wan2.1-T2V-14B": "Wan-AI/Wan2.1-T2V-14B",
    "Wan2.1-I2V-14B-480P": "Wan-AI/Wan2.1-I2V-14B-480P",
    "Wan2.1-I2V-14B-720P": "Wan-AI/Wan2.1-I2V-14B-720P",
    "Wan2.1-T2V-1.3B-Diffusers": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "Wan2.1-T2V-14B-Diffusers": "Wan-AI/Wan2.1-T2V-14B-Diffusers",
    "Wan2.1-I2V-14B-480P-Diffusers": "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
    "Wan2.1-I2V-14B-720P-Diffusers": "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers",
}
"""Hub identifiers of the base models we know, by the name of their folder."""


def load_video_model(
    path_or_name: str | Path,
    *,
    dtype: str = "auto",
    device: torch.device | str = "cpu",
    text: bool = True,
    search: Sequence[str | Path] = (),
) -> VideoModel:
    """Open a video model of any known family.

    Args:
        path_or_name: ``builtin``, a model's folder, or the name (or hub identifier) of one in ``search``.
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto`` for what the family's publisher runs.
        device: Where the networks are put.
        text: Whether to load the text encoder too; without it, embeddings must come from a cache.
        search: Folders in which to look for a model by its name.

    Raises:
        WeightFileError: There is no such model here, no family knows it, or one of its files is bad.
        ValueError: ``dtype`` is unknown.
    """
    import torch

    chosen = parse_dtype(dtype)
    folder = _find_folder(str(path_or_name), search)
    layouts: list[str] = []
    for module_name in FAMILIES:
        family = import_module(f".{module_name}", __name__)
        if family.detect(folder):
            # Weights made under ComfyUI's inference mode could never carry a gradient.
            with torch.inference_mode(False):
                return family.load(folder, dtype=chosen, device=device, text=text)
        layouts += family.LAYOUTS
    raise WeightFileError(f"{folder} is no model we know: looked for {'; '.join(layouts)}")


def _find_folder(path_or_name: str, search: Sequence[str | Path]) -> Path:
    if path_or_name == BUILTIN:
        folder = Path(__file__).resolve().parent.parent / "assets" / "tiny_wan"
        if not folder.is_dir():
            raise WeightFileError(f"the built-in model is missing from {folder}; install the pack again")
        return folder
    name = path_or_name.rstrip("/\\").replace("\\", "/").rpartition("/")[2]
    for folder in (Path(path_or_name), *(Path(root) / part for root in search for part in (path_or_name, name))):
        if folder.is_dir():
            return folder
    if Path(path_or_name).is_file():
        raise WeightFileError(f"{path_or_name} is a file; give the folder that holds the whole model")
    repository = BASE_MODELS.get(name)
    if repository is not None and path_or_name in (name, repository):
        place = f"{search[0]}/{name}" if search else f"a folder called {name}"
        looked = f" (looked in {', '.join(map(str, search))})" if search else ""
        raise WeightFileError(
            f"{name} is not here yet{looked}; download {repository} from the Hugging Face Hub into {place} "
            + ("and try again" if search else "and give its path")
        )
    known = ", ".join((BUILTIN, *BASE_MODELS))
    raise WeightFileError(f"there is no folder {path_or_name}; give a model's folder or one of {known}")
