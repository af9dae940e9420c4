"""LoRAs as somebody wishes to use them, put into a model for a while and taken out bit for bit."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .inject import STRENGTH_RANGE, Adapter, check_strength, inject_new, inject_weights, total_norm
from .match import fit
from .network import linear_shapes, select_modules
from .weights import LoraFile, MatchedLora

__all__ = [
    "AUTO",
    "HIGH_NOISE",
    "LOW_NOISE",
    "STRENGTH_RANGE",
    "Adapter",
    "LoraUse",
    "applied",
    "at_input_precision",
    "at_step",
    "check_strength",
    "inject_new",
    "inject_weights",
    "linear_shapes",
    "said_expert",
    "select_modules",
    "total_norm",
]

AUTO, HIGH_NOISE, LOW_NOISE = "auto", "high_noise", "low_noise"
"""In place of an expert's name: the one the file is for, else all; the noisiest; the least noisy."""
_SAYS = re.compile(r"(high|low)[-_ ]?noise|(?<![a-z])(high|low)(?![a-z])")
_WINDOWS = "_reward_lora_windows"
_HALF = (torch.bfloat16, torch.float16)


def said_expert(lora: LoraFile) -> str:
    """The expert that a LoRA is for, as its metadata or its file's name say; ``auto`` if they do not."""
    said = _SAYS.search(lora.path.stem.lower())
    return lora.metadata.get("expert") or (said[1] or said[2] if said else AUTO)


@dataclass(frozen=True)
class LoraUse:
    """A wish to use a LoRA: what a node or a command line passes along until a model is at hand.

    Attributes:
        lora: The file, read.
        strength: -2..2.
        expert: Which network of the model it belongs to: its name, ``high_noise`` or ``low_noise`` of a model
            with two, or ``auto`` for the one its metadata or its file's name says, else every one.
        start, end: The part of the walk from noise to video in which it acts, 0..1. Late steps alone
            (0.5 to 1) keep the variety of the base model, for the early ones decide on the layout.

    Raises:
        ValueError: A value outside these ranges.
    """

    lora: LoraFile
    strength: float
    expert: str = AUTO
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        check_strength(self.strength)
        if not 0 <= self.start < self.end <= 1:
            raise ValueError(f"start and end must satisfy 0 <= start < end <= 1, got {self.start:g} and {self.end:g}")

    def experts(self, model) -> list[str]:
        """Names of the networks of a video model that get it. Raises ``ValueError`` for one the model lacks."""
        known = list(model.denoisers)
        wanted = self.expert
        if wanted == AUTO:
            wanted = said_expert(self.lora)
            if len(known) == 1 or wanted == AUTO:
                return known
        if len(known) > 1:
            noisiest, *_, cleanest = model.spec.experts
            wanted = {HIGH_NOISE: noisiest, LOW_NOISE: cleanest, "high": noisiest, "low": cleanest}.get(wanted, wanted)
        if wanted not in known:
            allowed = (AUTO, *((HIGH_NOISE, LOW_NOISE) if len(known) > 1 else ()), *known)
            raise ValueError(f"the expert must be one of {', '.join(dict.fromkeys(allowed))}, got {wanted!r}")
        return [wanted]

    def check(self, model) -> list[str]:
        """One line a network: what matches. Raises ``WeightFileError`` where nothing does."""
        return [_report(model, expert, fit(self.lora, model, expert)) for expert in self.experts(model)]

    def setting(self) -> str:
        """Strength and window in words."""
        window = f", steps from {self.start:.0%} to {self.end:.0%}" if (self.start, self.end) != (0, 1) else ""
        return f"strength {self.strength:g}{window}"

    def put_into(self, model) -> tuple[list[Adapter], list[str]]:
        """Inject it. Gives the adapters, and one line each."""
        taken = {name for network in model.denoisers.values() for name in getattr(network, "peft_config", ())}
        name = next(name for name in map("lora_{}".format, count()) if name not in taken)
        adapters, reports = [], []
        try:
            for expert in self.experts(model):
                matched = fit(self.lora, model, expert)
                adapters.append(inject_weights(model.denoisers[expert], matched, self.strength, name))
                reports.append(f"{_report(model, expert, matched)}, {self.setting()}")
        except BaseException:
            for adapter in adapters:
                adapter.remove()
            raise
        return adapters, reports


def _report(model, expert: str, matched: MatchedLora) -> str:
    return matched.report() + (f" in {expert}" if len(model.denoisers) > 1 else "")


@contextmanager
def applied(model, uses: Sequence[LoraUse]) -> Iterator[list[str]]:
    """Inject LoRAs for the length of a block and remove them bit for bit afterwards.

    Args:
        model: A video model (anything with ``denoisers`` and ``lora_names``).
        uses: LoRAs in order; the same file may come twice.

    Yields:
        One line a LoRA and network: how many modules matched.
    """
    reports: list[str] = []
    with ExitStack() as undo:
        for use in uses:
            adapters, lines = use.put_into(model)
            reports += lines
            for adapter in adapters:
                undo.callback(adapter.remove)
                if (use.start, use.end) != (0, 1):
                    undo.enter_context(_window(adapter, use.start, use.end))
        yield reports


@contextmanager
def _window(adapter: Adapter, start: float, end: float) -> Iterator[None]:
    """Let :func:`at_step` find the adapter."""
    windows = vars(adapter.model).setdefault(_WINDOWS, [])
    windows.append((adapter, start, end))
    try:
        yield
    finally:
        windows.remove((adapter, start, end))
        if not windows:
            del vars(adapter.model)[_WINDOWS]


def at_step(model, index: int, steps: int) -> None:
    """Tell the LoRAs of a model which solver step comes, so that one with a window acts in it alone.

    Whoever walks from noise to video calls it before every step.

    Args:
        model: The video model.
        index: Of the step; 0 is the noisiest.
        steps: Of the whole walk.
    """
    middle = (index + 0.5) / steps
    for network in model.denoisers.values():
        for adapter, start, end in getattr(network, _WINDOWS, ()):
            adapter.paused = not start <= middle < end


@contextmanager
def at_input_precision(model) -> Iterator[None]:
    """Let the LoRAs of a model compute in 16 bits where their layers do: for work without gradient.

    A LoRA's matrices are float32, and peft brings every layer's input to them and the result back. Here the two small
    matrices come to the input, and their product is added to the layer's output in the one multiplication that makes
    it. What differs is less than the rounding of the layers themselves; in float32 nothing does. The matrices stay
    as they are.

    Args:
        model: The video model.
    """
    from peft.tuners.lora import LoraLayer

    layers = [
        (layer, type(layer))
        for network in model.denoisers.values()
        for layer in network.modules()
        if isinstance(layer, LoraLayer) and not isinstance(layer, _AtInputPrecision)  # it may be called within itself
    ]
    try:
        for layer, kind in layers:
            layer.__class__ = _at_input_precision(kind)
        yield
    finally:
        for layer, kind in layers:
            layer.__class__ = kind


@cache
def _at_input_precision(kind: type) -> type:
    """peft's layer of a kind, with another way through it."""
    return type(kind.__name__, (_AtInputPrecision, kind), {})


class _AtInputPrecision:
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if x.dtype not in _HALF:
            return super().forward(x, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        for name in self.active_adapters:
            if name in self.lora_A:
                down, up = (part[name].weight.to(x.dtype) for part in (self.lora_A, self.lora_B))
                inside = F.linear(x.flatten(0, -2), down)
                added = torch.addmm(result.flatten(0, -2), inside, up.t(), alpha=self.scaling[name])
                result = added.view(result.shape)
        return result
