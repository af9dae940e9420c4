"""Checkpoints: one safetensors file with everything a run needs to go on, written whole or not at all."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import WeightFileError, canonical_json, read_safetensors, write_safetensors
from ..reward_models.protocol import Reward
from .config import TrainConfig

log = logging.getLogger(__name__)
PATTERN = "checkpoint-{:06d}.safetensors"


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        step: Steps made, skipped ones included.
        skipped: Steps skipped in all.
        skipped_in_a_row: Steps skipped since the last good one.
        memory: The memory plan in force, which a step that ran out of memory may have made smaller; empty at first.
        guards: The state of the guards, see :class:`.guards.Guards`.
        processes: How many made the last step together.
    """

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    memory: str = ""
    guards: dict[str, Any] = field(default_factory=dict)
    processes: int = 1


@dataclass(frozen=True)
class RunIdentity:
    """What must not change when a run is resumed.

    Attributes:
        model: Name of the base model.
        reward: Name of the reward.
        prompts: Hash of the prompts.
        config: The settings of the run.
    """

    model: str
    reward: str
    prompts: str
    config: TrainConfig

    def differences(self, saved: dict) -> list[str]:
        """``name: saved -> now`` for every decisive difference to a saved identity.

        A setting that is newer than the checkpoint was at its default, which changes nothing.
        """
        now = _flat(self.decisive())
        before = _flat(json.loads(canonical_json(TrainConfig().decisive()))) | _flat(saved)
        return [f"{k}: {before.get(k)} -> {now.get(k)}" for k in sorted({*now, *before}) if before.get(k) != now.get(k)]

    def decisive(self) -> dict:
        data = {"model": self.model, "reward": self.reward, "prompts": self.prompts, **self.config.decisive()}
        return json.loads(canonical_json(data))


def _flat(data: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in data.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def save_checkpoint(
    folder: Path,
    progress: Progress,
    identity: RunIdentity,
    parameters: dict[str, nn.Parameter],
    average: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    reward: Reward,
    begun: dict[str, Tensor],
) -> Path:
    """Write ``checkpoint-<step>.safetensors`` and delete older ones beyond ``keep_checkpoints``."""
    tensors = {f"average.{key}": value.cpu() for key, value in average.items()}
    for key, parameter in parameters.items():
        tensors[f"lora.{key}"] = parameter.detach().cpu()
        for name, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = value.detach().cpu()
    if hasattr(reward, "state"):  # of a mixture: what its terms are normalised by
        tensors |= {f"reward.{name}": value for name, value in reward.state().items()}
    tensors |= {f"begun.{batch}": latents for batch, latents in begun.items()}
    metadata = {"progress": canonical_json(asdict(progress)), "identity": canonical_json(identity.decisive())}
    path = write_safetensors(folder / PATTERN.format(progress.step), tensors, metadata)
    for old in list_checkpoints(folder)[: -identity.config.keep_checkpoints]:
        old.unlink(missing_ok=True)
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run folder, oldest first."""
    return sorted(folder.glob(PATTERN.replace("{:06d}", "*")))


def load_latest(
    folder: Path,
    identity: RunIdentity,
    parameters: dict[str, nn.Parameter],
    average: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    reward: Reward,
    begun: dict[str, Tensor],
) -> Progress | None:
    """Restore the newest readable checkpoint of a folder in place. Without one, the reward's state begins anew.

    Args:
        folder: Of the run.
        identity: Of the run.
        parameters: Of the LoRAs, by name.
        average: Their moving average, by name.
        optimizer: Of the parameters.
        reward: May have a state, as a mixture has.
        begun: Latents of batches that are not used up, see :attr:`.config.TrainConfig.reuse`.

    Returns:
        Where the run stands, or None if there is no checkpoint.

    Raises:
        ValueError: The checkpoint belongs to a run with other settings; they are named. Or another version wrote it.
    """
    begun.clear()
    stateful = hasattr(reward, "load_state")
    if stateful:
        reward.load_state({})
    for path in reversed(list_checkpoints(folder)):
        try:
            tensors, saved, progress = _read(path)
        except WeightFileError as error:
            log.warning("%s; trying the one before", str(error).partition("; ")[0])  # nobody can download it again
            continue
        different = identity.differences(saved)
        if different:
            raise ValueError(
                f"{folder} holds a run with other settings ({'; '.join(different[:4])}): "
                "choose another folder, restore the settings, or start afresh"
            )
        unknown = sorted(set(progress) - {f.name for f in fields(Progress)})
        if unknown:
            raise ValueError(f"{path} was written by another version of Reward LoRA ({unknown[0]} is unknown to this "
                             "one): update, or choose another folder")  # fmt: skip
        places = {f"lora.{key}": value for key, value in parameters.items()}
        places |= {f"average.{key}": value for key, value in average.items()}
        if any(name not in tensors or tensors[name].shape != place.shape for name, place in places.items()):
            log.warning("%s lacks a tensor; trying the one before", path)
            continue
        with torch.no_grad():
            for key, parameter in parameters.items():
                parameter.copy_(tensors.pop(f"lora.{key}"))
            for key, value in average.items():
                value.copy_(tensors.pop(f"average.{key}"))
        for key, parameter in parameters.items():
            if state := _under(f"optimizer.{key}.", tensors):
                optimizer.state[parameter] = {
                    name: value.clone() if name == "step" else value.to(parameter.device, copy=True)
                    for name, value in state.items()
                }
        if stateful:
            reward.load_state(_under("reward.", tensors))
        begun.update(_under("begun.", tensors))
        return Progress(**progress)
    return None


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Tensors, identity and progress of a checkpoint; :class:`WeightFileError` if it is damaged."""
    tensors, metadata = read_safetensors(path)
    try:
        saved, progress = (json.loads(metadata[name]) for name in ("identity", "progress"))
        sound = isinstance(saved, dict) and all(
            type(value) is type(progress.get(name, value)) for name, value in asdict(Progress()).items()
        )
    except (KeyError, ValueError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise WeightFileError(f"{path} has a damaged header")
    return tensors, saved, progress


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin so, by what follows."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
