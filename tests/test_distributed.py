"""Two processes are one with twice the batch; they skip together; when one dies the other ends with a sentence."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from reward_lora.lora.files import read_lora

RUN = """
import os, signal, sys, torch
torch.set_num_threads(1)
from reward_lora.selfcheck.exactness import ToyReward, tiny_wan
from reward_lora.training.config import TrainConfig
from reward_lora.training.distributed import joined
from reward_lora.training.events import TrainingStopped
from reward_lora.training.schedule import BackpropSchedule
from reward_lora.training.trainer import Trainer

folder, batch, what = sys.argv[1], int(sys.argv[2]), sys.argv[3]

class Reward(ToyReward):
    calls = 0
    def score(self, frames, prompts, *, reference=None):
        Reward.calls += 1
        scores = super().score(frames, prompts)
        sick = what == "sick" and os.environ.get("RANK") == "1" and Reward.calls == 2
        return scores * float("nan") if sick or what == "all sick" else scores

model = tiny_wan(dtype=torch.float32)
model.encode_text = lambda prompts: [torch.full((2, 8), len(p) / 10) for p in prompts]
config = TrainConfig(steps=4, batch_size=batch, rank=2, learning_rate=1e-2, sample_every=0, save_every=1, epsilon=1e-2,
                     save_dtype="float32", max_skipped=2, backprop=BackpropSchedule("random", 2))
with joined("cpu") as group:
    try:
        for event in Trainer(model, Reward(), ["a", "bb", "ccc", "dddd"], config, folder, group=group):
            trained = [p.detach().double().abs().sum() for p in model.transformer.parameters() if p.requires_grad]
            print("after step", event.step, event.skipped or "learned", float(sum(trained)), flush=True)
            if what == "killed" and group.rank == 1 and event.step == 2:
                os.kill(os.getpid(), signal.SIGKILL)
    except TrainingStopped as error:
        print(error, flush=True)
        os._exit(3)
"""


def start(folder, batch, what="well", ranks=1, script=RUN):
    """Run in so many processes; gives what each printed and its exit status."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", script, str(folder), str(batch), what]
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if ranks == 1:
        environments = [shared]
    else:
        environments = [{**shared, "RANK": str(rank), "WORLD_SIZE": str(ranks)} for rank in range(ranks)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    children = [subprocess.Popen(command, env=environment, **pipes) for environment in environments]
    return [(child.communicate(timeout=300)[0], child.returncode) for child in children]


def steps(text):
    """What a process says of its steps and of its LoRA after each."""
    return [line for line in text.splitlines() if line.startswith("after step")]


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(tmp_path):
    for folder, batch, ranks in ((tmp_path / "one", 2, 1), (tmp_path / "two", 1, 2)):
        for text, status in start(folder, batch, ranks=ranks):
            assert status == 0, text
    one, two = (read_lora(tmp_path / name / f"{name}.safetensors").modules for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, module in one.items():
        torch.testing.assert_close(two[name].up, module.up, rtol=0, atol=1e-6)
        torch.testing.assert_close(two[name].down, module.down, rtol=0, atol=1e-6)
    for alone, together in zip(log(tmp_path / "one")[1:], log(tmp_path / "two")[1:], strict=True):
        assert together["reward"] == pytest.approx(alone["reward"], rel=1e-6)
        assert together["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-5)


@pytest.mark.slow
def test_what_one_cannot_judge_the_other_learns_from_and_all_skip_together(tmp_path):
    (leader, status), (other, _) = start(tmp_path / "sick", 1, "sick", ranks=2)
    assert status == 0
    assert len(set(steps(leader))) == 5
    assert steps(other) == steps(leader)
    assert [record["skipped"] for record in log(tmp_path / "sick")] == [""] * 5
    answers = start(tmp_path / "all" / "run", 1, "all sick", ranks=2)
    assert [status for _, status in answers] == [3, 3]
    assert all("2 steps in a row were skipped" in text for text, _ in answers)
    (leader, _), (other, _) = answers
    assert steps(other) == steps(leader)
    assert len({line.split()[-1] for line in steps(leader)}) == 1, "a skipped step must change nothing"


@pytest.mark.slow
def test_when_one_is_killed_the_other_saves_and_says_so(tmp_path):
    (text, status), (_, killed) = start(tmp_path / "run", 1, "killed", ranks=2)
    assert killed == -9
    assert status == 3
    assert "another process of this run has ended" in text
    assert "Traceback" not in text
    ((text, status),) = start(tmp_path / "run", 1, ranks=1)
    assert status == 0, text
    assert "this run was made by 2 processes so far and goes on with 1 process" in text
    assert [record["step"] for record in log(tmp_path / "run")] == [0, 1, 2, 3, 4]
