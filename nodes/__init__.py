"""What an artist uses: thin nodes over the engine, and the only folder that imports ComfyUI."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import folders
from .generate import GenerateVideo
from .lora import ApplyRewardLora, SaveRewardLora
from .lora_catalog import FetchPublishedLora
from .lora_merge import MergeLoras
from .lora_model import ApplyRewardLoraToModel
from .lora_sweep import SweepLoraStrength
from .native import VideoModelFromParts
from .prompts import Prompts
from .reward import CombineRewards, LoadReward
from .runs import LoadTrainedLora, TrainingReport
from .score import Compare, PickBest, ScoreFrames
from .settings import (
    BackpropSchedule,
    Guards,
    JudgeSettings,
    MemorySettings,
    OptimizerSettings,
    SamplingSettings,
)
from .train import TrainRewardLora
from .video_model import LoadVideoModel, LoadVideoModelFiles

NODES: list[type[io.ComfyNode]] = [
    LoadVideoModel,
    LoadVideoModelFiles,
    VideoModelFromParts,
    Prompts,
    GenerateVideo,
    LoadReward,
    CombineRewards,
    ScoreFrames,
    PickBest,
    Compare,
    TrainRewardLora,
    TrainingReport,
    BackpropSchedule,
    SamplingSettings,
    JudgeSettings,
    Guards,
    MemorySettings,
    OptimizerSettings,
    ApplyRewardLora,
    ApplyRewardLoraToModel,
    MergeLoras,
    FetchPublishedLora,
    LoadTrainedLora,
    SweepLoraStrength,
    SaveRewardLora,
]


class RewardLoraExtension(ComfyExtension):
    """The pack as ComfyUI sees it."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        folders.register()
        return NODES
