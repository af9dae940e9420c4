"""The widgets of training, made from :class:`..training.config.TrainConfig` and its documentation.

Train Reward LoRA has those of :data:`TRAIN`; the others belong to the settings nodes that connect to it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

from comfy_api.latest import io

from ..training.config import Objective, TrainConfig
from ..training.schedule import BackpropSchedule

UNSET = -1
"""What a number shows that is left to the guards' preset."""
LEFT, ON, OFF = "preset", "on", "off"


@dataclass(frozen=True)
class Number:
    """An Int or a Float, by the setting's type."""

    low: float
    high: float
    step: float
    slider: bool = False

    def input(self, name: str, default: Any, about: dict[str, Any], kind: Any) -> io.Input:
        number = io.Float if float in (kind, *get_args(kind)) else io.Int
        high = "2^64 - 1" if self.high == 2**64 - 1 else f"{self.high:g}"
        about["tooltip"] = f"{about['tooltip'].rstrip('.')} ({self.low:g} to {high})."
        low = self.low
        if default is None:
            default, low = UNSET, UNSET
            about["tooltip"] += " -1 is the preset's."
        if self.slider:
            about["display_mode"] = io.NumberDisplay.slider
        if name == "seed":  # one that changed after every run would keep a cancelled run from going on
            about["control_after_generate"] = False
        return number.Input(name, default=number.Type(default), min=low, max=self.high, step=self.step, **about)

    def value(self, given: Any, default: Any) -> Any:
        return None if default is None and given < 0 else given


@dataclass(frozen=True)
class Choice:
    """One of the words that the setting's type lists."""

    without: tuple[str, ...] = ()

    def input(self, name: str, default: Any, about: dict[str, Any], kind: Any) -> io.Input:
        options = [word for word in get_args(kind) if word not in self.without]
        return io.Combo.Input(name, options=options, default=default, **about)

    def value(self, given: Any, default: Any) -> Any:
        return given


@dataclass(frozen=True)
class Switch:
    """On or off; or the preset's, where that is the default."""

    def input(self, name: str, default: Any, about: dict[str, Any], kind: Any) -> io.Input:
        if default is None:
            return io.Combo.Input(name, options=[LEFT, ON, OFF], default=LEFT, **about)
        return io.Boolean.Input(name, default=default, **about)

    def value(self, given: Any, default: Any) -> Any:
        return {LEFT: None, ON: True, OFF: False}.get(given, given) if default is None else given


@dataclass(frozen=True)
class Text:
    """A line of text, or what ``parse`` makes of it; empty is the setting's default.

    Raises:
        ValueError: In ``value``: text that cannot be parsed.
    """

    parse: Callable[[str], Any] = str
    wanted: str = ""
    multiline: bool = False

    def input(self, name: str, default: Any, about: dict[str, Any], kind: Any) -> io.Input:
        shown = ", ".join(f"{part:g}" for part in default) if isinstance(default, tuple) else default or ""
        return io.String.Input(name, default=shown, placeholder=self.wanted, multiline=self.multiline, **about)

    def value(self, given: str, default: Any) -> Any:
        try:
            return self.parse(given.strip()) if given.strip() else default
        except ValueError:
            raise ValueError(f"it must be {self.wanted}, got {given.strip()!r}") from None


Widget = Number | Choice | Switch | Text


def numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in re.split(r"[,;\s]+", text) if part)


def whole_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.split(r"[,;\s]+", text) if part)


def names(text: str) -> tuple[str, ...]:
    return tuple(part for part in re.split(r"[,;\s]+", text) if part)


TRAIN: dict[str, Widget] = {
    "steps": Number(1, 100_000, 1),
    "learning_rate": Number(1e-7, 1.0, 1e-7),
    "lr_schedule": Choice(),
    "batch_size": Number(1, 64, 1),
    "accumulation": Number(1, 1024, 1),
    "rank": Number(1, 512, 1),
    "network_alpha": Number(0.1, 1024.0, 0.1),
    "width": Number(0, 4096, 8),
    "height": Number(0, 4096, 8),
    "frames": Number(0, 1024, 1),
    "sampler_steps": Number(0, 1000, 1),
    "guidance_scale": Number(0.0, 30.0, 0.1, slider=True),
    "backprop.strategy": Choice(without=("list",)),
    "backprop.num_steps": Number(1, 1000, 1),
    "backprop.coupling": Number(0.0, 1.0, 0.05, slider=True),
    "judged_latents": Number(0, 256, 1),
    "seed": Number(0, 2**64 - 1, 1),
    "save_every": Number(1, 100_000, 1),
    "sample_every": Number(0, 100_000, 1),
    "sample_count": Number(1, 64, 1),
    "save_dtype": Choice(),
}
"""Settings with a widget on Train Reward LoRA, in the order of saved workflows."""

TRAIN_LAST: dict[str, Widget] = {"guards": Choice()}
"""Those that came later, behind its other inputs."""

SCHEDULE: dict[str, Widget] = {
    "backprop.strategy": Choice(),
    "backprop.num_steps": Number(1, 1000, 1),
    "backprop.coupling": Number(0.0, 1.0, 0.05, slider=True),
    "backprop.step_list": Text(whole_numbers, "step numbers such as 0, 4, 9"),
    "backprop.start": Number(0, 999, 1),
    "backprop.end": Number(-1, 999, 1),
    "backprop.judge": Choice(),
    "backprop.branch": Choice(),
}

SAMPLING: dict[str, Widget] = {
    "negative_prompt": Text(multiline=True),
    "guidance_interval": Text(numbers, "two noise levels such as 0.1, 0.9"),
    "reuse": Number(1, 64, 1),
}

JUDGE: dict[str, Widget] = {
    "judged_latents": Number(0, 256, 1),
    "judged_from": Choice(),
    "judged_frames": Number(0, 1024, 1),
    "judged_choice": Choice(),
    "judged_weights": Text(numbers, "weights such as 1, 0.5, 0.25"),
    "objective.target": Text(float, "a number; empty maximises"),
    "objective.hinge": Switch(),
    "objective.loss_scale": Number(0.0001, 10_000.0, 0.0001),
}

GUARDS: dict[str, Widget] = {
    "guards": Choice(),
    "keep_best": Switch(),
    "patience": Number(0, 1000, 1),
    "motion_floor": Number(0.0, 1.0, 0.05),
    "sweep": Switch(),
    "motion_guard": Number(0.0, 1000.0, 0.1),
    "augment": Number(0, 64, 1),
    "anchor": Number(0.0, 1000.0, 0.001),
    "anchor_target": Number(0.0, 1000.0, 0.001),
    "anchor_by_sigma": Switch(),
}

MEMORY: dict[str, Widget] = {"memory": Choice(), "float8": Switch(), "shard": Switch(), "compile": Switch()}

OPTIMIZER: dict[str, Widget] = {
    "warmup_steps": Number(0, 100_000, 1),
    "weight_decay": Number(0.0, 1.0, 0.001),
    "beta1": Number(0.0, 0.9999, 0.001),
    "beta2": Number(0.0, 0.9999, 0.001),
    "epsilon": Number(1e-12, 1.0, 1e-12),
    "max_grad_norm": Number(0.001, 1000.0, 0.001),
    "ema": Number(0.0, 0.9999, 0.001),
    "lora_targets": Text(names, "module names such as to_q, to_v, or all-linear"),
    "experts": Text(names, "networks such as high, low"),
    "keep_checkpoints": Number(1, 1000, 1),
    "max_skipped": Number(1, 1000, 1),
    "trackers": Text(names, "tensorboard, wandb"),
}

NESTED = {"backprop": BackpropSchedule, "objective": Objective}


@dataclass(frozen=True)
class Settings:
    """Some settings of a training, from a node of their own.

    Attributes:
        data: Nested as :meth:`TrainConfig.from_dict` takes it.
    """

    data: Mapping[str, Any]


def attribute_docs(cls: type) -> dict[str, str]:
    """The ``Attributes:`` section of a Google-style docstring, by name."""
    section = re.search(r"Attributes:\n(.*?)(?:\n\s*\n|\Z)", cls.__doc__ or "", re.DOTALL)
    entries = re.findall(r"^ {8}(\w+): (.*(?:\n {12,}.*)*)", section[1] if section else "", re.MULTILINE)
    return {name: " ".join(text.replace("``", "'").split()) for name, text in entries}


def widget_id(setting: str) -> str:
    """On Train Reward LoRA; a settings node leaves the group's name out."""
    return setting.replace(".", "_")


def short_id(setting: str) -> str:
    return setting.rpartition(".")[2]


def inputs(
    widgets: Mapping[str, Widget], name_of: Callable[[str], str] = widget_id, *, optional: bool = False
) -> list[io.Input]:
    """One widget a setting, with its default and its documentation."""
    docs = {name: attribute_docs(cls) for name, cls in {"": TrainConfig, **NESTED}.items()}
    made = []
    for setting, widget in widgets.items():
        default, kind = _field(setting)
        group, _, name = setting.rpartition(".")
        about = {"tooltip": docs[group].get(name, ""), **({"optional": True} if optional else {})}
        made.append(widget.input(name_of(setting), default, about, kind))
    return made


def given(
    widgets: Mapping[str, Widget], values: Mapping[str, Any], name_of: Callable[[str], str] = widget_id
) -> dict[str, Any]:
    """What widgets say, nested as :meth:`TrainConfig.from_dict` takes it. Raises ``ValueError``: text without sense."""
    data: dict[str, Any] = {}
    for setting, widget in widgets.items():
        if (name := name_of(setting)) in values:
            try:
                value = widget.value(values[name], _field(setting)[0])
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            _merge(data, _nest(setting, value))
    return data


def config_from(widgets: Mapping[str, Any], advanced: str, settings: Iterable[Settings | None] = ()) -> TrainConfig:
    """Settings of Train's widgets, overruled by settings nodes, overruled by ``advanced``, a YAML mapping.

    Raises:
        ValueError: A value out of range, or text that is no such mapping.
    """
    data = given(TRAIN | TRAIN_LAST, widgets)
    for node in settings:
        _merge(data, node.data if node else {})
    try:
        _merge(data, parse_advanced(advanced))
        return TrainConfig.from_dict(data)
    except TypeError as error:  # a text where a number belongs
        raise ValueError(f"a setting under advanced has the wrong type ({error})") from None


def parse_advanced(text: str) -> dict[str, Any]:
    """The YAML mapping of the advanced field; nothing gives an empty one."""
    import yaml

    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"advanced is not valid YAML: {' '.join(str(error).split())}") from None
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ValueError(f"advanced must hold lines such as 'weight_decay: 0.01', got {text.strip()[:60]!r}")
    return found


def _field(setting: str) -> tuple[Any, Any]:
    """Default and type of a setting."""
    group, _, name = setting.rpartition(".")
    owner = NESTED.get(group, TrainConfig)
    default = next(f.default for f in dataclasses.fields(owner) if f.name == name)
    return default, get_type_hints(owner)[name]


def _nest(setting: str, value: Any) -> dict[str, Any]:
    group, _, name = setting.rpartition(".")
    return {group: {name: value}} if group else {name: value}


def _merge(into: dict[str, Any], new: Mapping[str, Any]) -> None:
    for key, value in new.items():
        if isinstance(value, Mapping):
            if not isinstance(into.get(key), dict):
                into[key] = {}
            _merge(into[key], value)
        else:
            into[key] = value
