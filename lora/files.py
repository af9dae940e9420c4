"""LoRA files: read in any trainer's spelling, written in the one that ComfyUI and diffusers read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..files import WeightFileError, read_safetensors, write_safetensors
from .names import ModuleNames, find_prefix, split_key

FORMAT_VERSION = "1"


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


@dataclass(frozen=True)
class LoraFile:
    """A LoRA as it lies on disk, before it meets a model.

    Attributes:
        path: Where it was read from.
        modules: Matrices by the module's name as the file spells it.
        metadata: The safetensors metadata.
        other_keys: Keys that are no LoRA matrices.
    """

    path: Path
    modules: dict[str, LoraModule] = field(repr=False)
    metadata: dict[str, str]
    other_keys: tuple[str, ...]

    @property
    def prefix(self) -> str:
        return find_prefix(next(iter(self.modules)))

    @property
    def ranks(self) -> list[int]:
        return sorted({module.rank for module in self.modules.values()})


@dataclass(frozen=True)
class MatchedLora:
    """A LoRA resolved against a model.

    Attributes:
        modules: Matrices by our module name.
        unmatched: Modules of the file that the model does not have.
        source: Name for messages.
    """

    modules: dict[str, LoraModule] = field(repr=False)
    unmatched: tuple[str, ...]
    source: str

    def report(self) -> str:
        text = f"{self.source}: {len(self.modules)} modules matched"
        if self.unmatched:
            text += f", {len(self.unmatched)} not in this model and left out (such as {self.unmatched[0]})"
        return text


def read_lora(path: Path | str) -> LoraFile:
    """Read a LoRA file.

    Raises:
        WeightFileError: Not a readable safetensors file, or one without LoRA matrices.
    """
    path = Path(path)
    tensors, metadata = read_safetensors(path)
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    other = []
    for key, tensor in tensors.items():
        split = split_key(key)
        if split is None:
            other.append(key)
        else:
            parts[split[0]][split[1]] = tensor
    modules = {}
    for name, found in parts.items():
        if "down" not in found or "up" not in found:
            other.append(name)
            continue
        down, up = found["down"].flatten(1), found["up"].flatten(1)
        if down.shape[0] != up.shape[1]:
            raise WeightFileError(
                f"{path.name}: the matrices of {name} do not fit each other: {list(down.shape)}, {list(up.shape)}"
            )
        modules[name] = LoraModule(down, up, float(found["alpha"]) if "alpha" in found else float(down.shape[0]))
    if not modules:
        example = next(iter(tensors), "nothing at all")
        raise WeightFileError(f"{path.name} holds no LoRA matrices (it holds {example}); choose a LoRA file")
    return LoraFile(path, modules, metadata, tuple(other))


def match(file: LoraFile, original_names: Mapping[str, str], shapes: Mapping[str, tuple[int, int]]) -> MatchedLora:
    """Resolve a file's modules against a model.

    Args:
        file: What :func:`read_lora` returned.
        original_names: The publisher's name of each LoRA-capable module, by our name.
        shapes: ``(out, in)`` of each of them, by our name.

    Raises:
        WeightFileError: No module matches, or one has other sizes: the LoRA was made for another model.
    """
    names = ModuleNames(original_names)
    matched, unmatched = {}, []
    made_for = file.metadata.get("base_model")
    hint = f"; it says it was made for {made_for}" if made_for else ""
    for spelled, module in file.modules.items():
        ours = names.find(spelled)
        if ours is None:
            unmatched.append(spelled)
            continue
        expected, given = shapes[ours], (module.up.shape[0], module.down.shape[1])
        if expected != given:
            raise WeightFileError(
                f"{file.path.name} was made for another model: {spelled} is {given[0]}x{given[1]} in it and "
                f"{expected[0]}x{expected[1]} here{hint}"
            )
        matched[ours] = module
    if not matched:
        raise WeightFileError(
            f"{file.path.name} was made for another model: none of its {len(file.modules)} modules is in this one "
            f"(the first is {unmatched[0]}){hint}"
        )
    return MatchedLora(matched, tuple(unmatched), file.path.name)


def write_lora(
    path: Path | str,
    modules: Mapping[str, LoraModule],
    original_names: Mapping[str, str],
    metadata: Mapping[str, str],
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write ``diffusion_model.<publisher's name>.lora_A/B.weight`` with alpha folded into ``lora_A``.

    Args:
        path: Target; written atomically.
        modules: Matrices by our module name.
        original_names: The publisher's name of each module, by our name.
        metadata: Kept as it is, plus the format version.
        dtype: Stored type; folding happens in float32.
    """
    tensors = {}
    for ours, module in modules.items():
        name = f"diffusion_model.{original_names[ours]}"
        scale = module.alpha / module.rank
        tensors[f"{name}.lora_A.weight"] = (module.down.detach().float().cpu() * scale).to(dtype)
        tensors[f"{name}.lora_B.weight"] = module.up.detach().float().cpu().to(dtype)
    return write_safetensors(path, tensors, {"format": "pt", "reward_lora_format": FORMAT_VERSION, **metadata})
