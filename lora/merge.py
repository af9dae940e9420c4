"""Several LoRAs as one, and one at a lower rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..files import WeightFileError
from .adapter import AUTO, said_expert
from .guess import cogvideox_version, guess_base
from .weights import LoraFile, LoraModule, MatchedLora, Offset


def merge_files(
    parts: Sequence[tuple[LoraFile, MatchedLora, float]],
    rank: int = 0,
    source: str = "merged.safetensors",
    tick: Callable[[str], None] = lambda _: None,
) -> tuple[MatchedLora, dict[str, str], list[str]]:
    """Several LoRAs of one network as one.

    Args:
        parts: Each as its file has it, under our module names (:func:`.resolve.resolve`), and its weight. At weight 0
            it is left out.
        rank: The new rank of every module; 0 keeps the sum of its ranks, and approximates nothing.
        source: Its name for messages.
        tick: Called before a module's rank is reduced; what it raises ends the work.

    Returns:
        The LoRA, its metadata, and what was done in lines of text.

    Raises:
        WeightFileError: LoRAs for different models or different experts of one.
        ValueError: None is left, or the rank is negative.
    """
    parts = [part for part in parts if part[2]]
    if not parts:
        raise ValueError("nothing is left to merge: give at least one LoRA and a weight that is not 0")
    expert = _expert([file for file, *_ in parts])
    _fit_each_other(parts)
    modules = merge([(matched.modules, weight) for _, matched, weight in parts])
    offsets = merge_offsets([(matched.offsets, weight) for _, matched, weight in parts])
    lines = [matched.report() for _, matched, _ in parts if matched.unmatched]
    if rank:
        modules, kept = resize(modules, rank, tick)
        lines.append(f"rank {rank} keeps {kept:.4%} of the energy of all changes")
    bases = list(dict.fromkeys(base for file, *_ in parts if (base := file.metadata.get("base_model"))))
    if len(bases) > 1:
        lines.append(f"made for {' and '.join(bases)}, whose layers have the same names and sizes")
    said = (f"({inner})" if (inner := file.metadata.get("merged_from")) else file.path.name for file, *_ in parts)
    metadata = {"merged_from": ", ".join(f"{name} at {part[2]:g}" for name, part in zip(said, parts, strict=True))}
    metadata |= {"base_model": bases[0]} if len(bases) == 1 else {}
    metadata |= {"expert": expert} if expert != AUTO else {}
    return MatchedLora(modules, (), source, offsets), metadata, lines


def _expert(files: Sequence[LoraFile]) -> str:
    """The one expert that LoRAs are for, or ``auto`` if none says one."""
    said = {expert: file.path.name for file in files if (expert := said_expert(file)) != AUTO}
    if len(said) > 1:
        (one, first), (other, second), *_ = said.items()
        raise WeightFileError(
            f"{first} is for the expert {one} and {second} for {other}; merge the LoRAs of each expert by themselves"
        )
    return next(iter(said), AUTO)


def _fit_each_other(parts: Sequence[tuple[LoraFile, MatchedLora, float]]) -> None:
    """Whether one network has all of their modules."""
    versions = {version: file for file, *_ in parts if (version := cogvideox_version(file.names))}
    if len(versions) > 1:
        (one, first), (other, second) = versions.items()
        raise WeightFileError(
            f"{first.path.name} was made for CogVideoX {one} and {second.path.name} for {other}: the names agree, but "
            "the networks do not; take LoRAs of one model"
        )
    seen: dict[str, tuple[LoraFile, tuple[int, ...]]] = {}
    for file, matched, _ in parts:
        for name, size in _sizes(matched):
            other, expected = seen.setdefault(name, (file, size))
            if size != expected:
                here, there = ("x".join(map(str, each)) for each in (expected, size))
                bases = [guess_base(each).base or "a model we do not know" for each in (other, file)]
                raise WeightFileError(
                    f"the LoRAs were made for different models, {bases[0]} and {bases[1]}: {name} is {here} in "
                    f"{other.path.name} and {there} in {file.path.name}; take LoRAs of one model"
                )


def _sizes(lora: MatchedLora) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Of everything it changes."""
    for name, module in lora.modules.items():
        yield name, module.shape
    for name, offset in lora.offsets.items():
        for part, value in (("weight", offset.weight), ("bias", offset.bias)):
            if value is not None:
                yield f"{name}.{part}", tuple(value.shape)


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


def resize(
    modules: Mapping[str, LoraModule], rank: int, tick: Callable[[str], None] = lambda _: None
) -> tuple[dict[str, LoraModule], float]:
    """The nearest LoRA of a lower rank, by singular value decomposition of every module's change.

    Args:
        modules: Matrices by module; one whose rank is lower already stays as it is.
        rank: The new rank, at least 1.
        tick: Called before every module.

    Returns:
        The matrices, and the kept energy: the share of the squared entries of all changes together, 0..1.

    Raises:
        ValueError: ``rank`` is below 1.
    """
    if rank < 1:
        raise ValueError(f"the rank must be at least 1, got {rank}")
    resized, kept, total = {}, 0.0, 0.0
    for name, module in modules.items():
        tick("reducing the rank")
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
