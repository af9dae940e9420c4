"""What a reward is made from: which published files, where they are looked for, and how it is loaded from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..files import WeightFileError
from ..hub import Progress, RemoteFile, fetch, fetch_repository
from .protocol import Reward


@dataclass(frozen=True)
class Repository:
    """Files of a repository on the hub.

    Attributes:
        name: ``owner/name``.
        needed: The files without which the folder is not complete.
        patterns: What else to fetch, where it exists.
    """

    name: str
    needed: tuple[str, ...]
    patterns: tuple[str, ...] = ()

    @property
    def url(self) -> str:
        return RemoteFile(f"hf:{self.name}/{self.needed[0]}").url.partition("/resolve/")[0]


@dataclass(frozen=True)
class Part:
    """A file or a folder a reward is read from.

    Attributes:
        name: Its published name, which it keeps below a models folder.
        source: Where it is published; a path if it ships with the pack.
    """

    name: str
    source: RemoteFile | Repository | Path

    def at(self, path: Path) -> bool:
        """Whether it lies there, whole."""
        if isinstance(self.source, Repository):
            return all((path / name).is_file() for name in self.source.needed)
        return path.is_file()

    def fetch(self, target: Path, progress: Progress | None) -> Path:
        """Download it."""
        if isinstance(self.source, Repository):
            patterns = self.source.needed + self.source.patterns
            return fetch_repository(self.source.name, target, patterns=patterns, progress=progress)
        return fetch(self.source, target, progress=progress)

    def __str__(self) -> str:
        needed = f" ({', '.join(self.source.needed)})" if isinstance(self.source, Repository) else ""
        return f"{self.source.url}{needed}"


@dataclass(frozen=True)
class Request:
    """What a loader is given.

    Attributes:
        name: Of the reward.
        files: Where each part of the entry lies, by its key.
        path: As the user gave it.
        device: Where the reward computes.
        dtype: Of its networks.
        options: A value for every option of the entry.
    """

    name: str
    files: Mapping[str, Path]
    path: Path | None
    device: str
    dtype: torch.dtype
    options: Mapping[str, str]


@dataclass(frozen=True)
class RewardEntry:
    """One reward of the table.

    Attributes:
        load: Makes it; imports what it needs itself.
        summary: One line for lists and tooltips.
        licence: Of the weights, for where a user chooses them.
        parts: What it is read from; the first is the one a path to a single file means.
        options: Settings with the values allowed, the default first; no values allow any text.
        extra: Of this package, when it needs more than the rest: ``face`` of ``reward-lora[face]``.
    """

    load: Callable[[Request], Reward]
    summary: str
    licence: str = ""
    parts: Mapping[str, Part] = field(default_factory=dict)
    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    extra: str = ""

    def settle(self, name: str, options: Mapping[str, str]) -> dict[str, str]:
        """The options with their defaults.

        Raises:
            ValueError: An option it has not, or a value that is not allowed.
        """
        for key, value in options.items():
            if key not in self.options:
                known = ", ".join(self.options) or "none"
                raise ValueError(f"{name} has no option {key!r}; its options: {known}")
            if self.options[key] and value not in self.options[key]:
                raise ValueError(f"{key} of {name} must be one of {', '.join(self.options[key])}, got {value!r}")
        return {key: options.get(key, allowed[0] if allowed else "") for key, allowed in self.options.items()}


def find(
    name: str,
    parts: Mapping[str, Part],
    path: Path | None,
    search: Sequence[Path],
    *,
    download: bool = False,
    progress: Progress | None = None,
) -> dict[str, Path]:
    """Where every part lies.

    Args:
        name: Of the reward.
        parts: What it is read from.
        path: The file or folder of its first part, or a folder that holds the parts by their names.
        search: More folders that hold the parts by their names, such as ``models/reward_models``.
        download: Fetch what is in none of them into the first.
        progress: Of the download.

    Raises:
        WeightFileError: Something is missing; the sentence says where it is published and where it belongs.
    """
    if path is not None and not path.exists() and not download:
        raise WeightFileError(f"{path} does not exist; correct the path of {name}")
    found: dict[str, Path] = {}
    roots = [path, path.parent, *search] if path else search
    for key, part in parts.items():
        if isinstance(part.source, Path):
            found[key] = path or part.source
            continue
        folder = isinstance(part.source, Repository)
        own = [path] if path and (folder or key == next(iter(parts))) else []
        beside = found.values() if folder else ()  # a model's folder often holds its tokenizer
        places = [*own, *beside, *(root / part.name for root in roots)]
        there = next((place for place in places if part.at(place)), None)
        if there is not None:
            found[key] = there
    missing = {key: part for key, part in parts.items() if key not in found}
    if not missing:
        return found
    home = _home(path, found, search)
    if home is None:
        raise WeightFileError(f"{name} needs {' and '.join(map(str, missing.values()))}; download it and give its path")
    if not download:
        orders = " and ".join(f"put {part} at {home / part.name}" for part in missing.values())
        names = ", ".join(part.name for part in missing.values())
        raise WeightFileError(f"{name} lacks {names}: allow the download, or {orders}")
    return found | {key: part.fetch(home / part.name, progress) for key, part in missing.items()}


def _home(path: Path | None, found: Mapping[str, Path], search: Sequence[Path]) -> Path | None:
    """The folder that missing parts belong into."""
    if path is None:
        return search[0] if search else None
    return path.parent if path in found.values() or path.is_file() else path
