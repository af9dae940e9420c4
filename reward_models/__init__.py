"""What judges: one file a reward, one line in the table below; rewards of other packages beside them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from ..files import WeightFileError, not_importable
from ..hub import Progress
from . import (
    action,
    aesthetic,
    clip_score,
    face,
    hps,
    image_reward,
    motion,
    mps,
    vader_aesthetic_hps,
    vader_heads,
    yolos,
)
from .files import Request, RewardEntry, find
from .protocol import Reward

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent

REWARDS: dict[str, RewardEntry] = {
    **clip_score.ENTRIES,
    **hps.ENTRIES,
    **mps.ENTRIES,
    **aesthetic.ENTRIES,
    **face.ENTRIES,
    **image_reward.ENTRIES,
    **motion.ENTRIES,
    **vader_heads.ENTRIES,
    **vader_aesthetic_hps.ENTRIES,
    **yolos.ENTRIES,
    **action.ENTRIES,
}
"""The rewards of this package by name."""

GROUP = "reward_lora.rewards"
"""Entry points of other packages: a name, and a callable ``(path or None, device) -> Reward``."""


def all_rewards() -> dict[str, RewardEntry]:
    """Ours and those of installed packages, which are not imported before they are asked for."""
    found = dict(REWARDS)
    for point in importlib.metadata.entry_points(group=GROUP):
        package = point.dist.name if point.dist else point.value
        if point.name in found:
            log.warning("the reward %s of the package %s is left out: the name is taken", point.name, package)
        elif not _is_installed(point.value.partition(":")[0].partition(".")[0]):
            log.warning(
                "the reward %s of the package %s is left out: %s is not there", point.name, package, point.value
            )
        else:
            found[point.name] = RewardEntry(_of_a_package(point, package), f"a reward of the package {package}")
    return found


def load_reward(
    name: str,
    path: Path | str | None = None,
    device: str = "cpu",
    *,
    options: Mapping[str, str] | None = None,
    search: Sequence[Path] = (),
    download: bool = False,
    progress: Progress | None = None,
    dtype: torch.dtype = torch.float32,
) -> Reward:
    """Load a reward by name.

    Args:
        name: A key of :func:`all_rewards`.
        path: Its file or folder, or a folder that holds its files by their published names; None for what ships
            with the package or lies in ``search``.
        device: Where it computes.
        options: Settings of the reward, as its entry lists them.
        search: More folders that hold files by their published names, such as ComfyUI's ``models/reward_models``.
        download: Fetch what is missing into the first of these folders.
        progress: Bytes done and in total, of the download; may raise to cancel.
        dtype: Of its networks. Scores are float32 or better.

    Raises:
        ValueError: Unknown name or option, files that are not there or of another model, a package that is missing.
    """
    known = REWARDS if name in REWARDS else all_rewards()
    if name not in known:
        raise ValueError(f"unknown reward {name!r}; known are {', '.join(known)}")
    entry, path = known[name], Path(path) if path else None
    settled = entry.settle(name, options or {})
    files = find(name, entry.parts, path, search, download=download, progress=progress)
    try:
        with torch.inference_mode(False):
            return entry.load(Request(name, files, path, device, dtype, settled))
    except ModuleNotFoundError as error:
        needed = f'"{ROOT}[{entry.extra}]"' if entry.extra else f"-r {ROOT / 'requirements.txt'}"
        raise ValueError(f"{name} {not_importable(error)}: {sys.executable} -m pip install {needed}") from None
    except (ValueError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the libraries check configurations with errors of many kinds
        if not files:
            raise
        reason = " ".join(str(error).split())
        raise WeightFileError(
            f"the files of {name} cannot be used ({type(error).__name__}: {reason}); download them again"
        ) from error


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # a name that is none
        return False


def _of_a_package(point: importlib.metadata.EntryPoint, package: str) -> Callable[[Request], Reward]:
    """The loader of an entry point; whatever goes wrong in it becomes a sentence that names the package."""

    def load(request: Request) -> Reward:
        try:
            reward = point.load()(request.path, request.device)
        except Exception as error:
            raise ValueError(
                f"the reward {point.name} of the package {package} cannot be loaded ({type(error).__name__}: {error})"
            ) from error
        if not isinstance(reward, Reward):
            raise ValueError(
                f"the reward {point.name} of the package {package} is no reward: it needs name, differentiable, "
                "needs and score"
            )
        return reward

    return load
