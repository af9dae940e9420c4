"""The LoRAs that a run has left in its folder: the last one, the best, and one in every checkpoint."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

from ..files import WeightFileError, read_safetensors
from ..lora.files import LoraModule
from .checkpoint import list_checkpoints

BEST = "_best"


def is_run(folder: Path) -> bool:
    """Whether a run has begun in a folder."""
    return (folder / "log.jsonl").is_file() and (folder / "config.json").is_file()


def saved_loras(folder: Path, best: bool = False) -> list[Path]:
    """The last LoRA of a run, or that of its best evaluation; of a model with several networks one each."""
    files = sorted(folder.glob(f"{folder.name}*.safetensors"))
    return [file for file in files if file.stem.endswith(BEST) == best]


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps at which the run has a checkpoint, ascending."""
    return [int(path.stem.rpartition("-")[2]) for path in list_checkpoints(folder)]


def checkpoint_loras(path: Path) -> tuple[dict[str, dict[str, LoraModule]], dict[str, str]]:
    """The LoRAs in a checkpoint, by network and module, and what a LoRA's file would say of them.

    With a moving average that is what evaluations and files have, so it is given.

    Raises:
        WeightFileError: Not readable, or no checkpoint.
    """
    tensors, metadata = read_safetensors(path)
    try:
        step, identity = json.loads(metadata["progress"])["step"], json.loads(metadata["identity"])
        kind = "average" if identity["ema"] else "lora"
        parts: dict[str, dict[str, dict]] = defaultdict(lambda: defaultdict(dict))
        for key, tensor in tensors.items():
            group, _, rest = key.partition(".")
            if group == kind:
                expert, _, named = rest.partition(".")
                module, _, part = named.rpartition(".")
                parts[expert][module][part] = tensor
        alpha = float(identity["network_alpha"])
        loras = {
            expert: {name: LoraModule(pair["down"], pair["up"], alpha) for name, pair in modules.items()}
            for expert, modules in parts.items()
        }
        about = {"base_model": identity["model"], "reward": identity["reward"], "rank": str(identity["rank"])}
    except (KeyError, ValueError):
        raise WeightFileError(f"{path.name} is no checkpoint of a training; choose another") from None
    return loras, about | {"network_alpha": f"{alpha:g}", "step": str(step)}
