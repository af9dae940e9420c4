"""Train Reward LoRA."""

from __future__ import annotations

from dataclasses import replace

from comfy_api.latest import io
from torch import Tensor

from ..lora.files import LoraFile
from ..training.examples import Picture, as_examples, read_examples
from . import folders, settings, train_widgets
from .bridge import engine, to_frames
from .live import LiveTraining
from .train_run import TrainingRun
from .train_widgets import Settings
from .types import LoadedModel, LoadedReward, LoraType, RewardType, VideoModelType, split_lines

PICTURES = {
    "start_image": "What the video begins with, for every prompt that brings no start image of its own.",
    "end_image": "What the video ends with, for every prompt that brings no end image of its own.",
    "reference": "A picture or clip that the reward compares the videos with, such as a person's face, for every "
    "prompt that brings none of its own. Of a clip, the first frame is left out.",
}

NEW = "a new run"


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
                *train_widgets.inputs(train_widgets.TRAIN),
                io.String.Input(
                    "prompt_file",
                    default="",
                    optional=True,
                    tooltip="More prompts, by a path or its name in the input folder: a .txt (one a line), a .jsonl, "
                    "or a folder of clips or pictures with a metadata.csv of video,prompt or image,prompt, or with a "
                    ".txt beside each. 'builtin' holds those of the built-in model's world.",
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
                *(io.Image.Input(name, optional=True, tooltip=about) for name, about in PICTURES.items()),
                *train_widgets.inputs(train_widgets.TRAIN_LAST, optional=True),
                *settings.connections(),
                io.Combo.Input(
                    "resume_from",
                    options=[NEW, *folders.list_runs()],
                    default=NEW,
                    optional=True,
                    tooltip="Go on with a training of the output folder, in its folder and from its newest checkpoint; "
                    "model, reward, prompts and settings must be those it was begun with. 'a new run' still goes on "
                    "by itself where the same settings were cancelled. Press R to see new runs.",
                ),
                LoraType.Input(
                    "start_lora",
                    optional=True,
                    tooltip="Begin a new run with the weights of this LoRA at strength 1, whatever the settings. The "
                    "rank must be at least the LoRA's.",
                ),
                LoraType.Input(
                    "start_second_lora",
                    optional=True,
                    tooltip="Of a model with two experts, the other one's LoRA to begin with.",
                ),
                io.Int.Input(
                    "devices",
                    default=1,
                    min=1,
                    max=64,
                    optional=True,
                    tooltip="How many GPUs, from the first, train together, each on videos of its own, in processes "
                    "that load the model themselves; on a CPU, so many processes: 1 to 64. 1 trains in ComfyUI itself.",
                ),
            ],
            outputs=[
                LoraType.Output(
                    "lora",
                    display_name="lora",
                    tooltip="For Apply and Save Reward LoRA: the last, or that of the best evaluation if the last one "
                    "was bad.",
                ),
                io.Image.Output("reward_curve", display_name="reward_curve", tooltip="The reward over the steps."),
                io.Image.Output(
                    "before",
                    display_name="before",
                    tooltip="The first six samples before the first step, side by side.",
                ),
                io.Image.Output("after", display_name="after", tooltip="The same prompts and seeds with the LoRA."),
                io.String.Output("summary", display_name="summary", tooltip="The run in words."),
                LoraType.Output(
                    "second_lora",
                    display_name="second_lora",
                    tooltip="Of a model with two experts, the low-noise one's LoRA. Nothing comes out otherwise.",
                ),
                io.String.Output(
                    "run", display_name="run", tooltip="The run's folder: for Load Trained LoRA and Training Report."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, prefix: str | None = None, resume_from: str | None = None) -> bool | str:
        told = folders.complaint(folders.check_prefix, prefix)
        return told if told is not True or resume_from == NEW else folders.complaint(folders.run_folder, resume_from)

    @classmethod
    def fingerprint_inputs(cls, prompt_file: str = "", **_others) -> str:
        """A prompt file that was edited, or a folder in which a file was, is read again."""
        return folders.fingerprint(folders.prompt_path(prompt_file)) if prompt_file.strip() else ""

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
        start_image: Tensor | None = None,
        end_image: Tensor | None = None,
        reference: Tensor | None = None,
        schedule: Settings | None = None,
        sampling: Settings | None = None,
        judge: Settings | None = None,
        guard_settings: Settings | None = None,
        memory: Settings | None = None,
        optimizer: Settings | None = None,
        resume_from: str = NEW,
        start_lora: LoraFile | None = None,
        start_second_lora: LoraFile | None = None,
        devices: int = 1,
        **widgets,
    ) -> io.NodeOutput:
        with engine():
            given = {"start_image": start_image, "end_image": end_image, "reference": reference}
            pictures = {name: Picture(to_frames(images)[0]) for name, images in given.items() if images is not None}
            examples = as_examples(split_lines(prompts))
            if prompt_file.strip():
                examples += read_examples(folders.prompt_path(prompt_file))
            if not examples:
                raise ValueError("training needs at least one prompt; write them one a line, or give a prompt file")
            heldout = [heldout_reward] if heldout_reward else []
            connected = (schedule, sampling, judge, guard_settings, memory, optimizer)
            config = train_widgets.config_from(widgets, advanced, connected).for_model(video_model.model.spec)
            examples, samples = (
                [replace(example, **pictures | example.pictures) for example in some]
                for some in (examples, as_examples(split_lines(sample_prompts)))
            )
            resume = None if resume_from == NEW else folders.run_folder(resume_from)
            start = [lora for lora in (start_lora, start_second_lora) if lora is not None]
            run = TrainingRun(video_model, reward, examples, samples, config, prefix, heldout, resume, start, devices)
            with LiveTraining(config, cls.hidden.unique_id) as live:
                return run.execute(live)
