"""Apply Reward LoRA, Save Reward LoRA."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import folder_paths
from comfy.cli_args import args
from comfy_api.latest import io

from ..lora.adapter import STRENGTH_RANGE, LoraUse, check_strength, linear_shapes
from ..lora.files import LoraFile, match, read_lora, write_lora
from . import folders
from .bridge import engine, say
from .types import LoadedModel, LoraType, VideoModelType

EXPERT = "transformer"


class ApplyRewardLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        low, high = STRENGTH_RANGE
        return io.Schema(
            node_id="RewardLoraApplyRewardLora",
            display_name="Apply Reward LoRA",
            category="Reward LoRA/lora",
            description="Uses a LoRA with a video model, at a strength. Nothing is merged: the loaded model stays as "
            "it is, and several of these nodes may follow each other. Reports how many modules of the LoRA matched.",
            inputs=[
                VideoModelType.Input("video_model", tooltip="From Load Video Model or another Apply Reward LoRA."),
                io.Combo.Input(
                    "lora_file",
                    options=folders.list_loras(),
                    default=folders.BUILTIN_LORA,
                    tooltip="A file of models/loras or of the output folder, in any usual format. A LoRA connected "
                    "below counts instead.",
                ),
                io.Float.Input(
                    "strength",
                    default=0.7,
                    min=low,
                    max=high,
                    step=0.05,
                    tooltip="How strongly: 0 leaves the model as it is, 1 is as trained, below 0 is the opposite.",
                ),
                LoraType.Input("lora", optional=True, tooltip="Straight from Train Reward LoRA, without a file."),
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
        """A file that was replaced is read again."""
        try:
            found = folders.lora_path(lora_file).stat()
        except (ValueError, OSError):
            return "none"
        return f"{found.st_mtime_ns} {found.st_size}"

    @classmethod
    def execute(
        cls, video_model: LoadedModel, lora_file: str, strength: float, lora: LoraFile | None = None
    ) -> io.NodeOutput:
        with engine():
            check_strength(strength)
            if lora is None:
                if lora_file == folders.CONNECTED:
                    raise ValueError("no LoRA is connected; connect one, or choose a file from the list")
                lora = read_lora(folders.lora_path(lora_file)).in_memory()
            model = video_model.model
            matched = match(lora, model.lora_names(EXPERT), linear_shapes(model.denoisers[EXPERT]))
        report = f"{matched.report()}, strength {strength:g}"
        say(report, cls.hidden.unique_id)
        result = video_model.with_lora(LoraUse(lora, strength, EXPERT)) if strength else video_model
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
                LoraType.Input("lora", tooltip="From Train Reward LoRA."),
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
            path = folders.next_file(prefix)
            names = {name: name.removeprefix(lora.prefix) for name in lora.modules}
            dtype = next(iter(lora.modules.values())).up.dtype
            write_lora(path, lora.modules, names, metadata, dtype)
        report = f"written: {path.relative_to(folder_paths.get_output_directory()).as_posix()}"
        if copy_to_models_loras:
            target = Path(folder_paths.get_folder_paths("loras")[0], path.name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            report += f", and models/loras/{target.name}"
        say(report, cls.hidden.unique_id)
        return io.NodeOutput(ui={"loras": folders.listed(path), "text": [report]})
