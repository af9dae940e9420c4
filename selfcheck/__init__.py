"""Proof, on the user's own machine, that the engine computes what it says."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from .report import Line


def run(fixtures: Iterable[Path] = (), *, parts: bool = False) -> Iterator[Line]:
    """The exactness proof, then the fixtures of every given folder (a line for each of their parts, if wished)."""
    from . import exactness
    from . import fixtures as parity

    yield from exactness.check()
    yield from parity.check(fixtures, parts=parts)
