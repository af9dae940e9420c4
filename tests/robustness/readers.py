"""Everything that reads what a user hands us, with valid files to spoil."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import open_clip
import torch
from PIL import Image
from reward_lora import assets
from reward_lora.cli.clips import read_prompt_table
from reward_lora.cli.shared import read_recipe
from reward_lora.lora.files import read_lora
from reward_lora.reward_models import hps, load_reward
from reward_lora.selfcheck.exactness import ToyReward, tiny_wan
from reward_lora.tests.families import cases
from reward_lora.tests.reward_checkpoints import OPEN_CLIP, write_all
from reward_lora.training.config import TrainConfig
from reward_lora.training.examples import read_examples
from reward_lora.training.media import read_frames, write_video
from reward_lora.training.schedule import BackpropSchedule
from reward_lora.training.trainer import Trainer
from reward_lora.video_models import load_video_model

from .fuzz import Reader

FIXTURES = Path(__file__).parents[1] / "fixtures"
FRAMES = torch.rand(3, 5, 16, 16, generator=torch.Generator().manual_seed(0))
TRAINING = TrainConfig(
    steps=2, rank=1, sample_every=0, save_every=1, backprop=BackpropSchedule("last"), lr_schedule="constant"
)


def readers(quick: bool) -> list[Reader]:
    """All; with ``quick`` the slow ones stay out."""
    return [*_plain(), *([] if quick else [*_rewards(), _checkpoint(), *_models()])]


def _plain() -> Iterator[Reader]:
    yield Reader("LoRA, safetensors", _loras, ["*.safetensors"], _each(read_lora, "*.safetensors"))
    yield Reader("LoRA, pickle", _pickled_lora, ["*.pt"], _each(read_lora, "*.pt"))
    yield Reader("prompts, .txt and .jsonl", _prompts, ["*.txt", "*.jsonl"], _each(read_examples, "*.txt", "*.jsonl"))
    yield Reader("metadata.csv", _table, ["*.csv"], read_examples)
    yield Reader("prompts of clips, .csv", _prompt_table, ["*.csv"], lambda folder: read_prompt_table(folder / "p.csv"))
    yield Reader("recipes", _recipe, ["*.yaml"], lambda folder: _use_recipe(folder / "recipe.yaml"))
    yield Reader("pictures", _pictures, ["*"], _each(_frames, "*"))
    yield Reader("videos", _video, ["*"], _each(_frames, "*"))


def _each(read, *patterns: str):
    def run(folder: Path) -> None:
        for pattern in patterns:
            for path in sorted(folder.glob(pattern)):
                read(path)

    return run


def _frames(path: Path) -> None:
    for _ in islice(read_frames(path), 50):
        pass


def _loras(folder: Path) -> None:
    folder.mkdir()
    shutil.copy(Path(assets.__file__).parent / "tiny_reward_lora.safetensors", folder / "ours.safetensors")
    shutil.copy(FIXTURES / "wan_train_step" / "lora_videox_fun.safetensors", folder / "kohya.safetensors")


def _pickled_lora(folder: Path) -> None:
    folder.mkdir()
    start = "base_model.model.spatial_blocks.0.attn.qkv"
    weights = {f"{start}.lora_A.weight": torch.ones(2, 4), f"{start}.lora_B.weight": torch.ones(4, 2)}
    torch.save(weights, folder / "zip.pt")
    torch.save(weights, folder / "old.pt", _use_new_zipfile_serialization=False)


def _prompts(folder: Path) -> None:
    folder.mkdir()
    (folder / "a.txt").write_text("a red circle\n\na blue square, moving\n", encoding="utf-8")
    Image.new("RGB", (8, 8)).save(folder / "start.png")
    rows = [{"prompt": "a"}, {"prompt": "b", "start_image": "start.png"}]
    (folder / "b.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def _table(folder: Path) -> None:
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "start.png")
    (folder / "metadata.csv").write_text('image,prompt\nstart.png,"a, b"\nstart.png,c\n', encoding="utf-8")


def _prompt_table(folder: Path) -> None:
    folder.mkdir()
    (folder / "p.csv").write_text("file,prompt\na.mp4,one\nb.mp4,two\n", encoding="utf-8")


def _recipe(folder: Path) -> None:
    folder.mkdir()
    (folder / "recipe.yaml").write_text("model: builtin\nconfig:\n  steps: 3\n  learning_rate: 1.0e-4\n"
                                        "  backprop: {strategy: tail}\n  objective: {target: 1.0}\n")  # fmt: skip


def _use_recipe(path: Path) -> None:
    TrainConfig.from_dict(read_recipe(str(path)).get("config", {}))


def _pictures(folder: Path) -> None:
    folder.mkdir()
    for ending in ("png", "jpg", "webp", "bmp"):
        Image.effect_noise((16, 16), 50).convert("RGB").save(folder / f"a.{ending}")


def _video(folder: Path) -> None:
    folder.mkdir()
    write_video(folder / "a.mp4", FRAMES, 8)


def _rewards() -> Iterator[Reader]:
    files = {
        "hps_v2.1": ["HPS_v2.1*"],
        "mps": ["MPS*", "CLIP-ViT*/*.json"],
        "aesthetic_v2": ["sac*", "clip-vit*/*"],
        "aesthetic_v2.5": ["aesthetic_predictor*", "siglip*/*"],
        "pickscore": ["PickScore*/*", "CLIP-ViT*/*.json"],
    }
    for name, patterns in files.items():
        yield Reader(f"reward {name}", write_all, patterns, lambda folder, name=name: _load_reward(name, folder))


def _load_reward(name: str, folder: Path) -> None:
    with _tiny_hps(folder):
        load_reward(name, folder)


@contextmanager
def _tiny_hps(folder: Path) -> Iterator[None]:
    before, config = hps.ARCHITECTURE, folder.with_name("robust-tiny-clip.json")
    if not config.exists():
        config.write_text(json.dumps(OPEN_CLIP))
        open_clip.add_model_config(config)
    hps.ARCHITECTURE = config.stem
    try:
        yield
    finally:
        hps.ARCHITECTURE = before


def _checkpoint() -> Reader:
    model = tiny_wan(dtype=torch.float32)
    model.encode_text = lambda prompts: [torch.ones(3, 8) for _ in prompts]

    def train(folder: Path) -> None:
        for _ in Trainer(model, ToyReward(), ["a"], TRAINING, folder / "run"):
            pass

    return Reader("checkpoints", train, ["run/checkpoint-*", "run/*.json", "run/*.jsonl"], train)


def _models() -> Iterator[Reader]:
    kinds = {(case.family, re.search("[a-z]+", case.layout)[0]): case for case in cases()}  # of layout: its first word
    for case in kinds.values():

        def read(folder: Path, case=case) -> None:
            load_video_model(case.source(folder), dtype="float32", text=False)

        patterns = ["**/*.json", "**/*.safetensors", "**/*.pth", "**/*.ckpt"]
        yield Reader(f"model, {case}", case.write, patterns, read)
