"""Every recipe names what exists, and trains three steps on a tiny checkpoint of its model's family."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from reward_lora import files
from reward_lora.cli.shared import read_recipe
from reward_lora.lora.files import read_lora
from reward_lora.reward_models import REWARDS
from reward_lora.reward_models.spelling import parse
from reward_lora.selfcheck.exactness import ToyReward
from reward_lora.tests.families import Case, write_json
from reward_lora.training.config import TrainConfig
from reward_lora.training.examples import Example
from reward_lora.training.trainer import Trainer
from reward_lora.video_models import BASE_MODELS, BUILTIN, load_video_model

RECIPES = sorted(path.stem for path in (Path(files.__file__).parent / "recipes").glob("*.yaml"))
CASES = {
    "Wan2.1-Fun": Case("wan", "2.1 original inp"),
    "Wan2.2-Fun-A14B": Case("wan", "2.2 original i2v pair"),
    "Wan2.2-I2V-A14B": Case("wan", "2.2 original i2v pair"),
    "Wan2.2-T2V-A14B": Case("wan", "2.2 original t2v pair"),
    "Wan2.2-TI2V-5B": Case("wan", "2.2 original ti2v"),
    "CogVideoX-Fun-V1.1-2b": Case("cogvideox", "fun 2b inp"),
    "CogVideoX-Fun-V1.1-5b": Case("cogvideox", "fun 5b inp, sharded"),
    "EasyAnimateV5-": Case("easyanimate", "original v5 inp, sharded"),
    "EasyAnimateV5.1-": Case("easyanimate", "original v5.1 inp"),
    "OpenSora": Case("opensora", "beside each other"),
    "VideoCrafter2": Case("videocrafter", "original"),
    "text-to-video-ms": Case("modelscope", "diffusers"),
}
"""The tiny checkpoint of a published model, by the start of its name."""
PUBLISHED = (
    *(f"{model}{suffix}" for suffix in ("", "-mps") for model in ("wan2.1-fun-1.3b-inp", "wan2.1-fun-14b-inp")),
    *(f"cogvideox-fun-v1.1-{size}-inp{suffix}" for suffix in ("", "-mps") for size in ("2b", "5b")),
    *(f"easyanimate-v5-{size}-inp{suffix}" for suffix in ("", "-mps") for size in ("7b", "12b")),
    *("videocrafter2", "videocrafter2-pickscore", "opensora-1.2", "modelscope", "wan2.2-i2v-a14b-face"),
)


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    """A tiny model by the name of the real one, each loaded once."""
    loaded = {}

    def find(name):
        if name == BUILTIN:
            return load_video_model(BUILTIN), (32, 32, 5)
        case = next(case for start, case in CASES.items() if name.startswith(start))
        if str(case) not in loaded:
            folder = tmp_path_factory.mktemp("models") / "model"
            case.write(folder)
            if name == "Wan2.2-T2V-A14B":  # as its recipe tells the user
                write_json(folder / "reward_lora.json", {"shift": 5.0})
            loaded[str(case)] = load_video_model(case.source(folder), dtype="float32")
        return loaded[str(case)], case.size

    return find


def test_every_published_training_has_its_recipe():
    assert set(PUBLISHED) <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_names_a_known_model_and_reward(name):
    recipe = read_recipe(name)
    assert recipe.keys() == {"about", "model", "reward", "config"}
    assert recipe["model"] == BUILTIN or recipe["model"] in BASE_MODELS
    for term in parse(recipe["reward"]).terms:
        REWARDS[term.name].settle(term.name, term.options)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_three_steps_on_its_family(name, model_of, tmp_path):
    """With its schedule, targets, experts, guidance and objective. Other than there: the model is tiny and random, the
    video small and short, a toy reward stands for the judge's weights, the solver makes 10 steps at most, one batch of
    one video is a step, and the LoRA has rank 2."""
    recipe = read_recipe(name)
    model, (width, height, frames) = model_of(recipe["model"])
    published = TrainConfig.from_dict(recipe["config"])
    config = replace(
        published, steps=3, batch_size=1, accumulation=1, rank=2, width=width, height=height, frames=frames,
        sampler_steps=min(published.sampler_steps, 10), sample_every=0, save_dtype="float32",
    )  # fmt: skip
    image = torch.rand(3, 1, height, width, generator=torch.Generator().manual_seed(0))
    example = Example("a red circle", start_image=image) if recipe["reward"] == "face" else "a red circle"
    trainer = Trainer(model, ToyReward(), [example], config, tmp_path / "run")
    events = list(trainer)[1:]
    assert [event.skipped for event in events] == ["", "", ""]
    assert all(event.grad_norm > 0 for event in events)
    assert set(trainer.lora_paths) == set(config.experts or model.spec.experts)
    for path in trainer.lora_paths.values():
        assert any(float(part.up.abs().max()) > 0 for part in read_lora(path).modules.values())
