"""A LoRA in memory: its matrices, as a file spells them and as a model knows them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from .names import IMAGE_ONLY, PREFIXES, find_prefix


@dataclass(frozen=True)
class LoraModule:
    """The two matrices of one adapted layer: ``delta = alpha / rank * up @ down``.

    Attributes:
        down: ``[rank, in]``.
        up: ``[out, rank]``.
        alpha: Network alpha; equal to the rank when the file folds it into the matrices.
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight it changes: ``(out, in)``."""
        return self.up.shape[0], self.down.shape[1]

    @property
    def scale(self) -> float:
        """What the product of the matrices is multiplied by at strength 1."""
        return self.alpha / self.rank

    def delta(self) -> Tensor:
        """What it adds to the weight at strength 1: ``[out, in]`` float32."""
        return self.up.float() @ self.down.float() * self.scale


@dataclass(frozen=True)
class Offset:
    """What is added to a layer's parameters as it is: ComfyUI's ``.diff`` and ``.diff_b``.

    Attributes:
        weight: Shaped like the layer's weight, or None.
        bias: Shaped like its bias, or None.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None


@dataclass(frozen=True)
class LoraFile:
    """A LoRA as it lies on disk, before it meets a model.

    Attributes:
        path: Where it was read from.
        modules: Matrices by the module's name as the file spells it.
        metadata: The safetensors metadata.
        other_keys: Keys that are no LoRA weights.
        offsets: Plain additions to parameters, by the module's name as the file spells it.
        notes: What was assumed in reading, one sentence each.
    """

    path: Path
    modules: dict[str, LoraModule] = field(repr=False)
    metadata: dict[str, str]
    other_keys: tuple[str, ...]
    offsets: dict[str, Offset] = field(default_factory=dict, repr=False)
    notes: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """Every module the file speaks of, as it spells it."""
        return [*self.modules, *(name for name in self.offsets if name not in self.modules)]

    @property
    def prefix(self) -> str:
        """What its names begin with: a key of ``PREFIXES``."""
        return find_prefix(self.names[0])

    @property
    def format(self) -> str:
        """What its spelling is called."""
        return PREFIXES[self.prefix]

    @property
    def ranks(self) -> list[int]:
        """Those that occur, ascending."""
        return sorted({module.rank for module in self.modules.values()})

    def in_memory(self) -> LoraFile:
        """The same LoRA, which stays what it is when its file is replaced."""
        modules = {name: LoraModule(m.down.clone(), m.up.clone(), m.alpha) for name, m in self.modules.items()}
        offsets = {name: Offset(*(v if v is None else v.clone() for v in (o.weight, o.bias)))
                   for name, o in self.offsets.items()}  # fmt: skip
        return replace(self, modules=modules, offsets=offsets)


@dataclass(frozen=True)
class MatchedLora:
    """A LoRA resolved against a model.

    Attributes:
        modules: Matrices by our module name.
        unmatched: Modules of the file that the model does not have.
        source: Name for messages.
        offsets: Plain additions by our module name.
    """

    modules: dict[str, LoraModule] = field(repr=False)
    unmatched: tuple[str, ...]
    source: str
    offsets: dict[str, Offset] = field(default_factory=dict, repr=False)

    @property
    def count(self) -> int:
        """How many of the model's modules it changes."""
        return len(self.modules.keys() | self.offsets.keys())

    def report(self) -> str:
        """One line: what matched, what was left out and why."""
        text = f"{self.source}: {self.count} modules matched"
        images = [name for name in self.unmatched if IMAGE_ONLY.search(name)]
        others = [name for name in self.unmatched if not IMAGE_ONLY.search(name)]
        if images:
            text += f", {len(images)} for image input left out (such as {images[0]}), which this model does not take"
        if others:
            text += f", {len(others)} not in this model and left out (such as {others[0]})"
        return text
