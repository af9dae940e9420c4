"""Loading a model: seconds and peak memory by layout, against diffusers' ``from_pretrained`` where it reads the folder.

    python -m reward_lora.benchmarks.loading [--quick] [--json FILE] [--gigabytes 1]

Checkpoints are random, in float32, with a transformer of about a gigabyte, the rest tiny and the text encoder left out;
they are loaded in bfloat16, the transformer and the VAE. Each load runs in a process of its own that has imported the
networks' classes before; its peak of resident memory counts, pages mapped from the file included. The loads take turns,
and the files are in the system's cache. Needs the repository: tiny versions of these checkpoints are what the tests
load.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from .common import Resident, Result, Table, command, fresh, ratio, spread

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Layout:
    """A checkpoint to write.

    Attributes:
        family: Its module in ``tests/families``.
        layout: As that calls it.
        sizes: Name of its table of sizes, and those of a large transformer.
        layers: Key of the number of layers among them.
        parameters: Of a layer, in millions.
        classes: Of transformer and VAE, in diffusers.
        pipeline: Whether diffusers reads the folder.
    """

    family: str
    layout: str
    sizes: tuple[str, Mapping[str, Any]]
    layers: str
    parameters: float
    classes: tuple[str, str]
    pipeline: bool = False

    def write(self, folder: Path, gigabytes: float) -> None:
        module = import_module(f"reward_lora.tests.families.{self.family}")
        name, sizes = self.sizes
        sizes = {**sizes, self.layers: max(1, round(gigabytes * 1e9 / 4 / (self.parameters * 1e6)))}
        folder.mkdir()
        with patch.object(module, name, getattr(module, name) | sizes):
            module.write(folder, self.layout)


WAN = {"dim": 2048, "ffn_dim": 8192, "freq_dim": 256, "num_heads": 16}
EASYANIMATE = {"inner": 2048, "head": 64, "time": 512}
COGVIDEOX = {"heads": 32, "head": 64, "time": 512}
CLASSES_WAN = ("WanTransformer3DModel", "AutoencoderKLWan")
CLASSES_EASYANIMATE = ("EasyAnimateTransformer3DModel", "AutoencoderKLMagvit")
CLASSES_COGVIDEOX = ("CogVideoXTransformer3DModel", "AutoencoderKLCogVideoX")
LAYOUTS = {
    "Wan2.1, the publisher's": Layout("wan", "2.1 original t2v", ("TINY", WAN), "num_layers", 67, CLASSES_WAN),
    "Wan2.1, single files in 16 bits": Layout(
        "wan", "2.1 files i2v", ("TINY_SINGLE", WAN), "num_layers", 76, CLASSES_WAN
    ),
    "EasyAnimate V5.1": Layout(
        "easyanimate", "original v5.1 inp", ("TINY", EASYANIMATE), "layers", 63, CLASSES_EASYANIMATE
    ),
    "CogVideoX-Fun": Layout(
        "cogvideox", "fun 5b inp, sharded", ("TINY", COGVIDEOX), "layers", 63, CLASSES_COGVIDEOX, pipeline=True
    ),
}


def ours(layout: Layout, folder: str) -> dict[str, float]:
    """Loaded by the pack."""
    from ..video_models import load_video_model

    module = import_module(f"reward_lora.tests.families.{layout.family}")
    source = getattr(module, "open_files", lambda where: where)(Path(folder))

    def load() -> tuple[nn.Module, nn.Module]:
        model = load_video_model(source, dtype="bfloat16", text=False)
        return model.denoisers["transformer"], model.vae

    return _watched(layout, load)


def theirs(layout: Layout, folder: str) -> dict[str, float]:
    """Loaded by diffusers."""
    import diffusers

    places = zip(layout.classes, ("transformer", "vae"), strict=True)
    parts = [(getattr(diffusers, name).from_pretrained, Path(folder) / place) for name, place in places]
    return _watched(layout, lambda: tuple(made(place, torch_dtype=DTYPE) for made, place in parts))


def _watched(layout: Layout, load: Callable[[], tuple[nn.Module, nn.Module]]) -> dict[str, float]:
    import diffusers

    for name in layout.classes:
        getattr(diffusers, name)  # imports it
    with Resident() as resident:
        started = time.perf_counter()
        networks = load()
        seconds = time.perf_counter() - started
    weights = sum(parameter.nbytes for network in networks for parameter in network.parameters())
    return {"seconds": seconds, "bytes": resident.bytes, "weights": weights}


def measure(options: argparse.Namespace) -> Result:
    gigabytes, rounds = (0.02, 1) if options.quick else (options.gigabytes, options.rounds)
    rows, said, figures = [], [], []
    for name, layout in LAYOUTS.items():
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "model"
            layout.write(folder, gigabytes)
            ways = {"ours": ours, **({"diffusers": theirs} if layout.pipeline else {})}
            found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
            for _ in range(rounds):
                for way, call in ways.items():
                    found[way].append(fresh(call, layout, str(folder)))
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        for way, runs in found.items():
            seconds = [run["seconds"] for run in runs]
            shares = [run["bytes"] / run["weights"] for run in runs]
            rows.append([name, f"{size / 1e9:.2f}", way, spread(seconds), spread(shares)])
            figures.append({"layout": name, "way": way, "file bytes": size, "runs": runs})
        if len(found) > 1:
            mine, other = ([run["seconds"] for run in found[way]] for way in ("ours", "diffusers"))
            heap, else_ = ([run["bytes"] for run in found[way]] for way in ("ours", "diffusers"))
            said.append(f"{name}, ours to diffusers: time {ratio(mine, other)}, peak {ratio(heap, else_)}.")
    columns = ("layout", "files, GB", "loaded by", "seconds", "peak / weights in memory")
    about = "Random checkpoints in float32 (single files: float16), loaded in bfloat16, with the VAE, cpu"
    return Result(about, [Table(columns, rows)], said, {"loads": figures})


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of the transformer's file")
    parser.add_argument("--rounds", type=int, default=3)


if __name__ == "__main__":
    sys.exit(command("loading", __doc__, measure, options))
