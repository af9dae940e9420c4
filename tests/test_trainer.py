"""The loop: it learns, it repeats itself, it loses nothing, and it leaves the model as it was."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from reward_lora.files import read_safetensors, write_safetensors
from reward_lora.lora.files import read_lora
from reward_lora.reward_models.mixture import Mixture, MixtureSettings
from reward_lora.selfcheck.exactness import ToyReward
from reward_lora.training.checkpoint import RunIdentity, list_checkpoints
from reward_lora.training.events import TrainingStopped
from reward_lora.training.interrupts import interrupt_later
from reward_lora.training.schedule import BackpropSchedule
from reward_lora.training.trainer import Trainer

PROMPTS = ["one", "two", "three", "four", "five"]


def weights(model):
    return {key: value.clone() for key, value in model.transformer.state_dict().items()}


def same(before, model):
    after = model.transformer.state_dict()
    return before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_events_files_and_restored_model(wan, reward, config, tmp_path):
    before = weights(wan)
    trainer = Trainer(wan, reward, PROMPTS, config, tmp_path / "run")
    events = list(trainer)
    assert [e.step for e in events] == [0, 1, 2, 3, 4]
    assert [e.step for e in events if e.evaluation] == [0, 2, 4]
    assert all(e.grad_norm > 0 and e.seconds > 0 and e.memory > 0 for e in events[1:])
    assert events[0].evaluation.frames.shape == (2, 3, 3, 8, 8)
    assert same(before, wan)
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert {"run.safetensors", "log.jsonl", "config.json", "reward.png", "samples"} <= names
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [0, 1, 2, 3, 4]
    assert records[0]["reward"] is None
    assert records[4]["evaluation"] == pytest.approx(events[-1].evaluation.reward)
    assert len(list((tmp_path / "run" / "samples").glob("*.mp4"))) == 6
    lora = read_lora(trainer.lora_path)
    assert lora.metadata["step"] == "4"
    assert lora.metadata["base_model"] == "tiny random Wan"
    assert all(float(m.up.abs().max()) > 0 for m in lora.modules.values())


def test_training_raises_the_reward_on_fixed_prompts_and_seeds(wan, config, tmp_path):
    config = replace(config, steps=24, judged_latents=0, sample_every=24, sample_count=5, learning_rate=3e-2)
    config = replace(config, max_grad_norm=1.0)
    before, *_, after = list(Trainer(wan, SamePictures(), PROMPTS, config, tmp_path / "run"))
    gains = [b - a for a, b in zip(before.evaluation.rewards, after.evaluation.rewards, strict=True)]
    assert min(gains) > 0.005


def test_an_evaluation_outside_of_a_run_sees_the_base_model_of_the_run(wan, reward, config, tmp_path):
    before = weights(wan)
    trainer = Trainer(wan, reward, PROMPTS, replace(config, steps=2, float8=True), tmp_path / "run")
    first, *_ = trainer
    outside = trainer.evaluate()
    assert torch.equal(outside.frames, first.evaluation.frames)
    assert not torch.equal(outside.frames, Trainer(wan, reward, PROMPTS, config, tmp_path / "run").evaluate().frames)
    assert same(before, wan)


def test_accumulation_takes_batches_one_after_the_other(wan, reward, config, tmp_path):
    """Two batches of two, accumulated, hold the rewards of two batches and average their gradients."""
    config = replace(config, steps=1, sample_every=0, max_grad_norm=1e9)
    rewards, gradients = [], []
    for batch, accumulation in ((4, 1), (2, 2), (1, 4)):
        c = replace(config, batch_size=batch, accumulation=accumulation)
        event = list(Trainer(wan, SamePictures(), ["one"], c, tmp_path / f"{batch}"))[-1]
        rewards.append(event.reward)
        gradients.append(event.grad_norm)
    # The same prompt and, with this reward, gradients that differ by the noise alone: all three are close,
    # while a sum instead of a mean would be off by factors of 2 and 4.
    assert max(gradients) / min(gradients) < 1.5
    assert max(rewards) - min(rewards) < 0.1


class SamePictures(ToyReward):
    """Linear in the pixels, so that every sample's gradient is nearly the same."""

    name = "same pictures"

    def score(self, frames, prompts, *, reference=None):
        return frames.flatten(1).mean(1)


def test_leaving_the_loop_saves_and_a_second_run_ends_the_same(wan, reward, config, tmp_path):
    whole = Trainer(wan, reward, PROMPTS, config, tmp_path / "whole" / "run")
    list(whole)
    before = weights(wan)
    part = Trainer(wan, reward, PROMPTS, config, tmp_path / "part" / "run")
    with closing(iter(part)) as events:
        for event in events:
            if event.step == 3:
                break
    assert same(before, wan)
    assert [p.name for p in list_checkpoints(part.folder)][-1] == "checkpoint-000003.safetensors"
    assert read_lora(part.lora_path).metadata["step"] == "3"
    resumed = list(Trainer(wan, reward, PROMPTS, config, part.folder))
    assert [e.step for e in resumed] == [4]
    assert part.lora_path.read_bytes() == whole.lora_path.read_bytes()
    assert [json.loads(line)["step"] for line in (part.folder / "log.jsonl").read_text().splitlines()] == [
        0,
        1,
        2,
        3,
        4,
    ]
    assert list(Trainer(wan, reward, PROMPTS, config, part.folder)) == []  # finished: nothing is left to do
    assert part.lora_path.read_bytes() == whole.lora_path.read_bytes()


def test_cancel_in_the_middle_of_a_step(wan, reward, config, tmp_path):
    class Cancelled(BaseException):
        pass

    calls = []

    def tick(phase):
        calls.append(phase)
        if len(calls) == 60:
            raise Cancelled

    before = weights(wan)
    trainer = Trainer(wan, reward, PROMPTS, replace(config, steps=50), tmp_path / "run", tick=tick)
    with pytest.raises(Cancelled):
        list(trainer)
    assert {"text", "rollout", "decode", "reward", "replay"} == set(calls)
    assert same(before, wan)
    assert list_checkpoints(trainer.folder)
    assert trainer.lora_path.exists()


def test_cancel_in_an_evaluation_keeps_the_step(wan, reward, config, tmp_path):
    def tick(phase):
        if phase == "decode" and any("-000002" in p.name for p in list_checkpoints(tmp_path / "run")):
            raise KeyboardInterrupt

    trainer = Trainer(wan, reward, PROMPTS, replace(config, steps=9, sample_every=3), tmp_path / "run", tick=tick)
    with pytest.raises(KeyboardInterrupt):
        list(trainer)
    resumed = list(Trainer(wan, reward, PROMPTS, replace(config, steps=9, sample_every=3), tmp_path / "run"))
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(10))
    assert resumed[-1].step == 9


def test_a_nan_skips_the_step_and_many_stop_the_run(wan, reward, config, tmp_path):
    class Sick(type(reward)):
        calls = 0

        def score(self, frames, prompts, *, reference=None):
            Sick.calls += 1
            scores = super().score(frames, prompts)
            return scores * float("nan") if Sick.calls in (2, 4, 5, 6) else scores

    trainer = Trainer(wan, Sick(), PROMPTS, replace(config, steps=20, sample_every=0, max_skipped=3), tmp_path / "run")
    events = []
    with pytest.raises(TrainingStopped, match="3 steps in a row were skipped.*not a finite number"):
        events.extend(iter(trainer))
    assert [bool(e.skipped) for e in events[1:]] == [False, True, False, True, True, True]
    assert all(torch.isfinite(m.up).all() for m in read_lora(trainer.lora_path).modules.values())


def test_another_run_in_the_folder_is_not_overwritten(wan, reward, config, tmp_path):
    list(Trainer(wan, reward, PROMPTS, config, tmp_path / "run"))
    saved = (tmp_path / "run" / "run.safetensors").read_bytes()
    with pytest.raises(ValueError, match="other settings .learning_rate: 0.01 -> 0.02"):
        list(Trainer(wan, reward, PROMPTS, replace(config, learning_rate=2e-2), tmp_path / "run"))
    with pytest.raises(ValueError, match="other settings .prompts"):
        list(Trainer(wan, reward, PROMPTS[:2], config, tmp_path / "run"))
    assert (tmp_path / "run" / "run.safetensors").read_bytes() == saved
    longer = list(Trainer(wan, reward, PROMPTS, replace(config, steps=6), tmp_path / "run"))
    assert [e.step for e in longer] == [5, 6]


def test_a_checkpoint_older_than_a_setting_goes_on_at_its_default(config):
    identity = RunIdentity("model", "reward", "prompts", config)
    older = {key: value for key, value in identity.decisive().items() if key != "anchor_by_sigma"}
    assert identity.differences(older) == []
    changed = replace(identity, config=replace(config, anchor_by_sigma=True))
    assert changed.differences(older) == ["anchor_by_sigma: False -> True"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:100],
        lambda content: content.replace(b'\\"step\\":4', b'\\"step\\":}'),
        lambda content: content.replace(b'"lora.', b'"lara.', 1),
    ],
    ids=["cut", "progress", "name"],
)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(wan, reward, config, tmp_path, damage):
    trainer = Trainer(wan, reward, PROMPTS, config, tmp_path / "run")
    list(trainer)
    final = trainer.lora_path.read_bytes()
    newest = list_checkpoints(trainer.folder)[-1]
    sound = newest.read_bytes()
    newest.write_bytes(damage(sound))
    assert newest.read_bytes() != sound
    assert [e.step for e in Trainer(wan, reward, PROMPTS, config, trainer.folder)] == [3, 4]
    assert trainer.lora_path.read_bytes() == final


def test_embeddings_come_from_the_cache(wan, reward, config, tmp_path):
    first = Trainer(wan, reward, PROMPTS, config, tmp_path / "a" / "run", cache=tmp_path / "cache")
    list(first)
    assert len(list((tmp_path / "cache").iterdir())) == len(PROMPTS) + 1  # and the negative prompt

    def forbidden(prompts):
        raise AssertionError("encoded again")

    wan.encode_text = forbidden
    second = Trainer(wan, reward, PROMPTS, config, tmp_path / "b" / "run", cache=tmp_path / "cache")
    list(second)
    assert second.lora_path.read_bytes() == first.lora_path.read_bytes()


def test_seed_decides(wan, reward, config, tmp_path):
    paths = []
    for seed in (1, 1, 2):
        trainer = Trainer(wan, reward, PROMPTS, replace(config, seed=seed), tmp_path / str(len(paths)) / "run")
        list(trainer)
        paths.append(trainer.lora_path)
    assert read_bytes(paths[0]) == read_bytes(paths[1]) != read_bytes(paths[2])


def test_a_mixtures_statistics_survive_a_resume(wan, reward, config, tmp_path):
    def mixture():
        return Mixture([reward, SamePictures()], [1.0, 0.5], MixtureSettings(normalised=True))

    config = replace(config, steps=8, sample_every=0, save_every=1, batch_size=3)
    whole = Trainer(wan, mixture(), PROMPTS, config, tmp_path / "whole" / "run")
    events = list(whole)
    part = Trainer(wan, mixture(), PROMPTS, config, tmp_path / "part" / "run")
    with closing(iter(part)) as running:
        for event in running:
            if event.step == 5:
                break
    resumed = Trainer(wan, mixture(), PROMPTS, config, part.folder)
    rest = list(resumed)
    assert [e.reward for e in rest] == [e.reward for e in events[6:]]
    assert whole.lora_path.read_bytes() == resumed.lora_path.read_bytes()
    assert rest[-1].terms.keys() == {"toy", "same pictures"}
    record = json.loads((part.folder / "log.jsonl").read_text().splitlines()[-1])
    assert record["terms"] == pytest.approx(dict(rest[-1].terms))


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def stop(request):
    """A signal that interrupts, as on the command line."""
    before = signal.signal(request.param, signal.default_int_handler)
    yield request.param
    signal.signal(request.param, before)


def test_a_signal_waits_for_the_end_of_a_block(stop):
    seen = []

    def block():
        with interrupt_later():
            signal.raise_signal(stop)
            seen.append("the block went on")

    with pytest.raises(KeyboardInterrupt):
        block()
    assert seen
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(stop)  # as before


def test_many_cancels_while_it_saves_lose_nothing(wan, config, tmp_path, stop):
    class Impatient(ToyReward):
        """Whoever waits for the checkpoint cancels again and again."""

        def state(self):
            for _ in range(5):
                signal.raise_signal(stop)
            return {}

        def load_state(self, state):
            pass

    config = replace(config, sample_every=0, save_every=100)
    whole = Trainer(wan, ToyReward(), PROMPTS, config, tmp_path / "whole" / "run")
    list(whole)
    trainer = Trainer(wan, Impatient(), PROMPTS, config, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt), closing(iter(trainer)) as events:  # noqa: PT012
        while next(events).step < 3:
            pass
    assert [path.stem[-1] for path in list_checkpoints(trainer.folder)] == ["3"]
    assert read_lora(trainer.lora_path).metadata["step"] == "3"
    resumed = Trainer(wan, ToyReward(), PROMPTS, config, trainer.folder)
    assert [event.step for event in resumed] == [4]
    assert resumed.lora_path.read_bytes() == whole.lora_path.read_bytes()


def test_one_rollout_serves_several_updates(wan, reward, config, tmp_path):
    """Of six solver steps the last two are trained: an update that begins there walks two steps and not six."""
    phases = []
    config = replace(config, steps=4, reuse=3, sample_every=0, learning_rate=1e-12, sampler_steps=6)
    trainer = Trainer(wan, reward, PROMPTS, config, tmp_path / "run", tick=phases.append)
    walked, rewards = [], []
    for event in trainer:
        walked.append(phases.count("rollout"))
        rewards.append(event.reward)
    assert [b - a for a, b in zip(walked[1:-1], walked[2:], strict=True)] == [2 + 1, 2 + 1, 6 + 1]  # 1: conditioning
    assert rewards[1] == pytest.approx(rewards[2], abs=1e-6) == pytest.approx(rewards[3], abs=1e-6)
    assert rewards[4] != pytest.approx(rewards[1], abs=1e-4)  # another batch


def test_a_reused_rollout_is_judged_with_the_lora_as_it_has_become(wan, config, tmp_path):
    config = replace(config, steps=3, reuse=3, sample_every=0, max_grad_norm=1.0)
    rewards = [event.reward for event in Trainer(wan, SamePictures(), ["one"], config, tmp_path / "run")][1:]
    assert rewards == sorted(rewards)
    assert rewards[2] > rewards[0]


def test_a_run_stopped_between_two_updates_of_a_rollout_ends_the_same(wan, reward, config, tmp_path):
    config = replace(config, steps=7, reuse=3, accumulation=2, sample_every=0, backprop=BackpropSchedule("random", 2))
    whole = Trainer(wan, reward, PROMPTS, config, tmp_path / "whole" / "run")
    list(whole)
    part = Trainer(wan, reward, PROMPTS, config, tmp_path / "part" / "run")
    with closing(iter(part)) as events:
        for event in events:
            if event.step == 5:
                break
    resumed = Trainer(wan, reward, PROMPTS, config, part.folder)
    assert [event.step for event in resumed] == [6, 7]
    assert resumed.lora_path.read_bytes() == whole.lora_path.read_bytes()


@contextmanager
def files_up_to(size: int):
    """Nothing larger than so many bytes can be written."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.skipif(os.name == "nt", reason="the size of files is limited where there are limits: not on Windows")
def test_a_disk_that_takes_no_more_keeps_the_last_checkpoint(wan, reward, config, tmp_path):
    config = replace(config, steps=6, rank=8, sample_every=0)
    whole = Trainer(wan, reward, PROMPTS, config, tmp_path / "whole" / "run")
    list(whole)
    before = weights(wan)
    trainer = Trainer(wan, reward, PROMPTS, config, tmp_path / "run")
    with closing(iter(trainer)) as events:
        while next(events).step < 3:
            pass
        size = list_checkpoints(trainer.folder)[-1].stat().st_size
        sentence = "run takes nothing more .File too large.; checkpoint-000002.safetensors is whole: make room"
        with files_up_to(size // 2), pytest.raises(TrainingStopped, match=sentence):
            next(events)
    assert same(before, wan)
    assert read_lora(trainer.lora_path).metadata["step"] == "4"  # it is smaller than a checkpoint
    assert not list(trainer.folder.rglob("*.partial"))
    assert [event.step for event in Trainer(wan, reward, PROMPTS, config, trainer.folder)] == [3, 4, 5, 6]
    assert trainer.lora_path.read_bytes() == whole.lora_path.read_bytes()


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 256 KiB, by a function that mounts it again with other options."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options):
        return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True)

    if not shutil.which("mount") or mount("size=256k").returncode:
        pytest.skip("a small disk needs the right to mount one")
    yield place, mount
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_keeps_the_last_checkpoint(wan, reward, config, small_disk):
    place, _ = small_disk
    trainer = Trainer(wan, reward, PROMPTS, replace(config, steps=90, keep_checkpoints=90, sample_every=0), place / "r")
    with pytest.raises(TrainingStopped, match="r takes nothing more .No space left on device.; checkpoint-.* is whole"):
        list(trainer)
    steps = [int(path.stem[-6:]) for path in list_checkpoints(trainer.folder)]
    assert steps == list(range(2, steps[-1] + 1, 2))
    list_checkpoints(trainer.folder)[0].unlink()
    list_checkpoints(trainer.folder)[0].unlink()
    again = Trainer(wan, reward, PROMPTS, replace(config, steps=steps[-1] + 2, sample_every=0), trainer.folder)
    assert [event.step for event in again] == [steps[-1] + 1, steps[-1] + 2]


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(wan, reward, config, small_disk):
    place, mount = small_disk
    assert not mount("remount,ro").returncode
    phases = []
    trainer = Trainer(wan, reward, PROMPTS, config, place / "run", tick=phases.append)
    with pytest.raises(ValueError, match="disk/run cannot be written to .Read-only file system.; choose another"):
        list(trainer)
    assert phases == []


def test_a_folder_below_a_file_is_refused_before_any_work(wan, reward, config, tmp_path):
    (tmp_path / "file").touch()
    phases = []
    with pytest.raises(ValueError, match="file/run cannot be written to .Not a directory.; choose another"):
        list(Trainer(wan, reward, PROMPTS, config, tmp_path / "file" / "run", tick=phases.append))
    assert phases == []


def test_only_so_many_checkpoints_stay(wan, reward, config, tmp_path):
    config = replace(config, steps=6, save_every=1, keep_checkpoints=3, sample_every=0)
    trainer = Trainer(wan, reward, PROMPTS, config, tmp_path / "run")
    list(trainer)
    assert [path.stem[-1] for path in list_checkpoints(trainer.folder)] == ["4", "5", "6"]


def test_the_effective_batch_and_another_number_of_processes_are_said(wan, reward, config, tmp_path, caplog):
    caplog.set_level("INFO")
    config = replace(config, steps=1, accumulation=3, sample_every=0)
    trainer = Trainer(wan, reward, PROMPTS, config, tmp_path / "run")
    list(trainer)
    assert "6 videos a step: 1 process x 3 accumulated x batches of 2" in caplog.text
    assert "so far" not in caplog.text
    path = list_checkpoints(trainer.folder)[-1]
    tensors, metadata = read_safetensors(path)
    made_by_two = metadata["progress"].replace('"processes":1', '"processes":2')
    write_safetensors(path, tensors, metadata | {"progress": made_by_two})
    list(Trainer(wan, reward, PROMPTS, replace(config, steps=2), trainer.folder))
    assert "made by 2 processes so far and goes on with 1 process: from step 2 on" in caplog.text


def read_bytes(path: Path) -> bytes:
    return path.read_bytes()


RUN = """
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)
from reward_lora.selfcheck.exactness import ToyReward, tiny_wan
from reward_lora.training.config import TrainConfig
from reward_lora.training.schedule import BackpropSchedule
from reward_lora.training.trainer import Trainer

def train(folder):
    model = tiny_wan(dtype=torch.float32)
    model.encode_text = lambda prompts: [torch.full((2, 8), len(p) / 10) for p in prompts]
    config = TrainConfig(steps=24, batch_size=2, rank=2, learning_rate=1e-2, backprop=BackpropSchedule("random", 2),
                         save_every=3, sample_every=12, sample_count=2)
    for event in Trainer(model, ToyReward(), ["a", "bb", "ccc"], config, folder):
        pass

def start(folder):
    child = os.fork()
    if child == 0:
        try:
            train(folder)
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    return child

whole, killed = sys.argv[1:]
began = time.monotonic()
assert os.waitpid(start(whole), 0)[1] == 0
length = time.monotonic() - began
chance, kills = random.Random(0), 0
while kills < 10:
    child = start(killed)
    time.sleep(chance.uniform(0, length / 4))
    ended, _ = os.waitpid(child, os.WNOHANG)
    if not ended:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
    print("killed" if not ended else "ended", flush=True)
assert os.waitpid(start(killed), 0)[1] == 0
print("done", flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills are tested where processes fork: not on this system")
def test_killed_ten_times_the_lora_is_the_same_byte_for_byte(tmp_path):
    whole, killed = tmp_path / "whole" / "run", tmp_path / "killed" / "run"
    command = [sys.executable, "-c", RUN, str(whole), str(killed)]
    answer = subprocess.run(
        command, capture_output=True, text=True, timeout=500, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert answer.stdout.count("killed") == 10
    assert (killed / "run.safetensors").read_bytes() == (whole / "run.safetensors").read_bytes()
    assert not list(killed.glob(".*partial"))  # what a kill left half-written is swept up by the next run
