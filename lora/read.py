"""LoRA files of any trainer, read and checked."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import WeightFileError, read_pickle, read_safetensors
from .names import split_key
from .weights import LoraFile, LoraModule, Offset

PICKLES = (".pt", ".pth", ".bin", ".ckpt")
VADER = re.compile(r"^base_model\.model\.(?:model\.diffusion_model|spatial_blocks|temporal_blocks)\.")
VADER_ALPHA = 8.0
"""peft's own default: VADER never sets alpha, and its files do not hold it."""
FOREIGN = re.compile(r"\.(?:hada_|lokr_|oft_|lora_magnitude_vector|dora_scale|lora_mid)")


def read_lora(path: Path | str, alpha: float | None = None) -> LoraFile:
    """Read a LoRA file of any trainer.

    Args:
        path: ``.safetensors``, or a PyTorch file (``.pt``, ``.pth``, ``.bin``, ``.ckpt``) that holds only tensors.
        alpha: Network alpha of modules for which the file gives none. Without it: what ``adapter_config.json``
            beside peft's ``adapter_model.*`` or diffusers' metadata say, 8 for VADER's files, else the rank.

    Raises:
        WeightFileError: Not readable, without LoRA weights, or with weights that cannot be meant: halves
            missing, sizes that do not fit, names given twice, numbers that are not finite.
    """
    path = Path(path)
    tensors, metadata = (read_pickle(path), {}) if path.suffix.lower() in PICKLES else read_safetensors(path)
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    other = []
    for key, tensor in tensors.items():
        split = split_key(key)
        if split is None:
            other.append(key)
            continue
        module, part = split
        if part in parts[module]:
            raise WeightFileError(f"{path.name} gives the {part} weights of {module} twice; get a sound file")
        parts[module][part] = _checked(path, key, tensor)
    foreign = next((key for key in other if FOREIGN.search(key)), None)
    if foreign:
        raise WeightFileError(
            f"{path.name} is no plain LoRA (it holds {foreign}); use a LoRA with lora_A/lora_B or lora_down/lora_up"
        )
    if not any(part.keys() - {"alpha"} for part in parts.values()):
        example = next(iter(tensors), "nothing at all")
        raise WeightFileError(f"{path.name} holds no LoRA matrices (it holds {example}); choose a LoRA file")
    given = _Alphas(path, metadata, alpha)
    modules, offsets = {}, {}
    for name, found in parts.items():
        if "down" in found or "up" in found:
            modules[name] = _module(path, name, found, given)
        if "diff" in found or "diff_b" in found:
            offsets[name] = Offset(found.get("diff"), found.get("diff_b"))
        elif name not in modules:
            other.append(f"{name}.alpha")
    if other:
        more = f" and {len(other) - 1} more" if len(other) > 1 else ""
        given.notes.append(f"left out, for they are no weights of a LoRA: {other[0]}{more}")
    return LoraFile(path, modules, metadata, tuple(other), offsets, tuple(given.notes))


def _checked(path: Path, key: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point() and not key.endswith(".alpha"):
        raise WeightFileError(f"{path.name}: {key} holds {tensor.dtype}, not fractions; get a sound file")
    finite = tensor if tensor.element_size() > 1 else tensor.float()  # float8 knows no isfinite
    if not torch.isfinite(finite).all():
        raise WeightFileError(f"{path.name}: {key} holds numbers that are not finite; get a sound file")
    return tensor


def _module(path: Path, name: str, found: Mapping[str, Tensor], alphas: _Alphas) -> LoraModule:
    for half, what in (("down", "lora_down (lora_A)"), ("up", "lora_up (lora_B)")):
        if half not in found:
            raise WeightFileError(f"{path.name}: {name} lacks its {what} weights; the file is incomplete")
        if found[half].ndim < 2 or not found[half].numel():
            raise WeightFileError(f"{path.name}: the {what} weights of {name} are no matrix: {list(found[half].shape)}")
    down, up = found["down"].flatten(1), found["up"].flatten(1)
    if down.shape[0] != up.shape[1]:
        raise WeightFileError(
            f"{path.name}: the matrices of {name} do not fit each other: {list(down.shape)}, {list(up.shape)}"
        )
    if "alpha" not in found:
        return LoraModule(down, up, alphas.of(name, down.shape[0]))
    if found["alpha"].numel() != 1:
        raise WeightFileError(f"{path.name}: the alpha of {name} must be one number, got {list(found['alpha'].shape)}")
    return LoraModule(down, up, float(found["alpha"]))


class _Alphas:
    """Network alpha of modules whose file does not hold it."""

    def __init__(self, path: Path, metadata: Mapping[str, str], given: float | None) -> None:
        self._given, self._pickle = given, path.suffix.lower() in PICKLES
        self._config, self._source = _peft_config(path, metadata)
        self.notes: list[str] = []

    def of(self, name: str, rank: int) -> float:
        if self._given is not None:
            return self._noted(self._given, f"alpha {self._given:g} as you say; the file holds none")
        if self._config:
            return self._noted(_peft_alpha(self._config, name, rank), f"alpha from {self._source}")
        if VADER.match(name) or (self._pickle and name.startswith("base_model.model.")):
            return self._noted(VADER_ALPHA, f"alpha {VADER_ALPHA:g}, as VADER trains; the file holds none")
        return float(rank)

    def _noted(self, alpha: float, note: str) -> float:
        if note not in self.notes:
            self.notes.append(note)
        return float(alpha)


def _peft_config(path: Path, metadata: Mapping[str, str]) -> tuple[dict[str, Any], str]:
    """Settings in peft's words: in a file beside peft's own, or in the metadata diffusers writes."""
    beside = path.with_name("adapter_config.json")
    try:
        if path.stem == "adapter_model" and beside.is_file():
            config, source = json.loads(beside.read_text(encoding="utf-8")), beside.name
        elif "lora_adapter_metadata" in metadata:
            stored = json.loads(metadata["lora_adapter_metadata"])
            config, source = {key.partition(".")[2]: value for key, value in stored.items()}, "diffusers' metadata"
        else:
            return {}, ""
        if "lora_alpha" not in config:
            return {}, ""
        float(config["lora_alpha"])
    except (ValueError, TypeError, AttributeError, OSError):
        raise WeightFileError(f"{path.name}: peft's settings that belong to it are damaged; get them again") from None
    if config.get("use_dora"):
        raise WeightFileError(f"{path.name} is a DoRA, which cannot be applied as a LoRA; use a plain LoRA")
    return config, source


def _peft_alpha(config: Mapping[str, Any], name: str, rank: int) -> float:
    """Alpha such that ``alpha / rank`` is peft's scaling (also with its rank-stabilised one)."""
    patterns = config.get("alpha_pattern") or {}
    matching = (a for pattern, a in patterns.items() if name == pattern or name.endswith(f".{pattern.lstrip('^')}"))
    alpha = float(next(matching, config["lora_alpha"]))
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha
