"""Apply Reward LoRA, Save Reward LoRA."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import folder_paths
from comfy.cli_args import args
from comfy_api.latest import io

from ..lora.adapter import AUTO, HIGH_NOISE, LOW_NOISE, STRENGTH_RANGE, LoraUse
from ..lora.files import LoraFile, read_lora, write_lora
from ..lora.write import DOTTED
from . import folders
from .bridge import engine, say
from .types import LoadedModel, LoraType, VideoModelType

EXPERTS = [AUTO, HIGH_NOISE, LOW_NOISE]


def file_input(name: str = "lora_file", default: str = folders.BUILTIN_LORA) -> io.Combo.Input:
    """The list of LoRA files."""
    return io.Combo.Input(
        name,
        options=folders.list_loras(),
        default=default,
        tooltip="A file of models/loras or of the output folder, in any usual format: ComfyUI, diffusers, peft, "
        "kohya, VideoX-Fun, DiffSynth, VADER. A LoRA connected below counts instead.",
    )


def strength_input() -> io.Float.Input:
    low, high = STRENGTH_RANGE
    return io.Float.Input(
        "strength",
        default=0.7,
        min=low,
        max=high,
        step=0.05,
        display_mode=io.NumberDisplay.slider,
        tooltip="How strongly, -2 to 2: 0 leaves the model as it is, 1 is as trained, below 0 is the opposite.",
    )


def connected_input(name: str = "lora") -> io.Input:
    return LoraType.Input(name, optional=True, tooltip="Straight from another node of this pack, without a file.")


def chosen(lora_file: str, lora: LoraFile | None) -> LoraFile:
    """The connected LoRA, or the file of the list, read into memory."""
    if lora is not None:
        return lora
    if lora_file == folders.CONNECTED:
        raise ValueError("no LoRA is connected; connect one, or choose a file from the list")
    return read_lora(folders.lora_path(lora_file)).in_memory()


def file_fingerprint(lora_file: str | None) -> str:
    """Changes when the file is replaced, so that it is read again."""
    try:
        found = folders.lora_path(lora_file or "").stat()
    except (ValueError, OSError):
        return "none"
    return f"{found.st_mtime_ns} {found.st_size}"


class ApplyRewardLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RewardLoraApplyRewardLora",
            display_name="Apply Reward LoRA",
            category="Reward LoRA/lora",
            description="Uses a LoRA with a video model, at a strength. Nothing is merged: the loaded model stays as "
            "it is, and several of these nodes may follow each other. Reports how many modules of the LoRA matched.",
            inputs=[
                VideoModelType.Input("video_model", tooltip="From Load Video Model or another Apply Reward LoRA."),
                file_input(),
                strength_input(),
                connected_input(),
                io.Combo.Input(
                    "expert",
                    options=EXPERTS,
                    default=AUTO,
                    optional=True,
                    tooltip="For models with two networks, such as Wan2.2: high_noise paints the first steps, "
                    "low_noise the last ones. auto takes the one the file names, else both.",
                ),
                io.Float.Input(
                    "start",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    optional=True,
                    tooltip="From which part of the solver's steps on it acts, 0 to 1. 0.5 leaves the early steps, "
                    "which decide on the layout, to the model itself: more variety.",
                ),
                io.Float.Input(
                    "end",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    optional=True,
                    tooltip="Up to which part of the solver's steps it acts, 0 to 1; 1 is to the end.",
                ),
            ],
            outputs=[
                VideoModelType.Output(
                    "video_model_with_lora",
                    display_name="video_model",
                    tooltip="The model with the LoRA, for Generate Video, training, or another LoRA.",
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_file: str, **_others) -> str:
        return file_fingerprint(lora_file)

    @classmethod
    def execute(
        cls,
        video_model: LoadedModel,
        lora_file: str,
        strength: float,
        lora: LoraFile | None = None,
        expert: str = AUTO,
        start: float = 0.0,
        end: float = 1.0,
    ) -> io.NodeOutput:
        with engine():
            use = LoraUse(chosen(lora_file, lora), strength, expert, start, end)
            lines = [*use.lora.notes, *(f"{line}, {use.setting()}" for line in use.check(video_model.model))]
        report = "\n".join(lines)
        say(report, cls.hidden.unique_id)
        result = video_model.with_lora(use) if strength else video_model
        return io.NodeOutput(result, ui={"text": [report]})


class SaveRewardLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RewardLoraSaveRewardLora",
            display_name="Save Reward LoRA",
            category="Reward LoRA/lora",
            description="Writes a LoRA into the output folder, with the workflow that made it in its metadata. "
            "ComfyUI's own LoRA loaders and diffusers read the file too.",
            inputs=[
                LoraType.Input("lora", tooltip="From Train Reward LoRA, Load Trained LoRA or Merge LoRAs."),
                io.String.Input(
                    "prefix", default="loras/reward_lora", tooltip="Folder and start of the name in the output folder."
                ),
                io.Boolean.Input(
                    "copy_to_models_loras",
                    default=False,
                    tooltip="Put a copy into models/loras, where every LoRA loader finds it.",
                ),
            ],
            outputs=[],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo, io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, prefix: str | None = None) -> bool | str:
        return folders.complaint(folders.check_prefix, prefix)

    @classmethod
    def execute(cls, lora: LoraFile, prefix: str, copy_to_models_loras: bool) -> io.NodeOutput:
        metadata = dict(lora.metadata)
        if not args.disable_metadata:
            texts = {"prompt": cls.hidden.prompt, **(cls.hidden.extra_pnginfo or {})}
            metadata |= {key: json.dumps(value) for key, value in texts.items() if value is not None}
        with engine():
            if lora.prefix != DOTTED:
                raise ValueError(f"{lora.path.name} lies in a file already, which every LoRA node reads as it is")
            path = folders.next_file(prefix)
            names = {name: name.removeprefix(lora.prefix) for name in lora.names}
            write_lora(path, lora.modules, names, metadata, None, offsets=lora.offsets)
        report = f"written: {path.relative_to(folder_paths.get_output_directory()).as_posix()}"
        if copy_to_models_loras:
            target = Path(folder_paths.get_folder_paths("loras")[0], path.name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            report += f", and models/loras/{target.name}"
        say(report, cls.hidden.unique_id)
        return io.NodeOutput(ui={"loras": folders.listed(path), "text": [report]})
