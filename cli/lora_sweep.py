"""The strength sweep from the command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional, UseAppendAction

from ..assets import PROMPTS_TEST
from ..files import write_text
from ..reward_models.judging import table
from ..training.prompts import read_prompts
from ..video_models import BUILTIN
from .shared import DType, find_reward, open_model, parse_lora, pick_device


@dataclass
class Sweep:
    """Find the strength to use a LoRA at: paints the same prompts and seeds at many strengths, and judges them.

    Writes `sweep.csv`, `sweep.png` (gains with intervals, motion) and `videos.png` (a row a strength), and prints the
    table and the recommended strength with its reason.

    Attributes:
        lora: The LoRA; `PATH@EXPERT`, `PATH@0.5-1` say where it acts.
        output_dir: Where the files go.
        model: A folder with a video model, or `builtin`.
        reward: The judge the LoRA was trained towards.
        also: A reward it was not trained towards; may be repeated. Those decide, if there are any.
        download: Fetch the model and files of rewards that are missing.
        reward_path: Of the judge's files; for several rewards, the folder that holds the files of all.
        strengths: In -2..2; 0 is always among them.
        prompt: What to show; may be repeated. Best such that the LoRA was not trained on.
        prompts: Text file, one prompt a line.
        max_prompts: How many prompts of the file, the first ones; 0 is all.
        seeds: Videos a prompt.
        seed: Source of all chance.
        motion_floor: Share of the base model's motion that must be left, 0..1.
        keep: LoRA that stays applied, PATH or PATH:STRENGTH; may be repeated.
        negative_prompt: What guidance leads away from.
        width: Pixels; 0 takes the model's default.
        height: Pixels; 0 takes the model's default.
        frames: 0 takes the model's default.
        steps: Solver steps; 0 takes the model's default.
        guidance_scale: 0 takes the model's default, 1 turns guidance off.
        batch_size: Videos painted together.
        shown: How many videos the picture shows.
        device: `auto`, `cpu`, `cuda`, `cuda:1`.
        dtype: Number type of the model.
    """

    lora: Positional[str]
    output_dir: Path = Path("outputs/sweep")
    model: str = BUILTIN
    reward: str = "tiny_clip"
    also: UseAppendAction[tuple[str, ...]] = ()
    download: bool = False
    reward_path: Path | None = None
    strengths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
    prompt: UseAppendAction[tuple[str, ...]] = ()
    prompts: Path | None = None
    max_prompts: int = 64
    seeds: int = 1
    seed: int = 42
    motion_floor: float = 0.75
    keep: UseAppendAction[tuple[str, ...]] = ()
    negative_prompt: str = ""
    width: int = 0
    height: int = 0
    frames: int = 0
    steps: int = 0
    guidance_scale: float = 0.0
    batch_size: int = 1
    shown: int = 4
    device: str = "auto"
    dtype: DType = "auto"

    def run(self) -> int:
        from tqdm import tqdm

        from ..training.gradient import silent
        from ..training.media import write_png
        from ..training.memory import Placement, plan_for
        from ..training.sweep import SweepConfig, gathered, run_sweep
        from ..training.sweep_report import sweep_csv, sweep_plot, sweep_rows, sweep_sheet

        names = SweepConfig.__dataclass_fields__.keys() - {"prompts"}
        config = SweepConfig(**{name: getattr(self, name) for name in names}, prompts=self._prompts())
        use, kept = parse_lora(self.lora), [parse_lora(text) for text in self.keep]
        device = pick_device(self.device)
        judge, *others = (
            find_reward(name, self.reward_path, device, download=self.download) for name in (self.reward, *self.also)
        )
        model = open_model(self.model, dtype=self.dtype, device=device, download=self.download)
        print("\n".join(use.check(model)))
        tick = Placement(model, None, silent, plan_for("auto", model), model.device)  # the text encoder leaves
        painting = run_sweep(model, use, config, judge, others, kept=kept, tick=tick)
        points = []
        for point in tqdm(painting, total=len(config.strengths), unit="strength"):
            points.append(point)
            sweep = gathered(config, points)
            files = (  # written anew after every strength, so that a sweep that is stopped has not been for nothing
                write_text(self.output_dir / "sweep.csv", sweep_csv(sweep)),
                write_png(self.output_dir / "sweep.png", sweep_plot(sweep)),
                write_png(self.output_dir / "videos.png", sweep_sheet(sweep)),
            )
        print(table(*sweep_rows(sweep)), *files, sweep.reason(), sep="\n")
        return 0

    def _prompts(self) -> tuple[str, ...]:
        if self.prompts is None and self.prompt:
            return self.prompt
        if self.prompts is None and self.model != BUILTIN:
            raise ValueError('give --prompt "..." or --prompts FILE: a text file with one prompt a line')
        read = read_prompts(self.prompts or PROMPTS_TEST)
        return (*self.prompt, *read[: self.max_prompts or None])
