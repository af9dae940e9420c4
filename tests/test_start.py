"""A run that begins with a LoRA's weights begins exactly where the LoRA stands."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from reward_lora import cli
from reward_lora.lora.adapter import LoraUse, applied
from reward_lora.lora.files import LoraModule, Offset, read_lora
from reward_lora.training.trainer import Trainer

PROMPTS = ["one", "two", "three"]


@pytest.fixture
def lora(wan, reward, config, tmp_path):
    trainer = Trainer(wan, reward, PROMPTS, replace(config, steps=2, sample_every=0), tmp_path / "first")
    list(trainer)
    return read_lora(trainer.lora_path).in_memory()


@pytest.mark.parametrize(("rank", "alpha"), [(2, 2.0), (3, 12.0)])
def test_it_begins_where_the_lora_stands(wan, reward, config, lora, tmp_path, rank, alpha):
    config = replace(config, rank=rank, network_alpha=alpha, steps=2, sample_every=2, motion_floor=0.0)
    trainer = Trainer(wan, reward, PROMPTS, config, tmp_path / "second", start=[LoraUse(lora, 1.0)])
    base = trainer.evaluate().frames
    with applied(wan, [LoraUse(lora, 1.0)]):
        expected = trainer.evaluate().frames
    before, *_, after = list(trainer)
    assert float((expected - base).abs().max()) > 1e-4
    torch.testing.assert_close(before.evaluation.frames, expected, rtol=0, atol=1e-5)
    assert not torch.equal(after.evaluation.frames, before.evaluation.frames)
    assert set(read_lora(trainer.lora_path).ranks) == {rank}


def test_the_guards_compare_with_the_model_without_it(wan, reward, config, lora, tmp_path):
    trainer = Trainer(wan, reward, PROMPTS, config, tmp_path / "second", start=[LoraUse(lora, 1.0)])
    base = trainer.evaluate().rewards
    seen = []
    for event in trainer:
        seen.append(event.evaluation)
        break
    assert seen[0].rewards != pytest.approx(base, abs=1e-9)
    assert seen[0].findings["score"] != 0  # of what it begins with, against the base model


def test_a_lora_that_does_not_fit_is_refused_with_a_way_out(wan, reward, config, lora, tmp_path):
    def begin(file, **changes):
        list(Trainer(wan, reward, PROMPTS, replace(config, **changes), tmp_path / "second", start=[LoraUse(file, 1.0)]))

    with pytest.raises(ValueError, match="has rank 2 and this run 1; set rank to 2 or more"):
        begin(lora, rank=1, network_alpha=1)
    with pytest.raises(ValueError, match="that this run would not train, such as .*; set lora_targets"):
        begin(lora, lora_targets=("attn1.to_q",))
    name, module = next(iter(lora.modules.items()))
    extra = replace(lora, offsets={name: Offset(bias=torch.zeros(module.up.shape[0]))})
    with pytest.raises(ValueError, match="adds to parameters besides its matrices"):
        begin(extra)
    wide = replace(lora, modules={name: LoraModule(torch.zeros(2, 999), module.up, 2.0)})
    with pytest.raises(ValueError, match="was made for another model"):
        begin(wide)


def test_the_command_line_begins_with_it_too(tmp_path, capsys):
    """At a learning rate too small to move it, the run gives back the LoRA it was begun with."""
    first, second = (tmp_path / name / f"{name}.safetensors" for name in ("first", "second"))
    common = ["train", "--output-dir", tmp_path, "--steps", 1, "--sampler-steps", 2, "--sample-every", 0, "--rank", 2]
    common += ["--guards", "off", "--guidance-scale", 1, "--backprop.strategy", "last", "--save-dtype", "float32"]

    def train(*arguments):
        status = cli.main([str(a) for a in (*common, *arguments)])
        return status, capsys.readouterr().err

    assert train("--name", "first", "--learning-rate", 0.01)[0] == 0
    assert train("--name", "second", "--start", first, "--learning-rate", 1e-12)[0] == 0
    before, after = (read_lora(path).modules for path in (first, second))
    for name, module in before.items():
        torch.testing.assert_close(after[name].delta(), module.delta(), rtol=1e-5, atol=1e-8)
    assert any(module.delta().abs().max() > 1e-4 for module in before.values())
    for given in (f"{first}:0.5", f"{first}@0.5-1"):
        status, error = train("--name", "third", "--start", given)
        assert status == 2
        assert f"--start takes PATH or PATH@EXPERT, for a run begins with a LoRA as it is; got {given}" in error
