"""Load Reward, Score Frames."""

from __future__ import annotations

import comfy.model_management
import torch
from comfy_api.latest import io
from torch import Tensor

from ..reward_models import REWARDS, load_reward
from . import folders
from .bridge import Progress, engine, on_device, patience, say, to_frames
from .types import LoadedReward, RewardType


class LoadReward(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        known = "; ".join(f"{name}: {entry.summary}" for name, entry in REWARDS.items())
        return io.Schema(
            node_id="RewardLoraLoadReward",
            display_name="Load Reward",
            category="Reward LoRA/reward",
            description="Loads a reward: a model that looks at frames and a prompt and says how good they are.",
            inputs=[
                io.Combo.Input("name", options=list(REWARDS), default=next(iter(REWARDS)), tooltip=known),
                io.String.Input(
                    "path",
                    default="",
                    optional=True,
                    tooltip="Folder of the reward's files. Empty looks in models/reward_models, or takes what comes "
                    "with the pack.",
                ),
            ],
            outputs=[
                RewardType.Output("reward", display_name="reward", tooltip="For Score Frames and Train Reward LoRA.")
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, name: str | None = None) -> bool | str:
        if name is not None and name not in REWARDS:
            return f"unknown reward {name!r}; known are {', '.join(REWARDS)}"
        return True

    @classmethod
    def execute(cls, name: str, path: str = "") -> io.NodeOutput:
        with engine(), patience(f"loading {name}", cls.hidden.unique_id):
            folder = path.strip().strip('"')
            rest = comfy.model_management.unet_offload_device()
            reward = load_reward(name, folder, str(rest), search=folders.reward_roots())
        say(REWARDS[name].summary, cls.hidden.unique_id)
        return io.NodeOutput(LoadedReward(reward, f"{name} {folder or 'builtin'}"))


class ScoreFrames(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RewardLoraScoreFrames",
            display_name="Score Frames",
            category="Reward LoRA/reward",
            description="Asks a reward how good a clip or a picture is. Higher is better; the scale is the "
            "reward's own.",
            inputs=[
                RewardType.Input("reward", tooltip="From Load Reward."),
                io.Image.Input("images", tooltip="The frames of one clip, or one picture."),
                io.String.Input("prompt", multiline=True, default="", tooltip="The text the frames should match."),
                io.Boolean.Input(
                    "every_frame",
                    default=True,
                    tooltip="Also score every frame as a picture of its own; takes as long again.",
                ),
            ],
            outputs=[
                io.Float.Output("score", display_name="score", tooltip="Of the whole clip."),
                io.String.Output("summary", display_name="summary", tooltip="The score in words."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, reward: LoadedReward, images: Tensor, prompt: str, every_frame: bool = True) -> io.NodeOutput:
        judge, progress = reward.reward, Progress(1, cls.hidden.unique_id)
        with engine(), on_device(reward=judge):
            if "reference" in judge.needs:
                raise ValueError(f"the reward {judge.name} needs a reference video, which this node cannot give")
            if "prompt" in judge.needs and not prompt.strip():
                raise ValueError(f"the reward {judge.name} needs a prompt; write what the frames should show")
            progress("reward")
            frames = to_frames(images)
            with torch.no_grad():
                score = float(judge.score(frames, [prompt])[0])
                count = frames.shape[2]
                singles = []
                if every_frame and count > 1:
                    for index in range(count):
                        progress("reward")
                        singles.append(float(judge.score(frames[:, :, index : index + 1], [prompt])[0]))
        summary = f"{judge.name}: {score:.4f} for {prompt.strip()!r} over {count} frame{'s' * (count > 1)}"
        if singles:
            summary += "; one by one " + ", ".join(f"{value:.3f}" for value in singles)
        say(summary, cls.hidden.unique_id)
        progress.show(1)
        return io.NodeOutput(score, summary, ui={"text": [summary], "score": [score]})
