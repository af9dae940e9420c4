"""What judges: one file a reward, one line in the table below."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .protocol import Reward

BUILT_IN_CLIP = Path(__file__).resolve().parent.parent / "assets" / "tiny_clip"


def _tiny_clip(path: Path | None, device: str) -> Reward:
    from .clip_score import ClipScore

    return ClipScore.load(path or BUILT_IN_CLIP, "tiny_clip", device=device)


def _pickscore(path: Path | None, device: str) -> Reward:
    from .clip_score import ClipScore

    return ClipScore.load(_needed(path, "pickscore", "yuvalkirstain/PickScore_v1"), "pickscore", device=device)


def _pickscore_scaled(path: Path | None, device: str) -> Reward:
    from .clip_score import ClipScore

    folder = _needed(path, "pickscore_scaled", "yuvalkirstain/PickScore_v1")
    return ClipScore.load(folder, "pickscore_scaled", scaled=True, device=device)


@dataclass(frozen=True)
class RewardEntry:
    """One reward of the table.

    Attributes:
        load: ``(path or None, device) -> Reward``.
        summary: One line for lists and tooltips.
        folder: Name of its files' folder below a models folder; empty if it ships with the pack.
    """

    load: Callable[[Path | None, str], Reward]
    summary: str
    folder: str = ""


REWARDS: dict[str, RewardEntry] = {
    "tiny_clip": RewardEntry(_tiny_clip, "CLIP cosine of the built-in world of coloured shapes"),
    "pickscore": RewardEntry(_pickscore, "PickScore, plain cosine, as trained on (about 0.2)", "PickScore_v1"),
    "pickscore_scaled": RewardEntry(_pickscore_scaled, "PickScore on its published scale (about 20)", "PickScore_v1"),
}


def load_reward(name: str, path: Path | str | None = None, device: str = "cpu") -> Reward:
    """Load a reward by name.

    Args:
        name: A key of :data:`REWARDS`.
        path: Its folder; None for what ships with the pack.
        device: Where it computes.

    Raises:
        ValueError: Unknown name, or files that are not there.
    """
    if name not in REWARDS:
        raise ValueError(f"unknown reward {name!r}; known are {', '.join(REWARDS)}")
    folder = Path(path) if path else None
    if folder is not None and not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json; choose the folder of {name} in the layout of transformers")
    return REWARDS[name].load(folder, device)


def _needed(path: Path | None, name: str, repository: str) -> Path:
    if path is None:
        raise ValueError(
            f"{name} needs the folder of https://huggingface.co/{repository}; download it and give its path"
        )
    return path
