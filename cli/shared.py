"""What several commands share: devices, LoRAs, rewards and names as a user writes them."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from ..assets import PROMPTS_TRAIN
from ..lora.adapter import LoraUse, check_strength
from ..lora.files import read_lora
from ..reward_models import load_reward
from ..reward_models.protocol import Reward
from ..reward_models.spelling import parse
from ..training.examples import Example, read_examples
from ..video_models import BUILTIN, ModelFiles, load_video_model
from ..video_models.protocol import VideoModel

ROOT = Path(__file__).resolve().parent.parent
DType = Literal["auto", "float32", "bfloat16", "float16"]
VIDEO_MODELS = Path("models/video_models")
"""Where models are found by their name, and downloaded to."""
REWARD_MODELS = Path("models/reward_models")
"""Where rewards' files are found by their published names, and downloaded to."""


def pick_device(name: str) -> str:
    """``auto`` is the GPU if there is one."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except RuntimeError as error:
        raise ValueError(f"device {name} cannot be used ({str(error).splitlines()[0]}); try auto or cpu") from None
    return name


def open_model(
    name: str | ModelFiles,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    download: bool = False,
    text: bool = True,
    search: Sequence[str] = (),
) -> VideoModel:
    """A model by its folder, its files, or its name in ``models/video_models``; a download shows its progress.

    A name is looked for in ``search`` first.

    Raises:
        WeightFileError: It is not there, or cannot be used.
    """
    from tqdm import tqdm

    with tqdm(unit="B", unit_scale=True, desc=str(name), disable=not download, leave=False, delay=1) as bar:
        return load_video_model(
            name,
            dtype=dtype,
            device=device,
            text=text,
            search=[*search, VIDEO_MODELS],
            download=download,
            progress=filling(bar),
        )


def filling(bar: Any) -> Callable[[int, int], None]:
    """What moves a tqdm bar by the bytes done and in total (0 if unknown)."""

    def progress(done: int, total: int) -> None:
        bar.total, bar.n = total or None, done
        bar.refresh()

    return progress


LORA_SPELLING = re.compile(r"(?P<path>.+?)(?::(?P<strength>[^:@/\\]*))?(?:@(?P<where>[^:@/\\]*))?")


def parse_lora(text: str) -> LoraUse:
    """``PATH``, ``PATH:STRENGTH``, or either with where it acts behind an ``@``.

    That is an expert of the model, a part of the walk from noise to video, or both: ``lora.safetensors:0.7@low_noise``,
    ``lora.safetensors:0.7@0.5-1``, ``lora.safetensors@low_noise,0.5-1``.
    """
    if Path(text).is_file():  # also with a colon in its name
        return LoraUse(read_lora(text), 1.0)
    found = LORA_SPELLING.fullmatch(text)
    if found is None:
        raise ValueError("--lora takes PATH or PATH:STRENGTH, got nothing")
    lora, where = read_lora(found["path"]), {}
    for part in filter(None, (found["where"] or "").split(",")):
        window = re.fullmatch(r"([\d.]+)-([\d.]+)", part)
        where |= {"start": float(window[1]), "end": float(window[2])} if window else {"expert": part}
    try:
        strength = float(found["strength"] or 1)
    except ValueError:
        raise ValueError(f"--lora takes PATH or PATH:STRENGTH, got {text}") from None
    return LoraUse(lora, check_strength(strength), **where)


def find_reward(
    text: str, path: Path | None, device: str, *, download: bool = False, search: Sequence[Path] = ()
) -> Reward:
    """A reward or a mixture of rewards, as :mod:`..reward_models.spelling` has it.

    Args:
        text: Names of the table, or of one's own as ``file.py:NAME`` (a class or an object).
        path: Where the reward's files are; of a mixture, the folder that holds those of all, and an option ``path``
            of a term is its own.
        device: Where it computes.
        download: Fetch files that are missing into the first folder of those in which they are looked for.
        search: Where to look for files after ``path``, and before ``models/reward_models``.

    Raises:
        ValueError: It is not spelled well, not known, or its files are not there.
    """
    from tqdm import tqdm

    spelling = parse(text)
    shared = path if spelling.single else None

    def load(name: str, options: Mapping[str, str]) -> Reward:
        own = dict(options)
        where, places = own.pop("path", shared), [*([path] if path else []), *search, REWARD_MODELS]
        if name.rpartition(":")[0].endswith(".py"):
            return _reward_of_ones_own(name)
        with tqdm(unit="B", unit_scale=True, desc=name, disable=not download, leave=False, delay=1) as bar:
            return load_reward(
                name, where, device, options=own, search=places, download=download, progress=filling(bar)
            )

    return spelling.load(load)


def _reward_of_ones_own(name: str) -> Reward:
    file, _, attribute = name.rpartition(":")
    if not Path(file).is_file():
        raise ValueError(f"there is no file {file} to take the reward {attribute} from")
    spec = importlib.util.spec_from_file_location("reward_of_ones_own", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    reward = getattr(module, attribute, None)
    if reward is None:
        raise ValueError(f"{file} defines no {attribute}")
    reward = reward() if isinstance(reward, type) else reward
    if not isinstance(reward, Reward):
        raise ValueError(f"{name} is no reward: it needs name, differentiable, needs and score (see the README)")
    return reward


def plain_name(name: str) -> str:
    """Refuse names that would lead out of the output folder."""
    if not name or name in (".", "..") or any(c in name for c in '/\\:*?"<>|') or name != name.strip():
        raise ValueError(f"the name must be a plain file name without folders, got {name!r}")
    return name


def builtin_or_given(prompts: Path | None, model: str) -> list[Example]:
    """The prompts of a file or folder; without one, those the built-in model is trained on."""
    if prompts is None and model != BUILTIN:
        raise ValueError(
            "give --prompts FILE: a text file with one prompt a line, or a folder of pictures with prompts"
        )
    return read_examples(prompts or PROMPTS_TRAIN)


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
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path.name} is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path.name} must hold settings as `name: value`")
    return data
