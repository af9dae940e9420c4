"""Fetch Published LoRA."""

from __future__ import annotations

import folder_paths
from comfy_api.latest import io

from ..lora.catalog import CATALOG, download, find
from ..lora.files import read_lora
from .bridge import downloading, engine, say
from .types import LoraType


class FetchPublishedLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RewardLoraFetchPublishedLora",
            display_name="Fetch Published LoRA",
            category="Reward LoRA/lora",
            description="Downloads one of the published reward LoRAs into models/loras, unless it is there, and says "
            "which base model it is for and at which strength its publisher shows it.",
            inputs=[
                io.Combo.Input(
                    "name",
                    options=list(CATALOG),
                    default=next(iter(CATALOG)),
                    tooltip="Base model and reward. 90 MB to 3 GB; an interrupted download goes on where it stopped. "
                    "The environment variable HF_ENDPOINT may name a mirror of the hub.",
                )
            ],
            outputs=[
                LoraType.Output("lora", display_name="lora", tooltip="For Apply Reward LoRA and the strength sweep."),
                io.Float.Output("strength", display_name="strength", tooltip="At which its publisher shows it."),
                io.String.Output("about", display_name="about", tooltip="Base model, reward, training, licence."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        node = cls.hidden.unique_id
        with engine():
            entry = find(name)
            path = download(entry, folder_paths.get_folder_paths("loras")[0], downloading(node, megabytes=True))
            lora = read_lora(path).in_memory()
        about = f"{entry.name}: {entry.summary()}"
        say(about, node)
        return io.NodeOutput(lora, entry.strength, about, ui={"text": [about]})
