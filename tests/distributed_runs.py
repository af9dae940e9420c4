"""Runs of a tiny model by several processes, one after another, for ``test_distributed``.

``python -m reward_lora.tests.distributed_runs FOLDER`` makes all of :data:`RUNS` in folders of their names; each line
that it prints begins with the run's name.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from reward_lora.block_weights import blocks_of
from reward_lora.selfcheck.exactness import ToyReward, tiny_wan
from reward_lora.training.config import TrainConfig
from reward_lora.training.distributed import Group, joined
from reward_lora.training.events import TrainingStopped
from reward_lora.training.schedule import BackpropSchedule
from reward_lora.training.sharding import mesh_of, shard
from reward_lora.training.trainer import Trainer

say = partial(print, flush=True)
PLAIN = TrainConfig(steps=4, rank=2, learning_rate=1e-2, sample_every=0, save_every=1, epsilon=1e-2, max_skipped=2,
                    save_dtype="float32", backprop=BackpropSchedule("random", 2))  # fmt: skip
DEMANDING = TrainConfig(steps=3, rank=2, learning_rate=1e-2, accumulation=2, sample_every=2, sample_count=1, anchor=0.1,
                        epsilon=1e-2, memory="balanced", sampler_steps=4, save_dtype="float32",
                        backprop=BackpropSchedule("tail", 2))  # fmt: skip
RUNS = {
    "well": PLAIN,
    "sick": PLAIN,
    "all sick": PLAIN,
    "whole": DEMANDING,
    "shards": replace(DEMANDING, shard=True),
    "killed": PLAIN,
}
"""The last one ends the processes: one kills itself after the second step."""


@dataclass
class Reward(ToyReward):
    """The toy reward; in process 1 the second batch of some runs cannot be judged, and in another run none can."""

    run: str
    rank: int
    calls: int = 0

    def score(self, frames, prompts, *, reference=None):
        self.calls += torch.is_grad_enabled()
        second = self.run in ("sick", "whole", "shards") and self.rank == 1 and self.calls == 2
        return super().score(frames, prompts) * (float("nan") if second or self.run == "all sick" else 1.0)


def train(folder: Path, run: str, config: TrainConfig, group: Group = Group()) -> None:  # noqa: B008 - it is frozen
    """Make one run in this process, and say what comes of it."""
    model = tiny_wan(dtype=torch.float32)
    model.encode_text = lambda prompts: [torch.full((2, 8), len(p) / 10) for p in prompts]
    if config.shard:
        shard(model, mesh_of(group, "cpu"))
    weights = [p for block in blocks_of(model.transformer) for p in block.parameters()]
    say(f"{run}: bytes {sum((p.to_local() if config.shard else p).nbytes for p in weights)}")
    for event in Trainer(model, Reward(run, group.rank), ["a", "bb", "ccc", "dddd"], config, folder, group=group):
        trained = [p.detach().double().abs().sum() for p in model.transformer.parameters() if p.requires_grad]
        say(f"{run}: step {event.step} {event.skipped or 'learned'} {float(sum(trained))}")
        if run == "killed" and group.rank == 1 and event.step == 2:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with joined("cpu") as group:
        for name, settings in RUNS.items():
            try:
                train(Path(sys.argv[1]) / name, name, settings, group)
            except TrainingStopped as error:
                say(f"{name}: {error}")
        os._exit(3)  # the other one is gone
