"""On a GPU: the same gradients as on the CPU, and memory that does not grow with the trained steps."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from reward_lora import block_weights
from reward_lora.lora.adapter import inject_new
from reward_lora.selfcheck import exactness
from reward_lora.training.gradient import Walk, replay, rollout
from reward_lora.training.judge import Objective, View, judge
from reward_lora.training.memory import checkpointed_blocks
from reward_lora.training.schedule import BackpropSchedule

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the GPU is not tested here"),
]


def gradients_of_a_step(device, offload=False, checkpointed=False):
    model = exactness.tiny_wan(dtype=torch.float32)
    model.to(device)
    adapter = inject_new(model.transformer, ("all-linear",), rank=2, alpha=2.0, seed=1)
    with torch.no_grad():
        for parameter in adapter.parameters().values():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.2)
    text = torch.randn(4, 8, generator=torch.Generator().manual_seed(3))
    walk = Walk(model, model.conditioning([text], [text * 0], exactness.LATENT_SHAPE), 3.0)
    plan = BackpropSchedule("tail", 3).draw(model.sigmas(exactness.STEPS), 0)
    elsewhere = block_weights.offloaded(model.transformer) if offload else nullcontext()
    with elsewhere, checkpointed_blocks(model, checkpointed):
        final, kept = rollout(walk, model.initial_latents(exactness.LATENT_SHAPE, [4]), plan)
        verdict = judge(walk, final, exactness.ToyReward(), [""], Objective(), View(0))
        replay(walk, kept, plan, verdict.gradient)
    return {key: value.cpu() for key, value in exactness.gradients(adapter).items()}


def test_gradients_agree_with_the_cpu():
    assert exactness.relative_error(gradients_of_a_step("cuda"), gradients_of_a_step("cpu")) < 1e-3


@pytest.mark.parametrize("checkpointed", [False, True])
def test_offloaded_blocks_arrive_ahead_and_give_the_same_gradient(checkpointed, monkeypatch):
    reference = gradients_of_a_step("cuda")
    arrived, take = [], block_weights.Ahead.take

    def counted(self, index, device):
        copies = take(self, index, device)
        arrived.append(bool(copies))
        return copies

    monkeypatch.setattr(block_weights.Ahead, "take", counted)
    for _ in range(5):  # a race would show now and then
        found = gradients_of_a_step("cuda", offload=True, checkpointed=checkpointed)
        assert exactness.relative_error(found, reference) < 1e-6
    assert sum(arrived) > len(arrived) // 3


def test_offloaded_blocks_are_two_at_a_time_on_the_device():
    layers, size = 12, 2**20
    network = torch.nn.Module()
    network.blocks = torch.nn.ModuleList(torch.nn.Linear(1024, 1024, bias=False) for _ in range(layers))
    network.requires_grad_(False)
    x = torch.randn(8, 1024, device="cuda")
    with block_weights.offloaded(network), torch.no_grad():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(3):
            y = x
            for block in network.blocks:
                y = block(y)
        assert torch.cuda.max_memory_allocated() - before < 2.5 * 4 * size
        expected = x.cpu()
        for block in network.blocks:
            expected = block(expected)
    torch.testing.assert_close(y.cpu(), expected, rtol=1e-3, atol=1e-3)


def test_memory_does_not_grow_with_the_trained_steps():
    from reward_lora.benchmarks.replay import peaks

    few, many = (peaks("replay", k, "cuda", 24)["allocated"] for k in (2, 8))
    assert many < 1.1 * few
