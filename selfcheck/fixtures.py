"""Walks folders of parity fixtures and compares our numbers with the public implementations'.

A fixture is a folder with ``meta.json`` (``kind``, ``family``, ``name``, the tiny model's configuration in the
publisher's terms, ``tolerance``) and safetensors files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..files import read_safetensors
from . import cogvideox, easyanimate, opensora, rewards, videocrafter, wan
from .report import Line

CHECKS: dict[tuple[str, str], Callable[[Fixture], Iterator[Line]]] = {
    ("transformer", "wan"): wan.check_transformer,
    ("lora", "wan"): wan.check_transformer,
    ("vae", "wan"): wan.check_vae,
    ("train_step", "wan"): wan.check_train_step,
    ("reward", "rewards"): rewards.check_rewards,
    ("transformer", "videocrafter2"): videocrafter.check_unet,
    ("lora", "videocrafter2"): videocrafter.check_lora,
    ("solver", "videocrafter2"): videocrafter.check_solver,
    ("transformer", "cogvideox"): cogvideox.check_transformer,
    ("lora", "cogvideox"): cogvideox.check_transformer,
    ("vae", "cogvideox"): cogvideox.check_vae,
    ("train_step", "cogvideox"): cogvideox.check_train_step,
    ("transformer", "easyanimate"): easyanimate.check_transformer,
    ("lora", "easyanimate"): easyanimate.check_transformer,
    ("vae", "easyanimate"): easyanimate.check_vae,
    ("transformer", "opensora"): opensora.check_transformer,
    ("vae", "opensora"): opensora.check_vae,
    ("solver", "opensora"): opensora.check_solver,
}
"""One function a kind and family, giving a line a part. Another family is another file and its lines here."""


@dataclass(frozen=True)
class Fixture:
    """One folder.

    Attributes:
        folder: Where it lies.
        meta: Its ``meta.json``.
    """

    folder: Path
    meta: dict

    @property
    def name(self) -> str:
        return self.meta.get("name") or self.folder.name

    def tensors(self, file: str) -> dict[str, Tensor]:
        """Tensors of a file; stored half precision is exact and becomes float32."""
        tensors, _ = read_safetensors(self.folder / file)
        return {key: t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for key, t in tensors.items()}


def find(folders: Iterable[Path]) -> Iterator[Fixture]:
    """Every folder with a ``meta.json`` under the given ones.

    Raises:
        ValueError: A given folder holds none, or a ``meta.json`` is no JSON object.
    """
    for folder in folders:
        metas = sorted(folder.rglob("meta.json"))
        if not metas:
            raise ValueError(f"{folder} holds no fixture (a folder with meta.json)")
        for path in metas:
            try:
                meta = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{path} is not JSON: {error}") from None
            if not isinstance(meta, dict):
                raise ValueError(f"{path} must hold an object, got {type(meta).__name__}")
            yield Fixture(path.parent, meta)


def check(folders: Iterable[Path], *, parts: bool = False) -> Iterator[Line]:
    """One line a fixture: its part that comes nearest to its tolerance.

    What we do not implement yet is skipped with a word; what cannot be computed has failed.

    Args:
        folders: Walked for fixtures.
        parts: A line for every part instead.
    """
    for fixture in find(folders):
        kind, family = fixture.meta.get("kind", "?"), fixture.meta.get("family") or "rewards"
        function = CHECKS.get((kind, family))
        if function is None:
            yield Line(fixture.name, kind, None, note=f"{kind} of {family} is not here yet")
            continue
        try:
            lines = list(function(fixture))
        except Exception as error:  # whatever is wrong with one fixture, the others go on
            yield Line(fixture.name, kind, float("inf"), 0.0, f"{type(error).__name__}: {error}")
            continue
        if not parts:
            lines = [max(lines, key=Line.strain)]
        for line in lines:
            name = f"{fixture.name}: {line.name}" if parts else fixture.name
            yield replace(line, name=name, kind=kind, note=line.note or ("" if parts else line.name))
