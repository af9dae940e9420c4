"""Using models, rewards and LoRAs from the command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from tyro.conf import Positional, UseAppendAction

from ..lora.adapter import applied, linear_shapes
from ..lora.files import match, read_lora
from ..training.prompts import read_prompts
from ..video_models import BUILTIN, load_video_model
from .shared import DType, find_reward, parse_lora, pick_device


@dataclass
class Generate:
    """Sample videos, with or without LoRAs.

    Attributes:
        prompt: What to show; may be repeated.
        prompts: Text file, one prompt a line.
        output_dir: Where the videos go.
        model: A folder with a video model, or `builtin`.
        lora: PATH or PATH:STRENGTH, strength -2..2; may be repeated.
        negative_prompt: What guidance leads away from.
        width: Pixels; 0 takes the model's default.
        height: Pixels; 0 takes the model's default.
        frames: 0 takes the model's default.
        steps: Solver steps; 0 takes the model's default.
        guidance_scale: 0 takes the model's default, 1 turns guidance off.
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
    lora: UseAppendAction[tuple[str, ...]] = ()
    negative_prompt: str = ""
    width: int = 0
    height: int = 0
    frames: int = 0
    steps: int = 0
    guidance_scale: float = 0.0
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
        model = load_video_model(self.model, dtype=self.dtype, device=pick_device(self.device))
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
                    **images,
                )
                path = self.output_dir / f"video-{index:03d}-seed-{self.seed + index}.mp4"
                print(write_video(path, frames[0], model.spec.fps), "|", prompt)
        return 0


@dataclass
class Score:
    """Score videos or pictures with a reward.

    Attributes:
        files: Videos or pictures.
        prompt: What they should show; one for all, or one a file.
        reward: A name, or your own as `file.py:NAME`.
        reward_path: Folder of the reward model's files.
        device: `auto`, `cpu`, `cuda`, `cuda:1`.
    """

    files: Positional[tuple[Path, ...]]
    prompt: UseAppendAction[tuple[str, ...]] = ()
    reward: str = "tiny_clip"
    reward_path: Path | None = None
    device: str = "auto"

    def run(self) -> int:
        from ..training.media import read_video

        if not self.files:
            raise ValueError("give at least one video or picture")
        reward = find_reward(self.reward, self.reward_path, pick_device(self.device))
        prompts = list(self.prompt) or [""]
        if len(prompts) == 1:
            prompts *= len(self.files)
        if len(prompts) != len(self.files):
            raise ValueError(f"give one --prompt, or one a file: {len(self.files)} files, {len(prompts)} prompts")
        if "prompt" in reward.needs and not self.prompt:
            raise ValueError(f'the reward {reward.name} needs --prompt "..."')
        for path, prompt in zip(self.files, prompts, strict=True):
            with torch.no_grad():
                value = reward.score(read_video(path)[None], [prompt])
            print(f"{float(value):.6f}  {path}")
        return 0


@dataclass
class Inspect:
    """Say what is in a LoRA file and, given a model, whether it fits.

    Attributes:
        file: The LoRA.
        model: A folder with a video model, or `builtin`; nothing skips the comparison.
    """

    file: Positional[Path]
    model: str = ""

    def run(self) -> int:
        lora = read_lora(self.file)
        scales = sorted({module.alpha / module.rank for module in lora.modules.values()})
        print(f"modules: {len(lora.modules)}\nkeys begin with: {lora.prefix or 'the module names'}")
        print(f"ranks: {', '.join(map(str, lora.ranks))}\nalpha / rank: {', '.join(f'{s:g}' for s in scales)}")
        for key, value in sorted(lora.metadata.items()):
            print(f"{key}: {value}")
        if lora.other_keys:
            print(f"other keys: {len(lora.other_keys)}, such as {lora.other_keys[0]}")
        if self.model:
            model = load_video_model(self.model, text=False)
            for expert, network in model.denoisers.items():
                print(match(lora, model.lora_names(expert), linear_shapes(network)).report())
        return 0


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
