"""What trainings have left in the output folder: Load Trained LoRA, Training Report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from comfy_api.latest import io
from comfy_execution.graph import ExecutionBlocker
from PIL import Image

from ..lora.files import LoraFile, read_lora
from ..lora.write import DOTTED
from ..training.checkpoint import PATTERN
from ..training.run_loras import checkpoint_loras, checkpoint_steps, saved_loras
from ..video_models import easyanimate_keys, wan_keys
from . import folders
from .bridge import engine, picture_to_image, say
from .types import LoraType

LINKED = "the connected run"
LAST, BEST, CHECKPOINT = "last", "best", "checkpoint"
SPELLINGS = (str, wan_keys.original_module_name, easyanimate_keys.original_module_name)
"""From our module names to the publishers'."""


def run_inputs() -> list[io.Input]:
    """The list of trainings, and a socket instead of it."""
    return [
        io.Combo.Input(
            "run",
            options=[LINKED, *folders.list_runs()],
            default=LINKED,
            tooltip="A training's folder in the output folder, the newest first; press R to see new ones. A run "
            "connected below counts instead.",
        ),
        io.String.Input(
            "connected_run",
            optional=True,
            force_input=True,
            tooltip="From 'run' of Train Reward LoRA; it counts instead of the list.",
        ),
    ]


def chosen_run(run: str, connected_run: str | None) -> Path:
    """The folder of a training. Raises ``ValueError`` if there is none."""
    if not connected_run and run == LINKED:
        raise ValueError("no run is connected; connect 'run' of Train Reward LoRA, or choose one from the list")
    return folders.run_folder(connected_run or run)


class OfARun(io.ComfyNode):
    """A node with :func:`run_inputs`."""

    @classmethod
    def validate_inputs(cls, run: str | None = None) -> bool | str:
        return folders.complaint(folders.run_folder, None if run == LINKED else run)

    @classmethod
    def fingerprint_inputs(cls, run: str = "", **_others) -> str:
        """A training that went on is read again."""
        try:
            files = folders.run_folder(run).glob("*.safetensors")
            return repr(sorted((file.name, file.stat().st_mtime_ns) for file in files))
        except (ValueError, OSError):
            return ""


class LoadTrainedLora(OfARun):
    @classmethod
    def define_schema(cls) -> io.Schema:
        run, connected = run_inputs()
        return io.Schema(
            node_id="RewardLoraLoadTrainedLora",
            display_name="Load Trained LoRA",
            category="Reward LoRA/lora",
            description="Takes a LoRA out of a training's folder: the last one, the one of the best evaluation, or "
            "what a checkpoint holds, so that a training that was cancelled can be tried and compared.",
            inputs=[
                run,
                io.Combo.Input(
                    "which",
                    options=[LAST, BEST, CHECKPOINT],
                    default=LAST,
                    tooltip="last: as the training ended or was cancelled; best: of the evaluation the guards call "
                    "best; checkpoint: of the step below.",
                ),
                io.Int.Input(
                    "step",
                    default=0,
                    min=0,
                    max=100_000,
                    tooltip="Of the checkpoint, 1 to 100000; 0 is the newest. The other two pass over it.",
                ),
                connected,
            ],
            outputs=[
                LoraType.Output("lora", display_name="lora", tooltip="For Apply, Save and Train Reward LoRA."),
                LoraType.Output(
                    "second_lora",
                    display_name="second_lora",
                    tooltip="Of a model with two experts, the low-noise one's LoRA. Nothing comes out otherwise.",
                ),
                io.Int.Output("at_step", display_name="step", tooltip="After how many steps it was saved."),
                io.String.Output("about", display_name="about", tooltip="Base model, reward, rank and step in words."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, run: str, which: str, step: int, connected_run: str | None = None) -> io.NodeOutput:
        with engine():
            folder = chosen_run(run, connected_run)
            loras = _from_checkpoint(folder, step) if which == CHECKPOINT else _from_files(folder, which)
        told = loras[0].metadata
        about = f"{loras[0].path.name}: {told.get('reward')} on {told.get('base_model')}, rank {told.get('rank')}, "
        about += f"after {told.get('step')} steps"
        say(about, cls.hidden.unique_id)
        second = loras[1] if len(loras) > 1 else ExecutionBlocker(None)
        return io.NodeOutput(loras[0], second, int(told.get("step", 0)), about, ui={"text": [about]})


def _from_files(folder: Path, which: str) -> list[LoraFile]:
    files = saved_loras(folder, best=which == BEST)
    if not files and which == BEST:
        raise ValueError(f"{folder.name} has no best LoRA: no evaluation was better than the base model; take the last")
    if not files:
        raise ValueError(f"{folder.name} has no LoRA yet; take a checkpoint")
    return [read_lora(file).in_memory() for file in files]


def _from_checkpoint(folder: Path, step: int) -> list[LoraFile]:
    steps = checkpoint_steps(folder)
    if step and step not in steps or not steps:
        there = f"there are {', '.join(map(str, steps))}" if steps else "there is none"
        wanted = f"no checkpoint of step {step}" if step else "no checkpoint"
        raise ValueError(f"{folder.name} has {wanted}; {there} (keep_checkpoints says how many stay)")
    path = folder / PATTERN.format(step or steps[-1])
    loras, about = checkpoint_loras(path)
    files = []
    for expert, modules in loras.items():
        name_of = _spelling(folder, modules)
        several = {"expert": expert} if len(loras) > 1 else {}
        files.append(LoraFile(path, {f"{DOTTED}{name_of(n)}": m for n, m in modules.items()}, about | several, ()))
    return files


def _spelling(folder: Path, modules: dict) -> Callable[[str], str]:
    """How the publisher spells the modules: as the run's own files do."""
    spelled = {name.removeprefix(DOTTED) for file in saved_loras(folder) for name in read_lora(file).names}
    return next((name_of for name_of in SPELLINGS if spelled and set(map(name_of, modules)) <= spelled), str)


class TrainingReport(OfARun):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RewardLoraTrainingReport",
            display_name="Training Report",
            category="Reward LoRA/training",
            description="Shows what a training in the output folder has reached: the reward curve, samples before and "
            "after, and where its HTML report lies.",
            inputs=run_inputs(),
            outputs=[
                io.Image.Output("picture", display_name="picture", tooltip="The reward curve above the samples."),
                io.String.Output("report", display_name="report", tooltip="Path of the HTML report."),
                io.String.Output("summary", display_name="summary", tooltip="Steps and rewards in words."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, run: str, connected_run: str | None = None) -> io.NodeOutput:
        with engine():
            folder = chosen_run(run, connected_run)
            pictures = [folder / name for name in ("overview.png", "reward.png") if (folder / name).is_file()]
            report = folder / "report.html"
            if not pictures or not report.is_file():
                raise ValueError(f"{folder.name} has no report yet; its first evaluation and its end write it")
            summary = summarise(folder)
        say(summary, cls.hidden.unique_id)
        picture = picture_to_image(np.asarray(Image.open(pictures[0]).convert("RGB")))
        files = folders.listed(report, *saved_loras(folder), *saved_loras(folder, best=True))
        shown = {"images": folders.listed(pictures[0]), "files": files, "text": [summary]}
        return io.NodeOutput(picture, str(report), summary, ui=shown)


def summarise(folder: Path) -> str:
    """How far a training got, and what its evaluations say."""
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines if line.endswith("}")]
    steps = json.loads((folder / "config.json").read_text(encoding="utf-8"))["steps"]
    evaluated = [r for r in records if r.get("evaluation") is not None]
    text = f"{folder.name}: {records[-1]['step'] if records else 0} of {steps} steps"
    if evaluated:
        text += f"; on fixed prompts {evaluated[0]['evaluation']:.4f} -> {evaluated[-1]['evaluation']:.4f}"
    best = [r for r in evaluated if (r.get("guards") or {}).get("best")]
    if best:
        strength = best[-1]["guards"].get("strength", 1.0)
        text += f"; best at step {best[-1]['step']}" + (f", kept at strength {strength:g}" if strength != 1 else "")
    return text + (f"; {records[-1]['stop']}" if records and records[-1].get("stop") else "")
