"""LoRA files from the command line: what is in them, other spellings, several as one, and the published ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tyro.conf import Positional

from ..lora.adapter import AUTO
from ..lora.catalog import CATALOG, download, find
from ..lora.files import MatchedLora, read_lora, write_lora
from ..lora.guess import guess_base
from ..lora.match import fit
from ..lora.merge import merge_files
from ..lora.write import Layout, rounding
from .lora_names import resolve
from .shared import filling, open_model, parse_lora

StoredType = Literal["as it is", "float32", "bfloat16", "float16"]


@dataclass
class Inspect:
    """Say what is in a LoRA file and, given a model, whether it fits.

    Attributes:
        file: The LoRA.
        model: A folder with a video model, or `builtin`; nothing skips the comparison.
    """

    file: Positional[Path]
    model: str = ""

    def run(self) -> int:
        lora = read_lora(self.file)
        guess, largest = guess_base(lora), max((m.up.shape[0] for m in lora.modules.values()), default=0)
        print(f"format: {lora.format}\nbase model: {guess.base or 'unknown'} ({guess.reason})")
        print(f"modules: {len(lora.modules)}, the widest {largest}, such as {lora.names[0]}")
        if lora.path.stem in CATALOG:
            print(f"published as: {CATALOG[lora.path.stem].summary()}")
        if lora.modules:
            every = lora.modules.values()
            print(f"ranks: {_listed(lora.ranks)}\nalphas: {_listed(m.alpha for m in every)}")
            print(f"alpha / rank: {_listed(m.scale for m in every)}\nstored as: {_listed(m.up.dtype for m in every)}")
        if lora.offsets:
            print(f"plain additions to weights and biases: {len(lora.offsets)}, such as {next(iter(lora.offsets))}")
        for note in lora.notes:
            print(f"note: {note}")
        for key, value in sorted(lora.metadata.items()):
            print(f"{key}: {value}")
        if self.model:
            model = open_model(self.model, text=False)
            for expert in model.denoisers:
                matched = fit(lora, model, expert)
                print(f"{expert} of {model.spec.name}: {matched.report()}")
                if matched.unmatched:
                    print(f"unmatched: {_listed(matched.unmatched)}")
        return 0


@dataclass
class Convert:
    """Write a LoRA in another spelling; the change it makes to the weights stays the same.

    Attributes:
        file: The LoRA, of any trainer.
        output: The file to write.
        to: `dotted` (ComfyUI and diffusers read it), `diffusers`, or `videox-fun`.
        model: Folder of the base model, or `builtin`; without it the names come from the LoRA's kind.
        dtype: Number type of the matrices.
        alpha: Network alpha to assume where the file holds none; 0 takes what its trainer uses.
    """

    file: Positional[Path]
    output: Positional[Path]
    to: Layout = "dotted"
    model: str = ""
    dtype: StoredType = "as it is"
    alpha: float = 0.0

    def run(self) -> int:
        lora = read_lora(self.file, self.alpha or None).in_memory()  # the output may be the same file
        (matched,), names = resolve([lora], self.model)
        if matched.unmatched:
            print(f"left out, for the base model does not have them: {_listed(matched.unmatched)}")
        print(_write(self.output, matched, names, lora.metadata, self.to, self.dtype))
        return 0


@dataclass
class Merge:
    """Make one LoRA of several, and reduce its rank if asked.

    Without a new rank nothing is approximated: the rank is the sum of the ranks.

    Attributes:
        files: The LoRAs, each PATH or PATH:WEIGHT; the weight is the strength it is to have, 1 if not given.
        output: The file to write.
        rank: New rank; 0 keeps the sum. One file alone is resized.
        to: `dotted` (ComfyUI and diffusers read it), `diffusers`, or `videox-fun`.
        model: Folder of the base model, or `builtin`; without it the names come from the first LoRA's kind.
        dtype: Number type of the matrices.
    """

    files: Positional[tuple[str, ...]]
    output: Path
    rank: int = 0
    to: Layout = "dotted"
    model: str = ""
    dtype: StoredType = "float32"

    def run(self) -> int:
        if not self.files:
            raise ValueError("give at least one LoRA, PATH or PATH:WEIGHT")
        uses = [parse_lora(text) for text in self.files]
        if any((use.expert, use.start, use.end) != (AUTO, 0, 1) for use in uses):
            raise ValueError("a merged LoRA acts as one; say where with @ when it is used, not when it is merged")
        loras = [use.lora.in_memory() for use in uses]  # the output may be one of the files
        matched, names = resolve(loras, self.model)
        parts = [(lora, found, use.strength) for lora, found, use in zip(loras, matched, uses, strict=True)]
        result, metadata, lines = merge_files(parts, self.rank, self.output.name)
        print(*lines, sep="\n", end="\n" * bool(lines))
        print(_write(self.output, result, names, metadata, self.to, self.dtype))
        return 0


@dataclass
class Catalog:
    """List the published reward LoRAs, or fetch one: `catalog fetch NAME`.

    Attributes:
        action: Nothing lists them; `fetch` downloads NAME, with resume and checksum. HF_ENDPOINT may name a mirror.
        name: Of the LoRA to fetch.
        folder: Where it goes.
    """

    action: Positional[Literal["list", "fetch"]] = "list"
    name: Positional[str] = ""
    folder: Path = Path("models/loras")

    def run(self) -> int:
        if self.action == "list":
            for entry in CATALOG.values():
                print(f"{entry.name}\n  {entry.summary()}\n  {entry.address}")
            return 0
        from tqdm import tqdm

        entry = find(self.name)
        with tqdm(unit="B", unit_scale=True, desc=entry.file) as bar:
            path = download(entry, self.folder, filling(bar))
        print(f"{path}\n{entry.summary()}")
        return 0


def _listed(values: Iterable) -> str:
    """Different values, at most five of them."""
    different = sorted({f"{v:g}" if isinstance(v, float) else str(v).removeprefix("torch.") for v in values})
    return ", ".join(different[:5]) + f" and {len(different) - 5} more" * (len(different) > 5)


def _write(
    path: Path, lora: MatchedLora, names: dict[str, str], metadata: dict[str, str], layout: Layout, dtype: StoredType
) -> str:
    """Write the file and say in a line what is in it."""
    stored = None if dtype == "as it is" else getattr(torch, dtype)
    # Hashes of the old content, and an alpha that is folded now.
    metadata = {k: v for k, v in metadata.items() if not k.startswith("sshs_") and k != "lora_adapter_metadata"}
    write_lora(path, lora.modules, names, metadata, stored, layout=layout, offsets=lora.offsets)
    error = rounding(lora.modules, layout, stored)
    exact = "without any rounding" if not error else f"rounded by at most {error:.1e} of the largest entry of a matrix"
    return f"{path}: {lora.count} modules as {layout}, {exact}"
