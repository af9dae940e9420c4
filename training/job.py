"""A run as a file: all that another process needs in order to make it.

A job is a folder with ``job.json`` and, for LoRAs and pictures that lie in memory, ``tensors.safetensors``. Models and
rewards are named by what loads them; who reads the job loads them again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import read_safetensors, write_safetensors, write_text
from ..lora.adapter import LoraUse
from ..lora.files import LoraFile, LoraModule, Offset
from .config import TrainConfig
from .examples import Example, Picture

JOB, TENSORS = "job.json", "tensors.safetensors"


@dataclass(frozen=True)
class ModelSource:
    """How to load a video model.

    Attributes:
        source: Its folder or name, or the single files of a Wan model by their roles.
        dtype: Number type, or ``auto``.
        search: Folders in which to look for a name.
        download: Fetch what is missing.
    """

    source: str | Mapping[str, str]
    dtype: str = "auto"
    search: tuple[str, ...] = ()
    download: bool = False


@dataclass(frozen=True)
class RewardSource:
    """How to load a reward.

    Attributes:
        text: As it is written on the command line.
        path: Folder or file of its files; empty looks in ``search``.
        search: Folders in which to look.
    """

    text: str
    path: str = ""
    search: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """What to train, on what, and where.

    Attributes:
        model: The base model.
        reward: What shall rise.
        examples: To train on.
        config: Settings.
        folder: Of the run.
        samples: To evaluate on; the first examples if there are none.
        heldout: Rewards that are not trained on.
        uses: LoRAs that stay applied.
        start: LoRAs whose weights a new run begins with.
        device: ``cpu`` or ``cuda``.
        cache: Folder for text embeddings.
    """

    model: ModelSource
    reward: RewardSource
    examples: Sequence[Example]
    config: TrainConfig
    folder: Path
    samples: Sequence[Example] = ()
    heldout: Sequence[RewardSource] = ()
    uses: Sequence[LoraUse] = ()
    start: Sequence[LoraUse] = ()
    device: str = "cpu"
    cache: Path | None = None

    def write(self, folder: Path) -> Path:
        """Write the job into a folder. Gives the path of ``job.json``."""
        tensors: dict[str, Tensor] = {}
        data = {
            "model": asdict(self.model),
            "reward": asdict(self.reward),
            "examples": [_of_example(example, tensors) for example in self.examples],
            "config": self.config.to_dict(),
            "folder": str(self.folder.resolve()),
            "samples": [_of_example(example, tensors) for example in self.samples],
            "heldout": [asdict(judge) for judge in self.heldout],
            "uses": [_of_use(use, f"lora {index}", tensors) for index, use in enumerate(self.uses)],
            "start": [_of_use(use, f"start {index}", tensors) for index, use in enumerate(self.start)],
            "device": self.device,
            "cache": None if self.cache is None else str(self.cache.resolve()),
        }
        if tensors:
            write_safetensors(folder / TENSORS, {name: value.detach().clone() for name, value in tensors.items()}, {})
        return write_text(folder / JOB, json.dumps(data))

    @classmethod
    def read(cls, path: Path) -> Job:
        """The job in a ``job.json``."""
        data = json.loads(path.read_text(encoding="utf-8"))
        beside = path.with_name(TENSORS)
        tensors = read_safetensors(beside)[0] if beside.exists() else {}
        pictures: dict[str, Picture] = {}  # examples may share one
        return cls(
            model=ModelSource(**data["model"] | {"search": tuple(data["model"]["search"])}),
            reward=_reward(data["reward"]),
            examples=[_example(one, tensors, pictures) for one in data["examples"]],
            config=TrainConfig.from_dict(data["config"]),
            folder=Path(data["folder"]),
            samples=[_example(one, tensors, pictures) for one in data["samples"]],
            heldout=[_reward(judge) for judge in data["heldout"]],
            uses=[_use(use, f"lora {index}", tensors) for index, use in enumerate(data["uses"])],
            start=[_use(use, f"start {index}", tensors) for index, use in enumerate(data["start"])],
            device=data["device"],
            cache=data["cache"] and Path(data["cache"]),
        )


def _reward(data: Mapping[str, Any]) -> RewardSource:
    return RewardSource(data["text"], data["path"], tuple(data["search"]))


def _of_example(example: Example, tensors: dict[str, Tensor]) -> dict[str, Any]:
    data: dict[str, Any] = {"prompt": example.prompt}
    for name, picture in example.pictures.items():
        if isinstance(picture.source, Tensor):
            key = f"picture {picture.digest}"
            tensors[key] = torch.stack(list(picture.frames()), dim=1)
            data[name] = {"frames": key}
        else:
            data[name] = {"file": str(picture.source.resolve())}
    return data


def _example(data: Mapping[str, Any], tensors: Mapping[str, Tensor], known: dict[str, Picture]) -> Example:
    pictures = {}
    for name, where in data.items():
        if name == "prompt":
            continue
        key = where.get("frames") or where["file"]
        if key not in known:
            known[key] = Picture(tensors[key].float() / 255 if "frames" in where else Path(key))
        pictures[name] = known[key]
    return Example(data["prompt"], **pictures)


def _of_use(use: LoraUse, key: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """A LoRA as it is in memory, for its file may have been replaced."""
    lora = use.lora
    for name, module in lora.modules.items():
        tensors |= {f"{key} down {name}": module.down, f"{key} up {name}": module.up}
    for name, offset in lora.offsets.items():
        parts = {f"{key} weight {name}": offset.weight, f"{key} bias {name}": offset.bias}
        tensors |= {part: value for part, value in parts.items() if value is not None}
    return {
        "path": str(lora.path),
        "alphas": {name: module.alpha for name, module in lora.modules.items()},
        "offsets": list(lora.offsets),
        "metadata": lora.metadata,
        "other_keys": lora.other_keys,
        "notes": lora.notes,
        "setting": asdict(replace(use, lora=None)),
    }


def _use(data: Mapping[str, Any], key: str, tensors: Mapping[str, Tensor]) -> LoraUse:
    modules = {
        name: LoraModule(tensors[f"{key} down {name}"], tensors[f"{key} up {name}"], alpha)
        for name, alpha in data["alphas"].items()
    }
    offsets = {
        name: Offset(tensors.get(f"{key} weight {name}"), tensors.get(f"{key} bias {name}")) for name in data["offsets"]
    }
    lora = LoraFile(Path(data["path"]), modules, data["metadata"], tuple(data["other_keys"]), offsets,
                    tuple(data["notes"]))  # fmt: skip
    return LoraUse(**data["setting"] | {"lora": lora})
