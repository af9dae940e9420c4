"""What is told to another process arrives as it was: a job, and the events that come back."""

import dataclasses
import json
import math

import pytest
import torch
from reward_lora.lora.adapter import LoraUse
from reward_lora.lora.files import LoraFile, LoraModule, Offset
from reward_lora.training.config import TrainConfig
from reward_lora.training.events import Evaluation, StepEvent
from reward_lora.training.examples import Example, Picture
from reward_lora.training.job import Job, ModelSource, RewardSource
from reward_lora.training.schedule import BackpropSchedule
from reward_lora.training.wire import pack, unpack
from reward_lora.training.workers import Workers


@pytest.fixture
def job(tmp_path):
    """Everything in it that may be in one; its LoRA's file does not exist, and its matrices share memory."""
    both = torch.randn(4, 6)
    lora = LoraFile(
        tmp_path / "gone.safetensors",
        {"lora_unet__a": LoraModule(both[:2], torch.randn(5, 2), 1.5), "b.c": LoraModule(both[2:], both.T[:, :2], 2.0)},
        {"expert": "high"},
        ("odd key",),
        {"b.c": Offset(bias=torch.randn(3)), "d": Offset(weight=torch.randn(2, 2))},
        ("a note",),
    )
    frames = Picture(torch.rand(3, 2, 4, 4))
    file = tmp_path / "picture.png"
    file.write_bytes(b"never opened")
    return Job(
        model=ModelSource({"diffusion": "a", "text": "b", "vae": "c"}, "bfloat16", ("x", "y")),
        reward=RewardSource("min(a[path=p]+b*2)", "rewards", ("z",)),
        examples=[Example("one", frames, reference=Picture(file)), Example("two", frames, reference=Picture(file))],
        config=TrainConfig(seed=2**64 - 1, learning_rate=3e-5, backprop=BackpropSchedule("list", step_list=(1, 3))),
        folder=tmp_path / "run",
        samples=[Example("three")],
        heldout=[RewardSource("tiny_clip")],
        uses=[LoraUse(lora, 0.7, "high", 0.25, 0.75)],
        start=[LoraUse(lora, 1.0)],
        cache=tmp_path / "cache",
    )


def test_a_job_arrives_as_it_was(job, tmp_path):
    there = Job.read(job.write(tmp_path / "mail"))
    for name in ("model", "reward", "config", "folder", "heldout", "device", "cache"):
        assert getattr(there, name) == getattr(job, name), name
    for name in ("examples", "samples"):
        ours = [example.identity for example in getattr(job, name)]
        assert [example.identity for example in getattr(there, name)] == ours
    assert there.examples[0].start_image is there.examples[1].start_image, "shared pictures are read once"
    for name in ("uses", "start"):
        (ours,), (theirs,) = getattr(job, name), getattr(there, name)
        assert dataclasses.replace(theirs, lora=None) == dataclasses.replace(ours, lora=None)
        for what in ("path", "metadata", "other_keys", "notes"):
            assert getattr(theirs.lora, what) == getattr(ours.lora, what)
        assert theirs.lora.names == ours.lora.names
        for module, matrices in ours.lora.modules.items():
            assert theirs.lora.modules[module].alpha == matrices.alpha
            assert torch.equal(theirs.lora.modules[module].down, matrices.down)
            assert torch.equal(theirs.lora.modules[module].up, matrices.up)
        assert torch.equal(theirs.lora.offsets["b.c"].bias, ours.lora.offsets["b.c"].bias)
        assert theirs.lora.offsets["d"].bias is None


def test_events_arrive_as_they_were(tmp_path):
    nan = math.nan
    evaluation = Evaluation(
        0.1, (0.1, nan), ("a", "b"), torch.rand(2, 3, 2, 4, 4), {"other": (1.0, 2.0)}, {"best": True}
    )
    for event in (
        StepEvent(0, 5, nan, nan, nan, 0.0, 1.5, 1 << 40, evaluation=evaluation),
        StepEvent(3, 5, 0.1 + 0.2, -1e-300, math.inf, 1e-5, 2.0, 3, "bad", terms={"a": 1.0}, stop="enough"),
    ):
        there = unpack(json.loads(json.dumps(pack(event, tmp_path))))
        assert repr(there) == repr(event)  # NaN included
        if event.evaluation:
            assert torch.equal(there.evaluation.frames, event.evaluation.frames)
    assert not list(tmp_path.iterdir()), "frames are left behind"


def test_more_devices_than_there_are_is_refused(job, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="devices must be at most 2, the GPUs that are visible here, got 3"):
        Workers(dataclasses.replace(job, device="cuda"), 3)
    with pytest.raises(ValueError, match="devices must be at least 1, got 0"):
        Workers(job, 0)
