"""Compiled blocks: the same run but for rounding, with LoRAs, guidance, anchor and checkpointing; nothing stays."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from reward_lora.selfcheck.exactness import LATENT_SHAPE, gradients, relative_error
from reward_lora.training import compiling, learner
from reward_lora.training.config import TrainConfig
from reward_lora.training.memory import PLANS
from reward_lora.training.trainer import Trainer


def blocks(wan):
    return [block for block in wan.transformer.blocks if block._compiled_call_impl is not None]


@pytest.fixture
def quick_compiler(monkeypatch):
    """Dynamo and autograd's tracing without the backend's code, which takes a C++ compiler a minute."""
    original = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **options: original(self, backend="aot_eager", **options)
    )
    monkeypatch.setattr(learner, "check_compiler", lambda device: None)


def test_a_compiled_run_is_the_same_but_for_rounding(wan, reward, config, tmp_path, quick_compiler):
    config = replace(config, steps=2, batch_size=1, sample_every=0, anchor=0.1, memory="balanced", sampler_steps=4)
    plain = list(Trainer(wan, reward, ["a", "b"], config, tmp_path / "plain"))[1:]
    seen = []
    trainer = Trainer(
        wan, reward, ["a", "b"], replace(config, compile=True), tmp_path / "compiled",
        tick=lambda phase: seen.append(len(blocks(wan))),
    )  # fmt: skip
    fast = list(trainer)[1:]
    assert max(seen) == len(wan.transformer.blocks)
    assert [e.reward for e in fast] == [pytest.approx(e.reward, rel=1e-4) for e in plain]
    assert [e.grad_norm for e in fast] == [pytest.approx(e.grad_norm, rel=1e-4) for e in plain]
    assert blocks(wan) == []
    assert list(Trainer(wan, reward, ["a", "b"], config, trainer.folder)) == []  # it may be left out when resumed


def test_blocks_whose_weights_begin_to_move_are_compiled_no_more(wan, reward, config, tmp_path, quick_compiler, caplog):
    config = replace(config, steps=1, sample_every=0, compile=True)
    trainer = Trainer(wan, reward, ["a"], config, tmp_path / "run")
    seen = []
    trainer._learner.prepare(trainer.examples)
    with trainer._learner.at_work():
        seen.append(len(blocks(wan)))
        trainer._learner.adopt(PLANS[-1])
        seen.append(len(blocks(wan)))
    assert seen == [len(wan.transformer.blocks), 0]
    assert "memory: offload moves the blocks' weights, so they are not compiled" in caplog.text


@pytest.mark.slow
def test_the_compilers_own_code_has_the_gradient(wan, filled):
    try:
        compiling.check_compiler(wan.device)
    except ValueError as error:
        pytest.skip(str(error))
    text = torch.randn(5, 8, generator=torch.Generator().manual_seed(2))
    branch = wan.conditioning([text], None, LATENT_SHAPE).positive
    noise, sigma = wan.initial_latents(LATENT_SHAPE, [3]), torch.tensor(0.6, dtype=torch.float64)
    filled.train()
    wan.predict(noise, sigma, branch).square().sum().backward()
    expected = gradients(filled)
    with compiling.compiled(wan.transformer):
        wan.predict(noise, sigma, branch).square().sum().backward()
    assert relative_error(gradients(filled), expected) < 1e-5


def test_where_nothing_compiles_it_is_said(monkeypatch):
    def failing(*arguments, **options):
        raise RuntimeError("Cannot find a working triton installation.\nmore")

    monkeypatch.setattr(torch, "compile", failing)
    with pytest.raises(ValueError, match=r"compile does not work here \(Cannot find a working triton installation.\)"):
        compiling.check_compiler(torch.device("cpu"))


@pytest.mark.parametrize("moving", [{"float8": True}, {"shard": True}, {"memory": "offload"}])
def test_weights_that_move_are_not_compiled(moving):
    with pytest.raises(ValueError, match="compile takes weights that stay"):
        TrainConfig(compile=True, **moving)
