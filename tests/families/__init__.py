"""Tiny random checkpoints of every model family, written as their publishers lay them out.

A family is one module here with ``LAYOUTS``, called as its file in ``video_models`` (without ``_files``):

- ``LAYOUTS: tuple[str, ...]``: the published layouts;
- ``write(folder, layout) -> None``: fills an empty folder with a tiny checkpoint in the real file names, key names and
  configurations, random weights from a fixed seed, one layout at least in sharded safetensors;
- ``SIZE``, optional: ``(width, height, frames)`` to paint, if 32x32 and 5 frames do not suit;
- ``open_files(folder) -> source``, optional: what to hand to ``load_video_model`` for a layout whose files lie in
  several folders; without it, the folder itself.
"""

from __future__ import annotations

import json
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

WORDS = ("a", "red", "blue", "circle", "square", "moves", "left", "right", "on", "the")


@dataclass(frozen=True)
class Case:
    """One family in one layout."""

    family: str
    layout: str

    @property
    def module(self) -> ModuleType:
        return import_module(f"{__name__}.{self.family}")

    @property
    def size(self) -> tuple[int, int, int]:
        """Width, height and frames to paint."""
        return getattr(self.module, "SIZE", (32, 32, 5))

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.module.write(folder, self.layout)

    def source(self, folder: Path) -> Any:
        """What ``load_video_model`` is given for the written folder."""
        return getattr(self.module, "open_files", lambda where: where)(folder)

    def __str__(self) -> str:
        return f"{self.family}-{self.layout}"


def cases() -> list[Case]:
    """Every layout of every family."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    layouts = {name: getattr(import_module(f"{__name__}.{name}"), "LAYOUTS", ()) for name in names}
    return [Case(name, layout) for name in names for layout in layouts[name]]


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def write_shards(folder: Path, stem: str, tensors: Mapping[str, Tensor], count: int = 2) -> None:
    """``stem-0000i-of-0000n.safetensors`` and their index, as the hub's large models come."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [f"{stem}-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    place = {name: files[i % count] for i, name in enumerate(sorted(tensors))}
    for file in files:
        save_file({n: v.contiguous() for n, v in tensors.items() if place[n] == file}, folder / file)
    write_json(folder / f"{stem}.safetensors.index.json", {"metadata": {}, "weight_map": place})


def write_word_tokenizer(folder: Path, words: Sequence[str] = WORDS) -> None:
    """A tokenizer of whole words that ends a text with ``</s>``, as T5's does; ids as in T5."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["<pad>", "</s>", "<unk>", *words]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
