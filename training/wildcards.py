"""Prompts drawn from a list, with wildcards in them: ``a {red|blue} __shape__ on the left``."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from .prompts import PromptFileError, read_text
from .seeds import seed_for

Order = Literal["sequential", "random"]

_CHOICE = re.compile(r"\{([^{}]*)\}")
_FILE = re.compile(r"__(\w(?:[\w/ -]*?\w)?)__(?!_)")
DEPTH = 20
"""How deep wildcards may lie in each other."""


def draw(lines: Sequence[str], order: Order, seed: int, count: int = 0, wildcards: Path | None = None) -> list[str]:
    """Prompts from a list.

    Args:
        lines: The list; wildcards are replaced anew in every prompt that is drawn.
        order: ``sequential`` begins at line ``seed`` (0 is the first) and begins again after the last; ``random``
            shuffles, and takes no line twice before it has taken all.
        seed: See ``order``; also the source of the wildcards' chance.
        count: How many; 0 is as many as there are lines.
        wildcards: Folder of the files that ``__name__`` speaks of.

    Raises:
        PromptFileError: No lines, or wildcards that :func:`expand` refuses.
        ValueError: Another order.
    """
    if order not in get_args(Order):
        raise ValueError(f"the order must be one of {', '.join(get_args(Order))}, got {order!r}")
    if not lines:
        raise PromptFileError("there is no prompt to draw; write them one a line, or give a file")
    count = count or len(lines)
    if order == "random":
        places = [place for epoch in range(-(-count // len(lines))) for place in _shuffled(len(lines), seed, epoch)]
    else:
        places = [(seed + index) % len(lines) for index in range(count)]
    # In sequence, the prompt at a place is the same whether it was drawn alone or among others.
    chance = [seed_for("wildcards", *((seed, i) if order == "random" else (seed + i,))) for i in range(count)]
    return [expand(lines[place], random.Random(each), wildcards) for place, each in zip(places, chance, strict=False)]


def _shuffled(count: int, seed: int, epoch: int) -> list[int]:
    places = list(range(count))
    random.Random(seed_for("prompts", seed, epoch)).shuffle(places)
    return places


def expand(text: str, rng: random.Random, wildcards: Path | None = None) -> str:
    """A text without wildcards: of ``{red|blue}`` one remains, ``__shape__`` becomes a line of ``shape.txt``.

    Both may hold wildcards themselves.

    Args:
        text: A prompt.
        rng: Chooses.
        wildcards: Folder of the files; None has none.

    Raises:
        PromptFileError: A brace without its other, a file that is not there, or wildcards without an end.
    """
    for _ in range(DEPTH):
        replaced = _FILE.sub(lambda found: _line(found[1], rng, wildcards), text)
        replaced = _CHOICE.sub(lambda found: rng.choice(found[1].split("|")).strip(), replaced)
        if replaced == text:
            if "{" in text or "}" in text:
                raise PromptFileError(f"a brace without its other in the prompt {text!r}; write {{red|blue}}")
            return " ".join(text.split())
        text = replaced
    raise PromptFileError(f"wildcards lead to each other without end, last in {text[:80]!r}")


def _line(name: str, rng: random.Random, wildcards: Path | None) -> str:
    file = wildcards / f"{name}.txt" if wildcards else None
    if file is None or not file.is_file():
        known = sorted(p.relative_to(wildcards).with_suffix("").as_posix() for p in wildcards.rglob("*.txt")) \
            if wildcards else []  # fmt: skip
        there = f"there are {', '.join(known[:20])}" if known else "there are none yet"
        raise PromptFileError(f"there is no wildcard file {name}.txt in {wildcards or 'any folder'}; {there}")
    lines = [line.strip() for line in read_text(file).splitlines() if line.strip() and not line.startswith("#")]
    if not lines:
        raise PromptFileError(f"the wildcard file {file.name} holds no line")
    return rng.choice(lines)
