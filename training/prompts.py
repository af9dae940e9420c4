"""Prompts: read from a file, encoded once, kept on disk so that the text encoder can leave."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files import WeightFileError, read_safetensors, write_safetensors
from ..video_models.protocol import Tick, VideoModel


class PromptFileError(ValueError):
    """A prompt file that cannot be used."""


def read_prompts(path: Path | str) -> list[str]:
    """Read ``.txt`` (one prompt a line) or ``.jsonl`` (objects with a ``prompt``), UTF-8; blank lines are skipped.

    Raises:
        PromptFileError: Missing, empty, not UTF-8, or a broken line.
    """
    return [row["prompt"] for _, row in read_rows(Path(path))]


def read_rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """What :func:`read_prompts` reads, with each prompt its line and whatever else the object says of it."""
    rows = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        row = {"prompt": line}
        if path.suffix == ".jsonl":
            try:
                row = json.loads(line)
                row["prompt"]
            except (ValueError, KeyError, TypeError, RecursionError):
                raise PromptFileError(
                    f'{path.name}, line {number}: expected an object such as {{"prompt": "..."}}'
                ) from None
        rows.append((number, row | {"prompt": str(row["prompt"]).strip()}))
    if not rows:
        raise PromptFileError(f"{path.name} holds no prompt; write one a line")
    return rows


def read_text(path: Path) -> str:
    """A text file, with or without a byte order mark. Raises ``PromptFileError``: missing, or not UTF-8."""
    if not path.is_file():
        raise PromptFileError(f"{path}: there is no such prompt file")
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise PromptFileError(f"{path.name} is not UTF-8 text (line {line}); save it again as UTF-8") from None


class EmbeddingStore:
    """Text embeddings by prompt, in memory and, if a folder is given, on disk by content hash.

    Args:
        model: Encodes what is not known yet.
        folder: Where ``<hash>.safetensors`` files lie; None keeps them in memory alone.
    """

    def __init__(self, model: VideoModel, folder: Path | None = None) -> None:
        self._model, self._folder = model, folder
        self._known: dict[str, Tensor] = {}
        self._fingerprint = model.text_fingerprint() if folder else ""

    def _path(self, prompt: str) -> Path | None:
        if self._folder is None:
            return None
        digest = hashlib.sha256(f"{self._fingerprint}\n{prompt}".encode()).hexdigest()
        return self._folder / f"{digest[:32]}.safetensors"

    def prepare(self, prompts: Sequence[str], tick: Tick) -> None:
        """Make every prompt known, encoding those that are not, one by one."""
        for prompt in dict.fromkeys(prompts):
            if prompt in self._known:
                continue
            path = self._path(prompt)
            if path is not None and path.exists():
                try:
                    self._known[prompt] = read_safetensors(path)[0]["embedding"]
                    continue
                except (WeightFileError, KeyError):
                    pass  # a damaged cache entry is made again
            tick("text")
            embedding = self._model.encode_text([prompt])[0].cpu().contiguous()
            self._known[prompt] = embedding
            if path is not None:
                write_safetensors(path, {"embedding": embedding}, {})

    def any(self) -> Tensor:
        """One of the embeddings, for its shape."""
        return next(iter(self._known.values()))

    def __getitem__(self, prompt: str) -> Tensor:
        return self._known[prompt]
