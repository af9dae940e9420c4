"""Train Reward LoRA."""

from __future__ import annotations

import hashlib

from comfy_api.latest import io

from ..training.prompts import read_prompts
from . import folders, train_widgets
from .bridge import Progress, engine
from .train_run import TrainingRun
from .types import LoadedModel, LoadedReward, LoraType, RewardType, VideoModelType


def split_lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


class TrainRewardLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RewardLoraTrainRewardLora",
            display_name="Train Reward LoRA",
            category="Reward LoRA/training",
            description="Trains a LoRA so that the reward of the model's videos rises: videos are sampled from the "
            "prompts, judged, and the reward's gradient flows back through the sampler. Cancelling keeps what was "
            "learned; run the same settings again to go on.",
            inputs=[
                VideoModelType.Input("video_model", tooltip="LoRAs applied to it stay applied while training."),
                RewardType.Input("reward", tooltip="What shall rise. It must be differentiable."),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="",
                    placeholder="prompts to train on, one a line",
                    tooltip="To train on, one a line.",
                ),
                io.String.Input(
                    "prefix",
                    default="reward_lora/run",
                    tooltip="The run's folder in the output folder; a hash of all settings is added to it.",
                ),
                *train_widgets.inputs(),
                io.String.Input(
                    "prompt_file",
                    default="",
                    optional=True,
                    tooltip="More prompts, from a .txt (one a line) or .jsonl file in the input folder or by its path. "
                    "'builtin' holds those of the built-in model's world.",
                ),
                io.String.Input(
                    "sample_prompts",
                    multiline=True,
                    default="",
                    placeholder="prompts to evaluate on, one a line",
                    optional=True,
                    tooltip="To evaluate on and to show, one a line; prompts never trained on are the honest choice. "
                    "Empty takes the first training prompts.",
                ),
                io.String.Input(
                    "advanced",
                    multiline=True,
                    default="",
                    placeholder="other settings, such as weight_decay: 0.01",
                    optional=True,
                    tooltip="Any other setting as YAML, such as 'weight_decay: 0.01'; the help page lists them.",
                ),
                RewardType.Input(
                    "heldout_reward",
                    optional=True,
                    tooltip="A reward that is not trained on: the guards stop the run when it falls while the trained "
                    "one rises, and keep the LoRA at which it is highest.",
                ),
            ],
            outputs=[
                LoraType.Output("lora", display_name="lora", tooltip="For Apply and Save Reward LoRA."),
                io.Image.Output("reward_curve", display_name="reward_curve", tooltip="The reward over the steps."),
                io.Image.Output(
                    "before",
                    display_name="before",
                    tooltip="The first six samples without the LoRA, side by side.",
                ),
                io.Image.Output("after", display_name="after", tooltip="The same prompts and seeds with the LoRA."),
                io.String.Output("summary", display_name="summary", tooltip="The run in words."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, prefix: str | None = None) -> bool | str:
        return folders.complaint(folders.check_prefix, prefix)

    @classmethod
    def fingerprint_inputs(cls, prompt_file: str = "", **_others) -> str:
        """A prompt file that was edited is read again."""
        path = folders.prompt_path(prompt_file or "")
        return hashlib.sha256(path.read_bytes()).hexdigest() if prompt_file and path.is_file() else ""

    @classmethod
    def execute(
        cls,
        video_model: LoadedModel,
        reward: LoadedReward,
        prompts: str,
        prefix: str,
        prompt_file: str = "",
        sample_prompts: str = "",
        advanced: str = "",
        heldout_reward: LoadedReward | None = None,
        **widgets,
    ) -> io.NodeOutput:
        with engine():
            texts = split_lines(prompts)
            if prompt_file.strip():
                texts += read_prompts(folders.prompt_path(prompt_file))
            if not texts:
                raise ValueError("training needs at least one prompt; write them one a line, or give a prompt file")
            heldout = [heldout_reward] if heldout_reward else []
            config = train_widgets.config_from(widgets, advanced).for_model(video_model.model.spec)
            run = TrainingRun(video_model, reward, texts, split_lines(sample_prompts), config, prefix, heldout)
            return run.execute(Progress(config.steps, cls.hidden.unique_id))
