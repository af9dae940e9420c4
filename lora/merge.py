"""Several LoRAs as one, and one at a lower rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from .weights import LoraModule, Offset


def merge(loras: Sequence[tuple[Mapping[str, LoraModule], float]]) -> dict[str, LoraModule]:
    """One LoRA that changes the weights as all of them together at their weights.

    The matrices are put side by side, so nothing is approximated: the rank of a module is the sum of its ranks,
    and its alpha equals its rank.

    Args:
        loras: Matrices by module, and the weight (the strength) each is to have.
    """
    merged = {}
    for name in dict.fromkeys(name for modules, _ in loras for name in modules):
        parts = [(modules[name], weight) for modules, weight in loras if name in modules]
        down = torch.cat([module.down.float() for module, _ in parts])
        up = torch.cat([module.up.float() * (weight * module.scale) for module, weight in parts], dim=1)
        merged[name] = LoraModule(down, up, float(down.shape[0]))
    return merged


def merge_offsets(loras: Sequence[tuple[Mapping[str, Offset], float]]) -> dict[str, Offset]:
    """The weighted sum of plain additions, by module."""

    def total(values: Iterable[tuple[Tensor | None, float]]) -> Tensor | None:
        parts = [value.float() * weight for value, weight in values if value is not None]
        return sum(parts[1:], parts[0]) if parts else None

    merged = {}
    for name in dict.fromkeys(name for offsets, _ in loras for name in offsets):
        parts = [(offsets[name], weight) for offsets, weight in loras if name in offsets]
        merged[name] = Offset(total((o.weight, w) for o, w in parts), total((o.bias, w) for o, w in parts))
    return merged


def resize(modules: Mapping[str, LoraModule], rank: int) -> tuple[dict[str, LoraModule], float]:
    """The nearest LoRA of a lower rank, by singular value decomposition of every module's change.

    Args:
        modules: Matrices by module; one whose rank is lower already stays as it is.
        rank: The new rank, at least 1.

    Returns:
        The matrices, and the kept energy: the share of the squared entries of all changes together, 0..1.

    Raises:
        ValueError: ``rank`` is below 1.
    """
    if rank < 1:
        raise ValueError(f"the rank must be at least 1, got {rank}")
    resized, kept, total = {}, 0.0, 0.0
    for name, module in modules.items():
        # The change is up @ down, so its decomposition is that of two small triangles.
        q_up, r_up = torch.linalg.qr(module.up.double() * module.scale)
        q_down, r_down = torch.linalg.qr(module.down.double().T)
        left, values, right = torch.linalg.svd(r_up @ r_down.T)
        energy = values.square()
        total += float(energy.sum())
        kept += float(energy[:rank].sum())
        if module.rank <= rank:
            resized[name] = module
            continue
        root = values[:rank].sqrt()
        up, down = q_up @ left[:, :rank] * root, root[:, None] * right[:rank] @ q_down.T
        resized[name] = LoraModule(down.float().contiguous(), up.float().contiguous(), float(len(root)))
    return resized, kept / total if total else 1.0
