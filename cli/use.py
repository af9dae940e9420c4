"""Using models and LoRAs from the command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import UseAppendAction

from ..lora.adapter import applied
from ..training.prompts import read_prompts
from ..video_models import BUILTIN
from .shared import DType, open_model, parse_lora, pick_device


@dataclass
class Generate:
    """Sample videos, with or without LoRAs.

    Attributes:
        prompt: What to show; may be repeated.
        prompts: Text file, one prompt a line.
        output_dir: Where the videos go; one that is there already stays.
        model: A folder with a video model, the name of one in `models/video_models`, or `builtin`.
        download: Fetch the model into `models/video_models` if it is a published one that is not there.
        lora: PATH or PATH:STRENGTH, strength -2..2; may be repeated. Behind an @ may stand where it acts: an expert,
            a part of the walk, or both, as in PATH:0.7@low_noise,0.5-1.
        negative_prompt: What guidance leads away from.
        width: Pixels; 0 takes the model's default.
        height: Pixels; 0 takes the model's default.
        frames: 0 takes the model's default.
        steps: Solver steps; 0 takes the model's default.
        guidance_scale: 0 takes the model's default, 1 turns guidance off.
        guidance_interval: Noise levels, above the first and up to the second of 0..1, at which guidance works, as a
            training may have them. 0 1 is everywhere.
        seed: The n-th video gets seed + n.
        start_image: First frame, for models that take one.
        end_image: Last frame, for models that take one.
        device: `auto`, `cpu`, `cuda`, `cuda:1`.
        dtype: Number type of the model.
    """

    prompt: UseAppendAction[tuple[str, ...]] = ()
    prompts: Path | None = None
    output_dir: Path = Path("outputs")
    model: str = BUILTIN
    download: bool = False
    lora: UseAppendAction[tuple[str, ...]] = ()
    negative_prompt: str = ""
    width: int = 0
    height: int = 0
    frames: int = 0
    steps: int = 0
    guidance_scale: float = 0.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    seed: int = 0
    start_image: Path | None = None
    end_image: Path | None = None
    device: str = "auto"
    dtype: DType = "auto"

    def run(self) -> int:
        from ..training.media import read_video, write_video
        from ..training.sample import sample_prompt

        prompts = [*self.prompt, *(read_prompts(self.prompts) if self.prompts else ())]
        if not prompts:
            raise ValueError('give --prompt "..." or --prompts FILE')
        uses = [parse_lora(text) for text in self.lora]
        images = {
            key: read_video(path, 1)[None, :, 0]
            for key, path in (("start_image", self.start_image), ("end_image", self.end_image))
            if path
        }
        model = open_model(self.model, dtype=self.dtype, device=pick_device(self.device), download=self.download)
        with applied(model, uses) as reports:
            print("\n".join(reports), end="\n" if reports else "")
            for index, prompt in enumerate(prompts):
                frames = sample_prompt(
                    model,
                    prompt,
                    self.seed + index,
                    negative_prompt=self.negative_prompt,
                    width=self.width,
                    height=self.height,
                    frames=self.frames,
                    steps=self.steps,
                    guidance_scale=self.guidance_scale,
                    guidance_interval=self.guidance_interval,
                    **images,
                )
                path = _unused(self.output_dir / f"video-{index:03d}-seed-{self.seed + index}.mp4")
                print(write_video(path, frames[0], model.spec.fps), "|", prompt)
        return 0


def _unused(path: Path) -> Path:
    """The path, or with the first number from 2 on behind its name that no file has."""
    found, count = path, 1
    while found.exists():
        count += 1
        found = path.with_stem(f"{path.stem}-{count}")
    return found


@dataclass
class Selfcheck:
    """Prove on this machine that the engine is right; exit status 1 if it is not.

    Replay is compared with one autograd graph in float64, and our numbers with those in fixture folders.

    Attributes:
        fixtures: Folders to walk for fixtures (meta.json and safetensors).
        parts: Print every part of every fixture.
    """

    fixtures: tuple[Path, ...] = ()
    parts: bool = False

    def run(self) -> int:
        from ..selfcheck import run

        failed = 0
        for line in run(self.fixtures, parts=self.parts):
            print(line, flush=True)
            failed += line.failed
        print("everything agrees" if not failed else f"{failed} FAILED")
        return 1 if failed else 0
