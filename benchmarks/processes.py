"""Two processes with half a batch each against one process with all of it, on the same cores.

    python -m reward_lora.benchmarks.processes [--quick] [--json FILE]

What it shows is the cost of the processes' talk: on one machine's cores there is nothing to win. Each process has half
of the threads. Both make the same steps; see the tests for the numbers they agree in.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from ..selfcheck.exactness import ToyReward
from ..training.config import TrainConfig
from ..training.distributed import joined
from ..training.schedule import BackpropSchedule
from ..training.trainer import Trainer
from .common import Result, Table, command, fresh, ratio, spread
from .replay import model_of_20m

TOGETHER = 2
"""Samples a step."""


def train(folder: str, rank: int, ranks: int, port: int, steps: int, size: int) -> list[float]:
    """Seconds of every step of one process; the first is not counted."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    model, _ = model_of_20m("cpu", size)
    model.encode_text = lambda prompts: [torch.randn(32, 64) for _ in prompts]
    config = TrainConfig(
        steps=steps + 1, batch_size=TOGETHER // ranks, rank=8, width=2 * size, height=2 * size, frames=5,
        sampler_steps=4, sample_every=0, save_every=1000, guards="off", backprop=BackpropSchedule("tail", 2),
    )  # fmt: skip
    seconds = []
    with joined("cpu") as group:
        for event in Trainer(model, ToyReward(), ["a", "b", "c"], config, folder, group=group):
            seconds.append(event.seconds)
    return seconds[2:]


def run(ranks: int, threads: int, steps: int, size: int) -> list[float]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(ranks) as pool:
        place = str(Path(folder) / "run")
        started = [
            pool.submit(fresh, train, place, rank, ranks, port, steps, size, threads=threads // ranks)
            for rank in range(ranks)
        ]
        return started[0].result()


def measure(options: argparse.Namespace) -> Result:
    rounds, steps, size = (1, 1, 8) if options.quick else (options.rounds, 4, 16)
    threads = max(2, torch.get_num_threads())
    seconds: dict[int, list[float]] = {1: [], 2: []}
    started = time.monotonic()
    for _ in range(rounds):
        for ranks in seconds:
            seconds[ranks] += run(ranks, threads, steps, size)
    rows = [
        [ranks, TOGETHER // ranks, threads // ranks, spread(values), spread([TOGETHER / v for v in values])]
        for ranks, values in seconds.items()
    ]
    said = [f"Two processes take {ratio(seconds[2], seconds[1])} of one's time a step."]
    about = (
        f"Wan, 20 M parameters, latents 3x{size}x{size}, 4 solver steps, K = 2, {TOGETHER} samples a step, gloo, cpu"
    )
    columns = ("processes", "batch of each", "threads of each", "seconds a step", "samples a second")
    figures = {"seconds": seconds, "whole": time.monotonic() - started}
    return Result(about, [Table(columns, rows)], said, figures)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=3)


if __name__ == "__main__":
    sys.exit(command("processes", __doc__, measure, options))
