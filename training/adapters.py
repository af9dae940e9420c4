"""The LoRAs of a run: put into the networks that are trained, left out for a moment, written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from ..files import canonical_json
from ..lora.adapter import Adapter, LoraUse, inject_new
from ..lora.match import fit
from ..lora.write import write_lora
from ..video_models.protocol import VideoModel
from .config import TrainConfig
from .seeds import seed_for
from .start import begin_from


def injected(
    model: VideoModel, config: TrainConfig, start: Sequence[LoraUse], device: torch.device, undo: ExitStack
) -> dict[str, Adapter]:
    """A LoRA in every network to be trained, fresh or with the weights of ``start``; ``undo`` takes them out again."""
    adapters = {}
    for expert in config.experts:
        adapter = inject_new(
            model.denoisers[expert], config.lora_targets, config.rank, config.network_alpha,
            seed_for("lora", config.seed),
        )  # fmt: skip
        undo.callback(adapter.remove)
        for parameter in adapter.parameters().values():  # an expert that waits on the CPU learns on the device
            parameter.data = parameter.data.to(device)
        adapters[expert] = adapter
    for use in start:
        for expert in set(use.experts(model)) & adapters.keys():
            begin_from(adapters[expert], fit(use.lora, model, expert))
    return adapters


def at_strength(adapters: Iterable[Adapter], strength: float) -> AbstractContextManager:
    """A context in which the LoRAs have that strength."""
    stack = ExitStack()
    for adapter in adapters:
        stack.enter_context(adapter.at_strength(strength))
    return stack


def without(adapters: Iterable[Adapter]) -> AbstractContextManager:
    """A context in which the networks are the base model's."""
    return at_strength(adapters, 0.0)


def write(
    path: Path,
    model: VideoModel,
    expert: str,
    adapter: Adapter,
    config: TrainConfig,
    about: Mapping[str, str],
    strength: float = 1.0,
) -> None:
    """Write the LoRA of one network, with ``about`` and what made it in the file's metadata.

    What the file gives at strength 1 is what the adapter gives at ``strength``.
    """
    modules = {name: replace(module, alpha=module.alpha * strength) for name, module in adapter.weights().items()}
    metadata = {
        "base_model": model.spec.name,
        "rank": str(config.rank),
        "network_alpha": f"{config.network_alpha * strength:g}",
        **({"strength": f"{strength:g}"} if strength != 1 else {}),
        "config": canonical_json(config.decisive()),
        "config_hash": config.fingerprint(),
        "ss_base_model_version": model.spec.family,
        **({"expert": expert} if len(model.spec.experts) > 1 else {}),
        **about,
    }
    write_lora(path, modules, model.lora_names(expert), metadata, getattr(torch, config.save_dtype))
