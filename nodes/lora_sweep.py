"""Sweep LoRA Strength."""

from __future__ import annotations

import re
from contextlib import ExitStack

from comfy_api.latest import io

from ..files import write_text
from ..lora.adapter import LoraUse
from ..lora.files import LoraFile
from ..reward_models.judging import table
from ..training.media import write_png
from ..training.prompts import read_prompts
from ..training.sweep import SweepConfig, SweepPoint, gathered, run_sweep
from ..training.sweep_report import sweep_csv, sweep_plot, sweep_rows, sweep_sheet
from . import folders
from .bridge import Progress, engine, on_device, picture_to_image, placed
from .lora import chosen, connected_input, file_fingerprint, file_input
from .types import LoadedModel, LoadedReward, LoraType, RewardType, VideoModelType, split_lines

HELD_OUT = 3
"""Inputs for rewards besides the judge; Combine Rewards takes more into one."""


class SweepLoraStrength(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        default = "0 takes the model's default."
        others = [
            RewardType.Input(
                f"held_out_{number}",
                optional=True,
                tooltip="A reward the LoRA was not trained towards. Such rewards decide on the recommendation.",
            )
            for number in range(1, HELD_OUT + 1)
        ]
        return io.Schema(
            node_id="RewardLoraSweepLoraStrength",
            display_name="Sweep LoRA Strength",
            category="Reward LoRA/lora",
            description="Paints the same prompts and seeds at many strengths of a LoRA, judges them, measures how much "
            "still moves, and recommends the strength to use, with the reason.",
            inputs=[
                VideoModelType.Input("video_model", tooltip="LoRAs applied to it stay applied at their strength."),
                RewardType.Input("judge", tooltip="The reward the LoRA was trained towards."),
                file_input(),
                io.String.Input(
                    "strengths",
                    default="0, 0.25, 0.5, 0.75, 1, 1.25, 1.5",
                    tooltip="Numbers from -2 to 2, separated by commas; 0, the model itself, is always among them.",
                ),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="",
                    placeholder="prompts the LoRA was not trained on, one a line",
                    tooltip="One a line, best such that the LoRA was not trained on. Few prompts give wide intervals: "
                    "16 or more, better 64.",
                ),
                io.Int.Input(
                    "seeds", default=1, min=1, max=100, tooltip="Videos a prompt, 1 to 100, alike at every strength."
                ),
                io.Int.Input(
                    "seed",
                    default=42,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=False,
                    tooltip="Source of the noise, 0 to 2^64 - 1.",
                ),
                io.Float.Input(
                    "motion_floor",
                    default=0.75,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    display_mode=io.NumberDisplay.slider,
                    tooltip="Share of the base model's motion that must be left, 0 to 1. No strength beyond the first "
                    "that falls below it is recommended.",
                ),
                connected_input(),
                *others,
                io.String.Input(
                    "prompt_file",
                    default="",
                    optional=True,
                    tooltip="More prompts, from a .txt (one a line) or .jsonl file in the input folder or by its path. "
                    "'builtin' holds those of the built-in model's world that its LoRA was not trained on.",
                ),
                io.Int.Input(
                    "max_prompts",
                    default=64,
                    min=1,
                    max=10_000,
                    optional=True,
                    tooltip="How many prompts at most, the first ones: 1 to 10000.",
                ),
                io.String.Input(
                    "negative", multiline=True, default="", optional=True, tooltip="What guidance leads away from."
                ),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=256,
                    optional=True,
                    tooltip="Videos painted together, 1 to 256; more are faster and need more memory.",
                ),
                *(
                    io.Int.Input(name, default=0, min=0, max=most, step=step, optional=True, tooltip=about + default)
                    for name, most, step, about in (
                        ("width", 4096, 8, "Pixels, up to 4096. "),
                        ("height", 4096, 8, "Pixels, up to 4096. "),
                        ("frames", 1024, 1, "How many, up to 1024. "),
                        ("steps", 1000, 1, "Solver steps, up to 1000. "),
                    )
                ),
                io.Float.Input(
                    "guidance_scale",
                    default=0.0,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    display_mode=io.NumberDisplay.slider,
                    optional=True,
                    tooltip=f"Classifier-free guidance, 1 to 30; 1 turns it off. {default}",
                ),
                io.String.Input(
                    "prefix",
                    default="reward_lora/sweep",
                    optional=True,
                    tooltip="Folder and start of the names of the CSV file and the pictures in the output folder.",
                ),
            ],
            outputs=[
                io.Float.Output("strength", display_name="strength", tooltip="The recommended one."),
                io.String.Output("reason", display_name="reason", tooltip="Why, in words."),
                io.Image.Output("videos", display_name="videos", tooltip="A row a strength, a column a video."),
                io.Image.Output("plot", display_name="plot", tooltip="Gains with their intervals, and motion."),
                io.String.Output("table", display_name="table", tooltip="The numbers as text."),
                LoraType.Output("lora_out", display_name="lora", tooltip="The LoRA, for Apply Reward LoRA."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, prefix: str | None = None) -> bool | str:
        return folders.complaint(folders.check_prefix, prefix)

    @classmethod
    def fingerprint_inputs(cls, lora_file: str = "", **_others) -> str:
        return file_fingerprint(lora_file)

    @classmethod
    def execute(
        cls,
        video_model: LoadedModel,
        judge: LoadedReward,
        lora_file: str,
        strengths: str,
        prompts: str,
        seeds: int,
        seed: int,
        motion_floor: float,
        lora: LoraFile | None = None,
        held_out_1: LoadedReward | None = None,
        held_out_2: LoadedReward | None = None,
        held_out_3: LoadedReward | None = None,
        prompt_file: str = "",
        max_prompts: int = 64,
        negative: str = "",
        batch_size: int = 1,
        width: int = 0,
        height: int = 0,
        frames: int = 0,
        steps: int = 0,
        guidance_scale: float = 0.0,
        prefix: str = "reward_lora/sweep",
    ) -> io.NodeOutput:
        model, given = video_model.model, (held_out_1, held_out_2, held_out_3)
        with engine(), ExitStack() as stack:
            config = SweepConfig(
                strengths=parse_numbers(strengths),
                prompts=tuple(gather_prompts(prompts, prompt_file)[:max_prompts]),
                seeds=seeds,
                seed=seed,
                motion_floor=motion_floor,
                batch_size=batch_size,
                width=width,
                height=height,
                frames=frames,
                steps=steps,
                guidance_scale=guidance_scale,
                negative_prompt=negative,
            )
            use = LoraUse(chosen(lora_file, lora), 1.0)
            matched = use.check(model)
            progress = stack.enter_context(Progress(len(config.strengths), cls.hidden.unique_id))
            for reward in (judge, *filter(None, given)):
                stack.enter_context(on_device(reward=reward.reward))
            tick = stack.enter_context(placed(model, progress))
            others = [reward.reward for reward in filter(None, given)]
            stem, points = folders.next_file(prefix).with_suffix(""), []
            for point in run_sweep(model, use, config, judge.reward, others, kept=video_model.uses, tick=tick):
                points.append(point)
                sweep = gathered(config, points)
                # Written after every strength, so that a sweep that is cancelled has not been for nothing.
                table_file = write_text(stem.with_suffix(".csv"), sweep_csv(sweep))
                plot = sweep_plot(sweep)
                text = f"strength {point.strength:g}: {judge.reward.name} {_mean(point, judge.reward.name):.4f}"
                progress.show(len(points), plot, text)
            sheet, numbers = sweep_sheet(sweep), table(*sweep_rows(sweep))
            pictures = [
                write_png(stem.with_name(f"{stem.name}plot.png"), plot),
                write_png(stem.with_name(f"{stem.name}videos.png"), sheet),
            ]
        reason = sweep.reason()
        text = f"{reason}\n\n{numbers}\n" + "\n".join(matched)
        progress.show(len(points), plot, reason)  # the last live preview stays on the node
        return io.NodeOutput(
            sweep.best.strength,
            reason,
            picture_to_image(sheet),
            picture_to_image(plot),
            text,
            use.lora,
            ui={"images": folders.listed(*pictures), "files": folders.listed(table_file), "text": [text]},
        )


def parse_numbers(text: str) -> tuple[float, ...]:
    """Numbers separated by commas or spaces. Raises ``ValueError`` for anything else."""
    try:
        return tuple(float(part) for part in re.split(r"[,;\s]+", text.strip()) if part)
    except ValueError:
        raise ValueError(f"strengths must be numbers such as 0, 0.5, 1, got {text!r}") from None


def gather_prompts(prompts: str, file: str) -> list[str]:
    """The lines of a text, and those of a file: ``builtin`` is the unseen half of the built-in world."""
    if file.strip() == folders.BUILTIN:
        return [*split_lines(prompts), *read_prompts(folders.ASSETS / "prompts_test.txt")]
    return [*split_lines(prompts), *(read_prompts(folders.prompt_path(file)) if file.strip() else ())]


def _mean(point: SweepPoint, reward: str) -> float:
    return sum(point.scores[reward]) / len(point.scores[reward])
