"""Two processes are one with twice the batch, also with divided weights; they skip together, and one outlives another.

Both processes are started once and make all of :mod:`.distributed_runs`.
"""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from reward_lora.lora.files import read_lora
from reward_lora.tests.distributed_runs import PLAIN, train

pytestmark = pytest.mark.slow


class Pair:
    """What two processes left in a folder and said."""

    def __init__(self, folder):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        command = [sys.executable, "-m", "reward_lora.tests.distributed_runs", str(folder)]
        shared = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        children = [
            subprocess.Popen(command, env={**shared, "RANK": str(rank), "WORLD_SIZE": "2"}, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, text=True)
            for rank in range(2)
        ]  # fmt: skip
        self.folder = folder
        self.texts = [child.communicate(timeout=1500)[0] for child in children]
        self.statuses = [child.returncode for child in children]

    def said(self, run):
        """The lines of a run, by process."""
        found = [[line for line in text.splitlines() if line.startswith(f"{run}: ")] for text in self.texts]
        assert all(found), self.texts
        return found

    def held(self, run):
        """Bytes of the blocks' weights in each process."""
        return [int(lines[0].split()[-1]) for lines in self.said(run)]

    def steps(self, run):
        """What each process says of its steps, and of its LoRA after each."""
        return [[line for line in lines if ": step " in line] for lines in self.said(run)]

    def lora(self, run):
        return read_lora(self.folder / run / f"{run}.safetensors").modules

    def log(self, run):
        return log(self.folder / run)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return Pair(tmp_path_factory.mktemp("pair"))


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_two_processes_are_one_with_twice_the_batch(pair, tmp_path):
    train(tmp_path / "one", "well", replace(PLAIN, batch_size=2))
    one, two = read_lora(tmp_path / "one" / "one.safetensors").modules, pair.lora("well")
    assert one.keys() == two.keys()
    for name, module in one.items():
        torch.testing.assert_close(two[name].up, module.up, rtol=0, atol=1e-6)
        torch.testing.assert_close(two[name].down, module.down, rtol=0, atol=1e-6)
    for alone, together in zip(log(tmp_path / "one")[1:], pair.log("well")[1:], strict=True):
        assert together["reward"] == pytest.approx(alone["reward"], rel=1e-6)
        assert together["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-5)


def test_what_one_cannot_judge_the_other_learns_from(pair):
    leader, other = pair.steps("sick")
    assert len(set(leader)) == 5
    assert other == leader
    assert [record["skipped"] for record in pair.log("sick")] == [""] * 5
    assert pair.log("sick")[2]["grad_norm"] != pytest.approx(pair.log("well")[2]["grad_norm"], rel=1e-3)


def test_what_none_can_judge_all_skip_together(pair):
    assert all("2 steps in a row were skipped" in lines[-1] for lines in pair.said("all sick"))
    leader, other = pair.steps("all sick")
    assert other == leader
    assert len({line.split()[-1] for line in leader}) == 1, "a skipped step must change nothing"


def test_two_processes_learn_alike_with_half_of_the_weights_each(pair):
    """With checkpointed blocks, an anchor, evaluations, and a batch that one process cannot judge."""
    for ours, whole in zip(pair.held("shards"), pair.held("whole"), strict=True):
        assert 0.4 < ours / whole < 0.6
    assert sum(pair.held("shards")) == pytest.approx(pair.held("whole")[0], rel=0.05)
    ours, whole = pair.lora("shards"), pair.lora("whole")
    assert any(module.up.abs().max() > 1e-4 for module in whole.values())
    for name, module in whole.items():
        torch.testing.assert_close(ours[name].up, module.up, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours[name].down, module.down, rtol=1e-5, atol=1e-6)
    for divided, reference in zip(pair.log("shards"), pair.log("whole"), strict=True):
        known = {what for what in ("reward", "grad_norm", "drift", "evaluation") if reference.get(what) is not None}
        for what in known:
            assert divided[what] == pytest.approx(reference[what], rel=1e-4), what


def test_when_one_is_killed_the_other_saves_and_says_so(pair, caplog):
    assert pair.statuses == [3, -9]
    assert "another process of this run has ended" in pair.said("killed")[0][-1]
    assert "Traceback" not in pair.texts[0]
    train(pair.folder / "killed", "resumed", PLAIN)
    assert "this run was made by 2 processes so far and goes on with 1 process" in caplog.text
    assert [record["step"] for record in pair.log("killed")] == [0, 1, 2, 3, 4]
