"""The moving average: its values, that it is what is saved, and that a resumed run has the same one."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

import pytest
import torch
from reward_lora.files import read_safetensors
from reward_lora.lora.adapter import LoraUse, applied
from reward_lora.lora.files import read_lora
from reward_lora.training.average import Average
from reward_lora.training.checkpoint import list_checkpoints
from reward_lora.training.config import TrainConfig
from reward_lora.training.trainer import Trainer

PROMPTS = ["one", "two", "three"]


def test_a_young_average_forgets_faster():
    parameter = torch.nn.Parameter(torch.tensor([0.0]))
    average = Average({"a": parameter}, 0.5)
    expected = 0.0
    for n in range(12):
        parameter.data.fill_(n + 1)
        average.update(n)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * (n + 1)
    assert float(average.values["a"]) == pytest.approx(expected)
    with average.in_place():
        assert float(parameter.detach()) == pytest.approx(expected)
    assert float(parameter.detach()) == 12


def test_the_average_of_the_checkpoints_is_what_is_saved_and_evaluated(wan, reward, config, tmp_path):
    config = replace(config, ema=0.9, steps=3, save_every=1, keep_checkpoints=3, sample_every=3, guards="off")
    trainer = Trainer(wan, reward, PROMPTS, config, tmp_path / "run")
    events = list(trainer)
    states = [read_safetensors(path)[0] for path in list_checkpoints(trainer.folder)]
    keys = [key.removeprefix("lora.") for key in states[0] if key.startswith("lora.")]
    for n, (before, after) in enumerate(zip(states, states[1:], strict=False), 1):
        decay = (1 + n) / (10 + n)
        for key in keys:
            value = decay * before[f"average.{key}"] + (1 - decay) * after[f"lora.{key}"]
            torch.testing.assert_close(after[f"average.{key}"], value)
    lora = read_lora(trainer.lora_path)
    ups = {float(part.up.norm()) for part in lora.modules.values()}
    averages = {float(states[-1][f"average.{key}"].norm()) for key in keys if key.endswith(".up")}
    assert sorted(ups) == pytest.approx(sorted(averages))
    with applied(wan, [LoraUse(lora, 1.0)]):
        assert trainer.evaluate().rewards == pytest.approx(events[-1].evaluation.rewards, abs=1e-5)


def test_a_resumed_run_has_the_same_average(wan, reward, config, tmp_path):
    config = replace(config, ema=0.99, sample_every=0)
    whole = Trainer(wan, reward, PROMPTS, config, tmp_path / "whole" / "run")
    list(whole)
    part = Trainer(wan, reward, PROMPTS, config, tmp_path / "part" / "run")
    with closing(iter(part)) as events:
        for event in events:
            if event.step == 3:
                break
    list(Trainer(wan, reward, PROMPTS, config, part.folder))
    assert part.lora_path.read_bytes() == whole.lora_path.read_bytes()
    plain = Trainer(wan, reward, PROMPTS, replace(config, ema=0.0), tmp_path / "plain" / "run")
    list(plain)
    assert plain.lora_path.read_bytes() != whole.lora_path.read_bytes()


@pytest.mark.parametrize("ema", [-0.1, 1.0, float("nan")])
def test_a_share_out_of_range_is_refused(ema):
    with pytest.raises(ValueError, match=r"ema must lie in 0..1 without 1"):
        TrainConfig(ema=ema)
