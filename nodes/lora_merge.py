"""Merge LoRAs."""

from __future__ import annotations

from pathlib import Path

from comfy_api.latest import io

from ..lora.adapter import STRENGTH_RANGE
from ..lora.files import LoraFile
from ..lora.merge import merge_files
from ..lora.resolve import resolve
from ..lora.write import DOTTED
from ..video_models.layer_names import layer_names
from . import folders
from .bridge import Progress, engine
from .lora import chosen, connected_input, file_fingerprint, file_input
from .types import LoraType

SLOTS = 4


class MergeLoras(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        low, high = STRENGTH_RANGE
        inputs: list[io.Input] = []
        for number in range(1, SLOTS + 1):
            inputs.append(file_input(f"lora_file_{number}", folders.CONNECTED))
            inputs.append(
                io.Float.Input(
                    f"weight_{number}",
                    default=1.0,
                    min=low,
                    max=high,
                    step=0.05,
                    display_mode=io.NumberDisplay.slider,
                    tooltip=f"The strength that LoRA {number} has in the merged one, -2 to 2; 0 leaves it out.",
                )
            )
        return io.Schema(
            node_id="RewardLoraMergeLoras",
            display_name="Merge LoRAs",
            category="Reward LoRA/lora",
            description="Makes one LoRA of up to four for the same model, each at a weight. At strength 1 it does what "
            "they do together at these strengths, exactly, unless its rank is reduced.",
            inputs=[
                *inputs,
                io.Int.Input(
                    "rank",
                    default=0,
                    min=0,
                    max=4096,
                    tooltip="The merged LoRA's rank, 1 to 4096: a smaller file, of which the report says how much of "
                    "the change it keeps. 0 keeps the sum of the ranks, and loses nothing.",
                ),
                *(connected_input(f"lora_{number}") for number in range(1, SLOTS + 1)),
            ],
            outputs=[
                LoraType.Output(
                    "lora", display_name="lora", tooltip="For Apply, Save and Sweep, or another Merge LoRAs."
                ),
                io.String.Output("report", display_name="report", tooltip="What was merged, and what of it was kept."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs) -> str:
        return " ".join(file_fingerprint(inputs.get(f"lora_file_{number}")) for number in range(1, SLOTS + 1))

    @classmethod
    def execute(cls, rank: int, **slots: str | float | LoraFile | None) -> io.NodeOutput:
        with engine(), Progress(1, cls.hidden.unique_id) as progress:
            loras, weights = [], []
            for number in range(1, SLOTS + 1):
                file, lora = slots[f"lora_file_{number}"], slots.get(f"lora_{number}")
                if lora is not None or file != folders.CONNECTED:  # else the place is empty
                    loras.append(chosen(file, lora))
                    weights.append(slots[f"weight_{number}"])
            matched, names = resolve(loras, layer_names) if loras else ([], {})
            parts = list(zip(loras, matched, weights, strict=True))
            found, metadata, lines = merge_files(parts, rank, tick=progress)
            modules = {f"{DOTTED}{names[name]}": module for name, module in found.modules.items()}
            offsets = {f"{DOTTED}{names[name]}": offset for name, offset in found.offsets.items()}
            merged = LoraFile(Path(found.source), modules, metadata, (), offsets)
            ranks = ", ".join(map(str, merged.ranks))
            lines = [f"{metadata['merged_from']}: {len(merged.names)} modules of rank {ranks}", *lines]
            report = "\n".join(lines + [f"{lora.path.name}: {note}" for lora in loras for note in lora.notes])
            progress.show(1, text=report)
        return io.NodeOutput(merged, report, ui={"text": [report]})
