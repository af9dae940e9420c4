"""The widgets of the training node, made from :class:`..training.config.TrainConfig` and its documentation."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, get_args

from comfy_api.latest import io

from ..training.config import SaveType, Schedule, TrainConfig
from ..training.schedule import BackpropSchedule, Strategy

WIDGETS: dict[str, tuple] = {
    "steps": (1, 100_000, 1),
    "learning_rate": (1e-7, 1.0, 1e-7),
    "lr_schedule": get_args(Schedule),
    "batch_size": (1, 64, 1),
    "accumulation": (1, 1024, 1),
    "rank": (1, 512, 1),
    "network_alpha": (0.1, 1024.0, 0.1),
    "width": (0, 4096, 8),
    "height": (0, 4096, 8),
    "frames": (0, 1024, 1),
    "sampler_steps": (0, 1000, 1),
    "guidance_scale": (0.0, 30.0, 0.1),
    "backprop.strategy": tuple(s for s in get_args(Strategy) if s != "list"),
    "backprop.num_steps": (1, 1000, 1),
    "backprop.coupling": (0.0, 1.0, 0.05),
    "judged_latents": (0, 256, 1),
    "seed": (0, 2**64 - 1, 1),
    "save_every": (1, 100_000, 1),
    "sample_every": (0, 100_000, 1),
    "sample_count": (1, 64, 1),
    "save_dtype": get_args(SaveType),
}
"""Which settings are widgets: (min, max, step), or the choices. All others can be given as ``advanced``."""

NESTED = {"backprop": BackpropSchedule}


def attribute_docs(cls: type) -> dict[str, str]:
    """The ``Attributes:`` section of a Google-style docstring, by name."""
    section = re.search(r"Attributes:\n(.*?)(?:\n\s*\n|\Z)", cls.__doc__ or "", re.DOTALL)
    entries = re.findall(r"^ {8}(\w+): (.*(?:\n {12,}.*)*)", section[1] if section else "", re.MULTILINE)
    return {name: " ".join(text.replace("``", "'").split()) for name, text in entries}


def widget_id(setting: str) -> str:
    return setting.replace(".", "_")


def inputs() -> list[io.Input]:
    """One widget a setting, with its default and its documentation."""
    docs = {name: attribute_docs(cls) for name, cls in {"": TrainConfig, **NESTED}.items()}
    made = []
    for setting, limits in WIDGETS.items():
        group, _, name = setting.rpartition(".")
        owner = NESTED.get(group, TrainConfig)
        default = next(f.default for f in dataclasses.fields(owner) if f.name == name)
        about = {"default": default, "tooltip": docs[group].get(name, "")}
        if isinstance(default, str):
            made.append(io.Combo.Input(widget_id(setting), options=list(limits), **about))
            continue
        kind = io.Float if isinstance(default, float) else io.Int
        # A seed that changed after every run would keep a cancelled run from going on.
        extra = {"control_after_generate": False} if setting == "seed" else {}
        low, high, step = limits
        made.append(kind.Input(widget_id(setting), min=low, max=high, step=step, **about, **extra))
    return made


def config_from(widgets: Mapping[str, Any], advanced: str) -> TrainConfig:
    """Settings of the widgets, overruled by ``advanced``, a YAML mapping of any setting's name.

    Raises:
        ValueError: A value out of range, or text that is no such mapping.
    """
    data: dict[str, Any] = {}
    for setting in WIDGETS:
        if widget_id(setting) in widgets:
            _merge(data, _nest(setting, widgets[widget_id(setting)]))
    try:
        _merge(data, parse_advanced(advanced))
        return TrainConfig.from_dict(data)
    except TypeError as error:  # a text where a number belongs
        raise ValueError(f"a setting under advanced has the wrong type ({error})") from None


def parse_advanced(text: str) -> dict[str, Any]:
    """The YAML mapping of the advanced field; nothing gives an empty one."""
    import yaml

    try:
        given = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"advanced is not valid YAML: {' '.join(str(error).split())}") from None
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise ValueError(f"advanced must hold lines such as 'weight_decay: 0.01', got {text.strip()[:60]!r}")
    return given


def _nest(setting: str, value: Any) -> dict[str, Any]:
    group, _, name = setting.rpartition(".")
    return {group: {name: value}} if group else {name: value}


def _merge(into: dict[str, Any], new: Mapping[str, Any]) -> None:
    for key, value in new.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value
