"""Settings of a training as nodes of their own: Backprop Schedule, Sampling, Judge, Guards, Memory, Optimizer."""

from __future__ import annotations

from collections.abc import Mapping

from comfy_api.latest import io

from ..training.config import TrainConfig
from . import train_widgets
from .bridge import engine
from .train_widgets import Settings, Widget

ScheduleType = io.Custom("REWARD_LORA_SCHEDULE")
SamplingType = io.Custom("REWARD_LORA_SAMPLING")
JudgeType = io.Custom("REWARD_LORA_JUDGE")
GuardsType = io.Custom("REWARD_LORA_GUARDS")
MemoryType = io.Custom("REWARD_LORA_MEMORY")
OptimizerType = io.Custom("REWARD_LORA_OPTIMIZER")
"""Each carries :class:`.train_widgets.Settings`."""


def connections() -> list[io.Input]:
    """Inputs of the training node for them all."""
    return [
        kind.Input(name, optional=True, tooltip=f"From {node.NAME}; it counts instead of the widgets here.")
        for name, (kind, node) in CONNECTIONS.items()
    ]


def _schema(node_id: str, name: str, about: str, kind, widgets: Mapping[str, Widget]) -> io.Schema:
    return io.Schema(
        node_id=node_id,
        display_name=name,
        category="Reward LoRA/training/settings",
        description=f"{about} Connect it to Train Reward LoRA, where it counts instead of the widgets of the same "
        "name; what stands under 'advanced' there counts most.",
        inputs=train_widgets.inputs(widgets, train_widgets.short_id, optional=True),
        outputs=[kind.Output("settings", display_name="settings", tooltip="For Train Reward LoRA.")],
    )


def _settings(widgets: Mapping[str, Widget], values: Mapping[str, object]) -> io.NodeOutput:
    """Checked here, so that the error shows at the node that has the wrong value."""
    with engine():
        data = train_widgets.given(widgets, values, train_widgets.short_id)
        TrainConfig.from_dict(data)
    return io.NodeOutput(Settings(data))


class BackpropSchedule(io.ComfyNode):
    NAME = "Backprop Schedule"

    @classmethod
    def define_schema(cls) -> io.Schema:
        about = (
            "Which solver steps are trained, and how strongly they are coupled: DRaFT, AlignProp, DRTune, ReFL and "
            "LeapAlign are settings of it."
        )
        return _schema("RewardLoraBackpropSchedule", cls.NAME, about, ScheduleType, train_widgets.SCHEDULE)

    @classmethod
    def execute(cls, **values) -> io.NodeOutput:
        return _settings(train_widgets.SCHEDULE, values)


class SamplingSettings(io.ComfyNode):
    NAME = "Sampling Settings"

    @classmethod
    def define_schema(cls) -> io.Schema:
        about = "How the videos that are trained on are painted, besides size, steps and guidance."
        return _schema("RewardLoraSamplingSettings", cls.NAME, about, SamplingType, train_widgets.SAMPLING)

    @classmethod
    def execute(cls, **values) -> io.NodeOutput:
        return _settings(train_widgets.SAMPLING, values)


class JudgeSettings(io.ComfyNode):
    NAME = "Judge Settings"

    @classmethod
    def define_schema(cls) -> io.Schema:
        about = "What of a video the reward sees, and what is made of its score: which frames, a target, a hinge."
        return _schema("RewardLoraJudgeSettings", cls.NAME, about, JudgeType, train_widgets.JUDGE)

    @classmethod
    def execute(cls, **values) -> io.NodeOutput:
        return _settings(train_widgets.JUDGE, values)


class Guards(io.ComfyNode):
    NAME = "Guards"

    @classmethod
    def define_schema(cls) -> io.Schema:
        about = (
            "Against a reward that rises while the videos get worse. A preset decides on all that is left at 'preset' "
            "or -1."
        )
        return _schema("RewardLoraGuards", cls.NAME, about, GuardsType, train_widgets.GUARDS)

    @classmethod
    def execute(cls, **values) -> io.NodeOutput:
        return _settings(train_widgets.GUARDS, values)


class MemorySettings(io.ComfyNode):
    NAME = "Memory Settings"

    @classmethod
    def define_schema(cls) -> io.Schema:
        about = "How a training step is fitted into the memory of the GPU. 'auto' looks at what is free."
        return _schema("RewardLoraMemorySettings", cls.NAME, about, MemoryType, train_widgets.MEMORY)

    @classmethod
    def execute(cls, **values) -> io.NodeOutput:
        return _settings(train_widgets.MEMORY, values)


class OptimizerSettings(io.ComfyNode):
    NAME = "Optimizer Settings"

    @classmethod
    def define_schema(cls) -> io.Schema:
        about = "How the LoRA learns, besides rank and learning rate: optimizer, moving average, which modules."
        return _schema("RewardLoraOptimizerSettings", cls.NAME, about, OptimizerType, train_widgets.OPTIMIZER)

    @classmethod
    def execute(cls, **values) -> io.NodeOutput:
        return _settings(train_widgets.OPTIMIZER, values)


CONNECTIONS = {
    "schedule": (ScheduleType, BackpropSchedule),
    "sampling": (SamplingType, SamplingSettings),
    "judge": (JudgeType, JudgeSettings),
    "guard_settings": (GuardsType, Guards),
    "memory": (MemoryType, MemorySettings),
    "optimizer": (OptimizerType, OptimizerSettings),
}
"""Inputs of the training node, with their types and the nodes they are for."""
