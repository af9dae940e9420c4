"""A run that is killed in the middle of a step and started again ends as one never interrupted, for every family."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from reward_lora.selfcheck.exactness import ToyReward
from reward_lora.tests.families import Case, cases
from reward_lora.training.checkpoint import list_checkpoints
from reward_lora.training.config import TrainConfig
from reward_lora.training.schedule import BackpropSchedule
from reward_lora.training.trainer import Trainer
from reward_lora.video_models import load_video_model

CASES = [
    Case("wan", "2.1 original t2v"),
    Case("wan", "2.2 original i2v pair"),
    Case("cogvideox", "fun 2b inp"),
    Case("easyanimate", "original v5.1 inp"),
    Case("modelscope", "diffusers"),
    Case("opensora", "beside each other"),
    Case("videocrafter", "original"),
]
PROMPTS = ["a red circle", "a blue square moves left", "the circle"]

pytestmark = pytest.mark.skipif(
    not hasattr(os, "fork"), reason="kills are tested where processes fork: not on this system"
)


def killed_at(model, config, folder, phase: str) -> int:
    """Run in a child that kills itself in this phase once a checkpoint is there; gives the signal that ended it."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # a fork has none of its parent's threads

        def tick(now: str) -> None:
            if now == phase and list_checkpoints(folder):
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            list(Trainer(model, ToyReward(), PROMPTS, config, folder, tick=tick))
        finally:
            os._exit(1)  # whatever happens: the child never goes on as a test
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def test_every_family_is_killed():
    assert {case.family for case in CASES} == {case.family for case in cases()}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_killed_run_ends_the_same(case, tmp_path):
    case.write(tmp_path / "model")
    model, (width, height, frames) = load_video_model(case.source(tmp_path / "model"), dtype="float32"), case.size
    config = TrainConfig(
        steps=3, batch_size=1, rank=2, learning_rate=0.01, width=width, height=height, frames=frames, sampler_steps=4,
        guidance_scale=2.0, backprop=BackpropSchedule("random", 2), save_every=2, sample_every=0, save_dtype="float32",
    )  # fmt: skip
    whole = Trainer(model, ToyReward(), PROMPTS, config, tmp_path / "whole" / "run")
    assert [event.skipped for event in whole] == [""] * 4
    folder = tmp_path / "killed" / "run"
    assert killed_at(model, config, folder, "replay") == signal.SIGKILL
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-000002.safetensors"]
    resumed = Trainer(model, ToyReward(), PROMPTS, config, folder)
    assert [event.step for event in resumed] == [3]
    for path, expected in zip(resumed.lora_paths.values(), whole.lora_paths.values(), strict=True):
        assert path.read_bytes() == expected.read_bytes()
