"""A run on several devices under one parent: followed, cancelled, resumed, and never left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from reward_lora.training.checkpoint import list_checkpoints
from reward_lora.training.config import TrainConfig
from reward_lora.training.events import TrainingStopped
from reward_lora.training.examples import Example
from reward_lora.training.job import Job, ModelSource, RewardSource
from reward_lora.training.schedule import BackpropSchedule
from reward_lora.training.workers import Workers
from reward_lora.video_models import BUILTIN

from .test_distributed import log

PATIENCE = 900.0
"""Seconds for what takes two on an idle machine."""


@pytest.fixture
def job(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    config = TrainConfig(steps=50, rank=2, frames=5, sampler_steps=2, guidance_scale=1.0, save_every=100, sweep=False,
                         sample_count=1, sample_every=50, backprop=BackpropSchedule("tail", 1))  # fmt: skip
    prompts = [Example(f"a {colour} circle moves right on a blue background") for colour in ("red", "green")]
    return Job(ModelSource(BUILTIN), RewardSource("tiny_clip"), prompts, config, tmp_path / "run")


def workers_of(folder: Path) -> dict[str, psutil.Process]:
    """The processes that work on a run, by their rank."""
    found = {}
    for process in psutil.process_iter():
        try:
            if str(folder / "workers") in " ".join(process.cmdline()):
                found[process.environ()["RANK"]] = process
        except psutil.Error:  # it ends just now
            continue
    return found


def newest(folder: Path) -> int:
    return int(list_checkpoints(folder)[-1].stem.rpartition("-")[2])


@pytest.mark.slow
def test_a_run_is_followed_cancelled_resumed_and_survives_a_worker(job):
    said = []
    run = Workers(job, 2, say=said.append)
    with closing(iter(run)) as events:
        first = next(events)
        assert (first.step, first.steps) == (0, 50)
        assert first.evaluation.frames.shape[:3] == (1, 3, 5)
        assert next(events).step == 1
        assert sorted(workers_of(job.folder)) == ["0", "1"]
    assert not workers_of(job.folder), "a cancelled run leaves processes behind"
    assert not (job.folder / "workers").exists()
    assert any("2 videos a step" in line for line in said)
    assert run.files.curve().shape[2] == 3
    reached = newest(job.folder)
    assert reached >= 1
    assert [record["step"] for record in log(job.folder)] == list(range(reached + 1))
    assert all(path.is_file() for path in run.lora_paths.values())

    steps = []

    def follow():
        for event in Workers(job, 2):
            steps.append(event.step)
            if event.step == reached + 2:
                workers_of(job.folder)["1"].kill()

    with pytest.raises(TrainingStopped) as stopped:
        follow()
    assert steps[:2] == [reached + 1, reached + 2]
    assert "process 1 of 2 (counted from 0) failed: it was ended by SIGKILL" in str(stopped.value)
    assert str(job.folder / "workers" / "process-1.log") in str(stopped.value)
    assert (job.folder / "workers" / "process-1.log").is_file()
    assert not workers_of(job.folder)
    assert newest(job.folder) >= reached + 2


@pytest.mark.slow
def test_what_a_worker_refuses_the_parent_refuses(job):
    with pytest.raises(ValueError, match="there is no folder beauty"):
        list(Workers(replace(job, model=ModelSource("beauty")), 1))
    assert not workers_of(job.folder)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs signals")
def test_when_the_parent_is_killed_the_workers_save_and_end(tmp_path):
    folder = tmp_path / "run"
    settings = (
        "--devices 2 --name run --steps 500 --save-every 1000 --sample-every 0 "
        "--batch-size 1 --frames 5 --sampler-steps 2 --guidance-scale 1 --backprop.num-steps 1"
    )
    command = [sys.executable, "-m", "reward_lora.cli", "train", "--output-dir", str(tmp_path), *settings.split()]
    parent = subprocess.Popen(command, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        wait_for(lambda: (folder / "log.jsonl").is_file() and len(log(folder)) > 1, parent)
        assert len(workers_of(folder)) == 2
        assert not list_checkpoints(folder)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.communicate()
    wait_for(lambda: not workers_of(folder))
    assert newest(folder) >= 1


def wait_for(condition, parent: subprocess.Popen | None = None) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        assert parent is None or parent.poll() is None, parent.stderr.read()
        time.sleep(0.2)
