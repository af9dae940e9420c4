"""The whole road on the built-in model: base, training, LoRA, and prompts that were never trained on."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import torch
from reward_lora import files
from reward_lora.assets import PROMPTS_TEST, PROMPTS_TRAIN
from reward_lora.cli.shared import read_recipe
from reward_lora.demo import examine
from reward_lora.lora.adapter import LoraUse, applied
from reward_lora.lora.files import read_lora
from reward_lora.reward_models import load_reward
from reward_lora.training.config import TrainConfig
from reward_lora.training.prompts import read_prompts
from reward_lora.training.trainer import Trainer
from reward_lora.video_models import load_video_model

BATCH = 32
SHIPPED = Path(files.__file__).parent / "assets" / "tiny_reward_lora.safetensors"


@pytest.fixture(scope="module")
def model():
    return load_video_model("builtin")


@pytest.fixture(scope="module")
def reward():
    return load_reward("tiny_clip")


@pytest.fixture(scope="module")
def unseen():
    test, train = read_prompts(PROMPTS_TEST), read_prompts(PROMPTS_TRAIN)
    assert len(test) >= 128
    assert not set(test) & set(train)
    return test


@pytest.fixture(scope="module")
def base(model, reward, unseen):
    return examine(model, reward, unseen, batch=BATCH)


def gain(report, base, key):
    return float((report.accuracy[key].float() - base.accuracy[key].float()).mean())


def check_repair(model, reward, unseen, base, lora):
    """The contract of a good reward LoRA, paired with the base on prompts it never saw."""
    reports = {}
    for strength, prompts in ((0.0, unseen[:BATCH]), (0.5, unseen), (1.0, unseen)):
        with applied(model, [LoraUse(lora, strength)]):
            reports[strength] = examine(model, reward, prompts, batch=BATCH)
    full, half = reports[1.0], reports[0.5]
    assert torch.equal(reports[0.0].frames, base.frames[:BATCH])
    assert float(full.reward.mean()) > float(half.reward.mean()) > float(base.reward.mean()) + 0.01
    assert gain(full, base, "colour") >= 0.10
    assert gain(full, base, "colour") > gain(half, base, "colour") > 0
    for key in ("shape", "direction", "background"):
        assert gain(full, base, key) >= -0.03, key
    # Pixels travelled; the world's own clips travel 10.3 on average, the base a little more.
    assert float(full.accuracy["motion"].mean()) >= 0.92 * float(base.accuracy["motion"].mean())


def test_the_base_is_good_but_for_the_colour(base):
    accuracy = {key: float(value.float().mean()) for key, value in base.accuracy.items()}
    assert accuracy["background"] >= 0.97
    assert accuracy["direction"] >= 0.95
    assert accuracy["shape"] >= 0.85
    assert 0.3 <= accuracy["colour"] <= 0.75


def test_the_shipped_lora_repairs_the_colour(model, reward, unseen, base):
    check_repair(model, reward, unseen, base, read_lora(SHIPPED))


@pytest.mark.slow
def test_training_repairs_the_colour(model, reward, unseen, base, tmp_path):
    config = TrainConfig.from_dict(read_recipe("builtin")["config"] | {"sweep": False})
    trainer = Trainer(model, reward, read_prompts(PROMPTS_TRAIN), config, tmp_path / "colour")
    with closing(iter(trainer)) as events:
        evaluations = [event.evaluation.reward for event in events if event.evaluation]
    assert evaluations[-1] > evaluations[0] + 0.02
    check_repair(model, reward, unseen, base, read_lora(trainer.lora_path))


def test_generation_depends_on_seed_and_prompt_alone(model, reward, unseen):
    together = examine(model, reward, unseen[:6], batch=6).frames
    in_parts = examine(model, reward, unseen[:6], batch=4).frames
    torch.testing.assert_close(together, in_parts, rtol=0, atol=2e-3)
