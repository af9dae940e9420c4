"""What a run has left: its last LoRA, its best, and those in its checkpoints."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from reward_lora.files import WeightFileError
from reward_lora.lora.files import read_lora
from reward_lora.training.checkpoint import list_checkpoints
from reward_lora.training.run_loras import checkpoint_loras, checkpoint_steps, is_run, saved_loras
from reward_lora.training.trainer import Trainer


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_the_newest_checkpoint_holds_the_lora_that_the_run_saved(wan, reward, config, tmp_path, ema):
    config = replace(config, ema=ema, network_alpha=6, sweep=False)
    trainer = Trainer(wan, reward, ["one", "two"], config, tmp_path / "run")
    assert not is_run(tmp_path / "run")
    list(trainer)
    assert is_run(trainer.folder)
    assert checkpoint_steps(trainer.folder) == [2, 4]
    (file,) = saved_loras(trainer.folder)
    loras, about = checkpoint_loras(list_checkpoints(trainer.folder)[-1])
    assert (about["step"], about["reward"], about["network_alpha"]) == ("4", reward.name, "6")
    saved, held = read_lora(file).modules, loras["transformer"]
    assert len(held) == len(saved) > 0
    for ours, original in wan.lora_names("transformer").items():
        if ours in held:
            delta = saved[f"diffusion_model.{original}"].delta()
            torch.testing.assert_close(held[ours].delta(), delta, rtol=1e-5, atol=1e-7)
    with pytest.raises(WeightFileError, match="is no checkpoint of a training"):
        checkpoint_loras(file)
