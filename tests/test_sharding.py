"""A base model divided among processes learns what a whole one learns, at a part of the memory, in every family."""

import pytest
import torch
from reward_lora.lora.adapter import inject_new
from reward_lora.lora.files import read_lora
from reward_lora.selfcheck.exactness import gradients, relative_error
from reward_lora.tests.families import cases
from reward_lora.training.config import TrainConfig
from reward_lora.training.distributed import Group
from reward_lora.training.memory import checkpointed_blocks
from reward_lora.training.sharding import is_sharded, mesh_of, shard
from reward_lora.training.trainer import Trainer
from reward_lora.video_models import load_video_model

from .test_distributed import log, start

RUN = """
import sys, torch
torch.set_num_threads(1)
from reward_lora.block_weights import blocks_of
from reward_lora.selfcheck.exactness import ToyReward, tiny_wan
from reward_lora.training.config import TrainConfig
from reward_lora.training.distributed import joined
from reward_lora.training.schedule import BackpropSchedule
from reward_lora.training.sharding import mesh_of, shard
from reward_lora.training.trainer import Trainer

folder, divided, what = sys.argv[1], bool(int(sys.argv[2])), sys.argv[3]

class Reward(ToyReward):
    calls = 0
    def score(self, frames, prompts, *, reference=None):
        if torch.is_grad_enabled():
            Reward.calls += 1
        scores = super().score(frames, prompts)
        return scores * float("nan") if what == "sick" and group.rank == 1 and Reward.calls == 2 else scores

model = tiny_wan(dtype=torch.float32)
model.encode_text = lambda prompts: [torch.full((2, 8), len(p) / 10) for p in prompts]
config = TrainConfig(steps=3, rank=2, learning_rate=1e-2, accumulation=2, sample_every=2, sample_count=1, anchor=0.1,
                     epsilon=1e-2, memory="balanced", sampler_steps=4, save_dtype="float32", shard=divided,
                     backprop=BackpropSchedule("tail", 2))
with joined("cpu") as group:
    if divided:
        shard(model, mesh_of(group, "cpu"))
    blocks = [p for block in blocks_of(model.transformer) for p in block.parameters()]
    here = sum((p.to_local() if divided else p).nbytes for p in blocks)
    for event in Trainer(model, Reward(), ["a", "bb", "ccc"], config, folder, group=group):
        pass
    print(here)
"""


@pytest.mark.slow
def test_two_processes_learn_alike_with_half_of_the_weights_each(tmp_path):
    """With checkpointed blocks, an anchor, evaluations, and a batch that one process cannot judge."""
    held = {}
    for name, divided in (("whole", 0), ("shards", 1)):
        answers = start(tmp_path / name, divided, "sick", ranks=2, script=RUN)
        assert [status for _, status in answers] == [0, 0], answers
        held[name] = [int(text.split()[-1]) for text, _ in answers]
    for ours, whole in zip(held["shards"], held["whole"], strict=True):
        assert 0.4 < ours / whole < 0.6
    assert sum(held["shards"]) == pytest.approx(held["whole"][0], rel=0.05)
    ours, whole = (read_lora(tmp_path / name / f"{name}.safetensors").modules for name in ("shards", "whole"))
    assert any(module.up.abs().max() > 1e-4 for module in whole.values())
    for name, module in whole.items():
        torch.testing.assert_close(ours[name].up, module.up, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours[name].down, module.down, rtol=1e-5, atol=1e-6)
    for divided, reference in zip(log(tmp_path / "shards"), log(tmp_path / "whole"), strict=True):
        known = {what for what in ("reward", "grad_norm", "drift", "evaluation") if reference.get(what) is not None}
        for what in known:
            assert divided[what] == pytest.approx(reference[what], rel=1e-4), what


@pytest.fixture
def alone():
    """A group of one in this process: its shards are whole, but the weights come and go as in any other."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("case", {case.family: case for case in cases()}.values(), ids=lambda case: case.family)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_family_predicts_and_learns_the_same(case, dtype, alone, tmp_path):
    case.write(tmp_path / "model")
    model = load_video_model(case.source(tmp_path / "model"), dtype=dtype)
    width, height, frames = case.size
    shape = model.spec.latent_shape(width, height, frames)
    conditioning = model.conditioning(model.encode_text(["a red circle"]), None, shape).positive
    x, sigma = model.initial_latents(shape, [1]), model.sigmas(4)[1]

    def learn():
        network = model.denoisers[model.spec.expert_at(sigma)]
        adapter = inject_new(network, model.spec.lora_targets, rank=2, alpha=2.0, seed=1)
        with torch.no_grad():
            for parameter in adapter.parameters().values():
                parameter.add_(0.01)
            model.predict(x, sigma, conditioning)
        with checkpointed_blocks(model, True), torch.enable_grad():
            prediction = model.predict(x, sigma, conditioning)
            prediction.square().sum().backward()
        found = gradients(adapter)
        adapter.remove()
        return prediction.detach(), found

    prediction, whole = learn()
    assert not is_sharded(model)
    shard(model, alone)
    assert is_sharded(model)
    again, ours = learn()
    assert torch.equal(again, prediction)
    # Branches of a gradient are added in another order.
    assert relative_error(ours, whole) < (1e-5 if dtype == "float32" else 3e-2)


def test_what_cannot_be_sharded_is_refused(wan, reward, tmp_path):
    for how in ({"float8": True}, {"memory": "offload"}):
        with pytest.raises(ValueError, match="two ways to store the base model; choose one"):
            TrainConfig(shard=True, **how)
    with pytest.raises(ValueError, match="this is one alone; set devices to 2 or more"):
        Trainer(wan, reward, ["a"], TrainConfig(shard=True), tmp_path)
    with pytest.raises(ValueError, match="this is one alone"):
        mesh_of(Group(), "cpu")
