"""Prompts."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import folder_paths
from comfy_api.latest import io, ui

from ..training.examples import read_examples
from ..training.wildcards import Order, draw
from . import folders
from .bridge import engine, say
from .types import split_lines

WILDCARDS = "wildcards"


class Prompts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RewardLoraPrompts",
            display_name="Prompts",
            category="Reward LoRA/prompts",
            description="A list of prompts, written here or read from a file, in sequence or drawn at random, with "
            "wildcards: {red|blue} is one of the two, and __shape__ a line of input/wildcards/shape.txt.",
            inputs=[
                io.String.Input(
                    "text",
                    multiline=True,
                    default="",
                    placeholder="prompts, one a line; {red|blue} and __shape__ are wildcards",
                    tooltip="Prompts, one a line. {red|blue} is one of the two; __shape__ is a line of shape.txt in "
                    "the folder 'wildcards' of the input folder.",
                ),
                io.String.Input(
                    "file",
                    default="",
                    tooltip="More prompts, by a path or its name in the input folder: a .txt (one a line), a .jsonl, "
                    "or a folder whose prompts lie beside its pictures. 'builtin' and 'builtin_test' hold those of the "
                    "built-in model's world.",
                ),
                io.Combo.Input(
                    "order",
                    options=list(get_args(Order)),
                    default="sequential",
                    tooltip="sequential begins at line 'seed', counted from 0; random shuffles, and takes no line "
                    "twice before it has taken all.",
                ),
                io.Int.Input(
                    "count",
                    default=0,
                    min=0,
                    max=100_000,
                    tooltip="How many prompts to draw, 1 to 100000; 0 is as many as there are lines.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**63 - 1,
                    control_after_generate=False,
                    tooltip="Where a sequence begins, and the source of all chance; 0 to 2^63 - 1.",
                ),
            ],
            outputs=[
                io.String.Output(
                    "prompts", display_name="prompts", tooltip="All of them, one a line: for Train Reward LoRA."
                ),
                io.String.Output(
                    "each",
                    display_name="each",
                    is_output_list=True,
                    tooltip="One after the other: what follows, such as Generate Video, runs once for each.",
                ),
                io.Int.Output("number", display_name="number", tooltip="How many prompts there are."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str = "", **_others) -> str:
        """Files that were edited are read again."""
        used = [folders.fingerprint(_wildcards())]
        return " ".join([*used, folders.fingerprint(folders.prompt_path(file))] if file.strip() else used)

    @classmethod
    def execute(cls, text: str, file: str, order: str, count: int, seed: int) -> io.NodeOutput:
        with engine():
            lines = split_lines(text)
            if file.strip():
                lines += [example.prompt for example in read_examples(folders.prompt_path(file))]
            drawn = draw(lines, order, seed, count, _wildcards())
        shown = "\n".join(drawn)
        say(f"{len(drawn)} prompts", cls.hidden.unique_id)
        return io.NodeOutput(shown, drawn, len(drawn), ui=ui.PreviewText(shown))


def _wildcards() -> Path:
    return Path(folder_paths.get_input_directory(), WILDCARDS)
