"""All chance as a function of names and numbers, so that a resumed run repeats the uninterrupted one."""

from __future__ import annotations

import hashlib
import random


def seed_for(*what: int | str) -> int:
    """A 63-bit seed that depends on every argument, for example ``("noise", seed, step, rank, sample)``."""
    digest = hashlib.sha256("/".join(map(str, what)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def draw_prompts(count: int, seed: int, draw: int, batch: int) -> list[int]:
    """Indices of the ``draw``-th batch: every prompt once in a random order, then in another, and so on."""
    indices = []
    for position in range(draw * batch, (draw + 1) * batch):
        epoch, place = divmod(position, count)
        order = list(range(count))
        random.Random(seed_for("prompts", seed, epoch)).shuffle(order)
        indices.append(order[place])
    return indices
