"""The command line: train, generate, score, inspect, selfcheck. The same engine the nodes drive."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from tyro.conf import Positional, UseAppendAction

from .lora.adapter import LoraUse, applied, check_strength, linear_shapes
from .lora.files import match, read_lora
from .reward_models import load_reward
from .training.config import TrainConfig
from .training.prompts import read_prompts
from .video_models import BUILTIN, load_video_model

ROOT = Path(__file__).resolve().parent
DType = Literal["auto", "float32", "bfloat16", "float16"]


def pick_device(name: str) -> str:
    """``auto`` is the GPU if there is one."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except RuntimeError as error:
        raise ValueError(f"device {name} cannot be used ({str(error).splitlines()[0]}); try auto or cpu") from None
    return name


def parse_lora(text: str) -> LoraUse:
    """``path`` or ``path:strength``."""
    path, _, strength = text.rpartition(":")
    if path:
        try:
            return LoraUse(read_lora(path), check_strength(float(strength)))
        except ValueError as error:
            if Path(path).exists():  # otherwise the colon was part of the path
                if "could not convert" in str(error):
                    raise ValueError(f"--lora takes PATH or PATH:STRENGTH, got {text}") from None
                raise
    return LoraUse(read_lora(text), 1.0)


def plain_name(name: str) -> str:
    """Refuse names that would lead out of the output folder."""
    if not name or name in (".", "..") or any(c in name for c in '/\\:*?"<>|') or name != name.strip():
        raise ValueError(f"the name must be a plain file name without folders, got {name!r}")
    return name


def builtin_or_given(prompts: Path | None, model: str) -> list[str]:
    if prompts is None and model != BUILTIN:
        raise ValueError("give --prompts FILE: a text file with one prompt a line")
    return read_prompts(prompts or ROOT / "assets" / "prompts_train.txt")


@dataclass
class Train:
    """Train a reward LoRA by reward backpropagation.

    Run it again with the same settings to go on from the last checkpoint. Ctrl-C stops, and loses nothing.

    Attributes:
        name: Of the run and of the LoRA it writes.
        output_dir: The run's folder is made in here.
        model: A folder with a video model, or `builtin`, the tiny one that ships with the pack.
        reward: What the LoRA should make better.
        reward_path: Folder of the reward model's files.
        prompts: Text file, one prompt a line, or .jsonl with `prompt`.
        sample_prompts: Prompts for the evaluations on fixed seeds; the first training prompts if not given.
        recipe: A recipe's name or YAML file: settings that other flags then change.
        lora: LoRA to keep applied while training, PATH or PATH:STRENGTH; may be repeated.
        device: `auto`, `cpu`, `cuda`, `cuda:1`.
        dtype: Number type of the frozen model.
        fresh: Begin anew although the folder holds a run; its checkpoints are deleted.
        config: The settings of the run.
    """

    name: str = "reward-lora"
    output_dir: Path = Path("outputs")
    model: str = BUILTIN
    reward: str = "tiny_clip"
    reward_path: Path | None = None
    prompts: Path | None = None
    sample_prompts: Path | None = None
    recipe: str = ""
    lora: UseAppendAction[tuple[str, ...]] = ()
    device: str = "auto"
    dtype: DType = "auto"
    fresh: bool = False
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)

    def run(self) -> int:
        from contextlib import closing

        from tqdm import tqdm

        from .training.trainer import Trainer

        prompts = builtin_or_given(self.prompts, self.model)
        sample_prompts = read_prompts(self.sample_prompts) if self.sample_prompts else ()
        folder = self.output_dir / plain_name(self.name)
        uses = [parse_lora(text) for text in self.lora]
        device = pick_device(self.device)
        reward = load_reward(self.reward, self.reward_path, device)
        model = load_video_model(self.model, dtype=self.dtype, device=device)
        if self.fresh:
            delete_checkpoints(folder)
        with applied(model, uses) as reports:
            for line in reports:
                print(line)
            trainer = Trainer(model, reward, prompts, self.config, folder, sample_prompts=sample_prompts,
                              cache=self.output_dir / "text-cache")  # fmt: skip
            print(f"{trainer.config.steps} steps of {model.spec.name} towards {reward.name}, files in {folder}")
            with tqdm(total=trainer.config.steps, unit="step") as bar, closing(iter(trainer)) as events:
                try:
                    for event in events:
                        bar.n = event.step
                        bar.set_postfix_str(describe(event))
                        if event.evaluation:
                            bar.write(
                                f"step {event.step}: reward {event.evaluation.reward:.4f} on fixed prompts and seeds"
                            )
                        if event.skipped:
                            bar.write(f"step {event.step} skipped: {event.skipped}")
                except KeyboardInterrupt:
                    bar.close()
                    print(f"\nstopped; run the same command to go on. LoRA so far: {trainer.lora_path}")
                    return 130
        print(f"LoRA: {trainer.lora_path}\ncurve: {folder / 'reward.png'}\nvideos: {folder / 'samples'}")
        return 0


def describe(event: Any) -> str:
    return (
        f"reward {event.reward:.4f}, gradient {event.grad_norm:.2e}, "
        f"{event.seconds:.1f} s, {event.memory / 2**30:.2f} GiB"
    )


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
        from .training.media import read_video, write_video
        from .training.sample import sample_prompt

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
        reward: Name of the reward.
        reward_path: Folder of the reward model's files.
        device: `auto`, `cpu`, `cuda`, `cuda:1`.
    """

    files: Positional[tuple[Path, ...]]
    prompt: UseAppendAction[tuple[str, ...]] = ()
    reward: str = "tiny_clip"
    reward_path: Path | None = None
    device: str = "auto"

    def run(self) -> int:
        from .training.media import read_video

        if not self.files:
            raise ValueError("give at least one video or picture")
        reward = load_reward(self.reward, self.reward_path, pick_device(self.device))
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
        from .selfcheck import run

        failed = 0
        for line in run(self.fixtures, parts=self.parts):
            print(line, flush=True)
            failed += line.failed
        print("everything agrees" if not failed else f"{failed} FAILED")
        return 1 if failed else 0


@dataclass
class Demo:
    """Train a reward LoRA on the built-in model and show what it changed on unseen prompts.

    Attributes:
        output_dir: The folder `quickstart` is made in here.
        unseen: How many prompts that are never trained on to judge before and after.
        steps: Optimiser steps; 0 takes the recipe's.
        seed: Source of all chance.
        device: `auto`, `cpu`, `cuda`, `cuda:1`.
        resume: Go on from the checkpoint of an earlier demonstration instead of beginning anew.
    """

    output_dir: Path = Path("outputs")
    unseen: int = 128
    steps: int = 0
    seed: int = 42
    device: str = "auto"
    resume: bool = False

    def run(self) -> int:
        from .demo import run

        data = read_recipe("builtin")["config"] | {"seed": self.seed}
        if self.steps:
            data["steps"] = self.steps
        folder = self.output_dir / "quickstart"
        if not self.resume:
            delete_checkpoints(folder)
        return run(TrainConfig.from_dict(data), folder, pick_device(self.device), self.unseen)


def delete_checkpoints(folder: Path) -> None:
    from .training.checkpoint import list_checkpoints

    for path in list_checkpoints(folder):
        path.unlink()


COMMANDS = {
    "demo": Demo,
    "train": Train,
    "generate": Generate,
    "score": Score,
    "inspect": Inspect,
    "selfcheck": Selfcheck,
}


def read_recipe(name: str) -> dict[str, Any]:
    """Settings of a recipe that ships with the pack, or of a YAML file."""
    import yaml

    shipped = ROOT / "recipes" / f"{name}.yaml"
    path = shipped if shipped.is_file() else Path(name)
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in shipped.parent.glob("*.yaml")))
        raise ValueError(f"no recipe {name!r}: give a YAML file or one of {known}")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path.name} is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path.name} must hold settings as `name: value`")
    return data


def _recipe_argument(arguments: Sequence[str]) -> str:
    for index, argument in enumerate(arguments):
        if argument == "--recipe":
            return arguments[index + 1] if index + 1 < len(arguments) else ""
        if argument.startswith("--recipe="):
            return argument.partition("=")[2]
    return ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, 1 failed, 2 bad input, 130 interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        if not arguments or arguments[0] not in COMMANDS:
            print(__doc__, *(f"  {name:10} {c.__doc__.splitlines()[0]}" for name, c in COMMANDS.items()), sep="\n")
            print("\nreward-lora COMMAND --help tells the rest.")
            return 0 if arguments in ([], ["--help"], ["-h"]) else 2
        command, rest = COMMANDS[arguments[0]], arguments[1:]
        default = None
        if command is Train and (recipe := _recipe_argument(rest)):
            data = read_recipe(recipe)
            default = Train(config=TrainConfig.from_dict(data.pop("config", {})), recipe=recipe, **_checked(data))
        return tyro.cli(command, args=rest, default=default, prog=f"reward-lora {arguments[0]}").run()
    except (ValueError, RuntimeError, OSError) as error:
        if logging.getLogger().isEnabledFor(logging.DEBUG):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _checked(data: dict[str, Any]) -> dict[str, Any]:
    allowed = ("model", "reward", "dtype")
    unknown = sorted(set(data) - {*allowed, "config", "about"})
    if unknown:
        raise ValueError(f"unknown recipe entry {unknown[0]!r}; known are about, config, {', '.join(allowed)}")
    return {key: value for key, value in data.items() if key in allowed}
