"""Rewards as a user writes them, on the command line and in nodes alike.

One reward is ``NAME``, with settings ``NAME[option=value, option=value]``. Every reward that reads the prompt also
takes ``NAME[positive=Realistic photo, negative=CG Render]``, see :mod:`.relative`. Several are
``NAME*WEIGHT+NAME*WEIGHT``, a weighted sum; a weight left out is 1 and may be negative (``a+b*-0.5``). Any other
mixture is written as a call, ``min(a+b*2)`` or ``softmin(a+b, temperature=0.5, normalised, balanced)``, with what
:class:`.mixture.MixtureSettings` knows: ``sum``, ``mean``, ``min`` or ``softmin``. Spaces do not count between parts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from .mixture import Combination, Mixture, MixtureSettings
from .protocol import Reward
from .relative import Relative, Words

SHAPE = "NAME*WEIGHT+NAME*WEIGHT, such as hps_v2.1*0.5+aesthetic_v2*0.1"


@dataclass(frozen=True)
class Term:
    """One reward of a mixture.

    Attributes:
        name: A reward's name, or ``file.py:NAME``.
        weight: How much it counts.
        options: Its settings, by name.
        words: Phrases that its score is relative to.
    """

    name: str
    weight: float = 1.0
    options: Mapping[str, str] = field(default_factory=dict)
    words: Words = Words()


@dataclass(frozen=True)
class Spelling:
    """What was written.

    Attributes:
        terms: At least one.
        settings: How they become one score.
    """

    terms: tuple[Term, ...]
    settings: MixtureSettings = MixtureSettings()

    @property
    def single(self) -> bool:
        """Whether it is one reward as it is, and no mixture."""
        return len(self.terms) == 1 and self.terms[0].weight == 1 and self.settings == MixtureSettings()

    def load(self, load: Callable[[str, Mapping[str, str]], Reward]) -> Reward:
        """The reward, every term loaded by ``load(name, options)``."""
        rewards = [load(term.name, term.options) for term in self.terms]
        rewards = [Relative(r, t.words) if t.words else r for r, t in zip(rewards, self.terms, strict=True)]
        return rewards[0] if self.single else Mixture(rewards, [term.weight for term in self.terms], self.settings)


def parse(text: str) -> Spelling:
    """Read a reward or a mixture of rewards.

    Raises:
        ValueError: It is not written as above; the sentence says which part.
    """
    call = re.fullmatch(r"\s*(\w+)\s*\((.*)\)\s*", text, re.DOTALL)
    if not call:
        return Spelling(tuple(_term(part, text) for part in _split(text, "+")))
    if call[1] not in get_args(Combination):
        known = ", ".join(get_args(Combination))
        raise ValueError(f"{call[1]!r} in the reward {text.strip()!r} is no way to combine; known are {known}")
    terms, *settings = _split(call[2], ",")
    chosen: dict[str, Any] = {"combine": call[1]}
    for setting in settings:
        name, _, value = (part.strip() for part in setting.partition("="))
        if name in ("normalised", "balanced") and not value:
            chosen[name] = True
        elif name == "temperature":
            chosen[name] = _number(value, text)
        else:
            raise ValueError(
                f"{setting.strip()!r} in the reward {text.strip()!r} is no setting; known are temperature=NUMBER, "
                "normalised and balanced"
            )
    return Spelling(tuple(_term(part, text) for part in _split(terms, "+")), MixtureSettings(**chosen))


def _split(text: str, separator: str) -> list[str]:
    """Parts between separators that stand in no square brackets."""
    return re.split(rf"{re.escape(separator)}(?![^\[]*\])", text)


def _term(text: str, whole: str) -> Term:
    found = re.fullmatch(r"\s*([^\[\]*()]+?)\s*(?:\[([^\[\]]*)\])?\s*(?:\*\s*([^*\[\]()]+?))?\s*", text)
    if not found:
        raise ValueError(f"{text.strip()!r} in the reward {whole.strip()!r} is no term; a reward is a name, or {SHAPE}")
    name, options, weight = found.groups()
    settled = {}
    for option in (options or "").split(",") if options else ():
        key, equals, value = (part.strip() for part in option.partition("="))
        if not (key and equals and value):
            raise ValueError(
                f"{option.strip()!r} in the reward {whole.strip()!r} is no option; write NAME[option=value]"
            )
        settled[key] = value
    words = Words(settled.pop("positive", ""), settled.pop("negative", ""))
    return Term(name, 1.0 if weight is None else _number(weight, whole), settled, words)


def _number(text: str, whole: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text!r} in the reward {whole.strip()!r} is no number; write {SHAPE}") from None
