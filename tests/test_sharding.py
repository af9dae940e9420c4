"""A base model whose weights are divided predicts and learns in every family; two processes: ``test_distributed``."""

import pytest
import torch
from reward_lora.lora.adapter import inject_new
from reward_lora.selfcheck.exactness import gradients, relative_error
from reward_lora.tests.families import cases
from reward_lora.training.config import TrainConfig
from reward_lora.training.distributed import Group
from reward_lora.training.memory import checkpointed_blocks
from reward_lora.training.sharding import is_sharded, mesh_of, shard
from reward_lora.training.trainer import Trainer
from reward_lora.video_models import load_video_model


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
