"""Weights that wait elsewhere: the same results, nothing left behind, and no more than a block's at a time."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from reward_lora import block_weights
from reward_lora.block_weights import blocks_of, in_float8, offloaded, quantise, residents
from reward_lora.lora.adapter import inject_new
from reward_lora.selfcheck import exactness
from reward_lora.training.gradient import Walk, replay, rollout
from reward_lora.training.judge import Objective, View, judge
from reward_lora.training.memory import checkpointed_blocks
from reward_lora.training.schedule import BackpropSchedule
from reward_lora.training.trainer import Trainer


def state(network):
    return {name: (tensor.clone(), tensor.dtype) for name, tensor in network.state_dict().items()}


def step(model):
    """One reward step; gives reward and the LoRA's gradients."""
    adapter = inject_new(model.transformer, ("all-linear",), rank=2, alpha=2.0, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapter.parameters().values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return adapter


def learn(model, adapter):
    text = torch.ones(2, 8)
    walk = Walk(model, model.conditioning([text], [text * 0], exactness.LATENT_SHAPE), 3.0)
    plan = BackpropSchedule("tail", 2).draw(model.sigmas(4), 0)
    final, kept = rollout(walk, model.initial_latents(exactness.LATENT_SHAPE, [3]), plan)
    verdict = judge(walk, final, exactness.ToyReward(), [""], Objective(), View(0))
    replay(walk, kept, plan, verdict.gradient)
    return float(verdict.rewards), exactness.gradients(adapter)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_offloaded_blocks_give_the_same_gradient_and_leave_no_trace(wan, checkpointed):
    before = state(wan.transformer)
    adapter = step(wan)
    reward, reference = learn(wan, adapter)
    with offloaded(wan.transformer), checkpointed_blocks(wan, checkpointed):
        again, gradients = learn(wan, adapter)
    assert again == reward
    assert exactness.relative_error(gradients, reference) < 1e-6
    adapter.remove()
    after = state(wan.transformer)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name][0], after[name][0]) for name in before)
    assert not any("forward" in vars(block) for block in blocks_of(wan.transformer))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_float8_is_training_on_the_quantised_weights(wan, checkpointed):
    before = state(wan.transformer)
    adapter = step(wan)
    with in_float8(wan.transformer), checkpointed_blocks(wan, checkpointed):
        stored = [
            p for block in blocks_of(wan.transformer) for p in block.parameters() if p.dtype == block_weights.FLOAT8
        ]
        reward, gradients = learn(wan, adapter)
    assert len(stored) >= 10 * len(blocks_of(wan.transformer))
    for block in blocks_of(wan.transformer):  # the same weights, written out
        for module in block.modules():
            for parameter in module.parameters(recurse=False):
                if isinstance(module, torch.nn.Linear) and not parameter.requires_grad and parameter.ndim == 2:
                    weight, scale = quantise(parameter.data)
                    assert (
                        (weight.float() * scale - parameter).abs() <= 0.0626 * parameter.abs() + scale * 2**-9
                    ).all()
                    parameter.data = weight.float() * scale
    expected_reward, expected = learn(wan, adapter)
    assert reward == pytest.approx(expected_reward, rel=1e-6)
    assert exactness.relative_error(gradients, expected) < 1e-6
    assert expected_reward != learn_unquantised(before, wan, adapter)


def learn_unquantised(before, wan, adapter):
    """The reward with the weights as they were."""
    with torch.no_grad():
        for name, tensor in wan.transformer.state_dict().items():
            original = name.replace(".base_layer", "")
            if original in before:
                tensor.copy_(before[original][0])
    return learn(wan, adapter)[0]


def test_float8_and_offloading_together_and_undone(wan):
    before = state(wan.transformer)
    adapter = step(wan)
    with in_float8(wan.transformer):
        reward, reference = learn(wan, adapter)
        with offloaded(wan.transformer), checkpointed_blocks(wan, True):
            again, gradients = learn(wan, adapter)
    assert again == reward
    assert exactness.relative_error(gradients, reference) < 1e-6
    adapter.remove()
    after = state(wan.transformer)
    assert all(torch.equal(before[name][0], after[name][0]) and before[name][1] == after[name][1] for name in before)


def test_only_the_block_at_work_is_copied(wan, monkeypatch):
    alive, most = [], 0
    real = block_weights._copy

    def copy(weight, scale, device):
        nonlocal most
        visiting = real(weight, scale, device).clone()
        alive.append((torch._C._WeakTensorRef(visiting), visiting.nbytes))
        most = max(most, sum(size for ref, size in alive if not ref.expired()))
        return visiting

    monkeypatch.setattr(block_weights, "_copy", copy)
    adapter = step(wan)
    with offloaded(wan.transformer), checkpointed_blocks(wan, True):
        learn(wan, adapter)
    of_block = max(
        sum(p.nbytes for p in block.parameters() if not p.requires_grad) for block in blocks_of(wan.transformer)
    )
    assert len(blocks_of(wan.transformer)) > 1
    assert 0 < most <= of_block


class Streams:
    """Stands for CUDA's streams: what is put onto one is written down, and copies arrive late."""

    def __init__(self):
        self.log, self.late, self.on_the_way = [], [], 0

    def current_stream(self, device=None):
        return self

    def wait_stream(self, other):
        self.log.append("the copying stream waits")

    def stream(self, stream):
        return nullcontext()

    def record_event(self):
        event = f"copy {len(self.late)}"
        self.late.append(event)
        self.log.append(event)
        return event

    def wait_event(self, event):
        self.log.append(f"wait for {event}")


def test_the_next_block_is_sent_for_while_one_works_forwards_and_backwards(monkeypatch):
    streams = Streams()
    for name in ("current_stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(streams, name))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: streams)
    blocks = [[torch.nn.Parameter(torch.full((2,), float(i)), requires_grad=False)] for i in range(4)]
    ahead, here = block_weights.Ahead(blocks), []
    prediction, back = [0, 1, 2, 3], [3, 2, 1, 0]
    for index in [*prediction, *prediction, *back, *prediction, *back]:
        copies = ahead.take(index, torch.device("cpu"))
        here.append(bool(copies))
        assert all(torch.equal(copy, parameter) for parameter, copy in copies.items())
        assert list(copies) == (blocks[index] if copies else [])
        waiting = [event for event in streams.late if f"wait for {event}" not in streams.log]
        assert len(waiting) <= 1
    # All but the first of a walk; and where it turns, the last, which is still to go when its way back begins.
    ahead_of = [False, True, True, True]
    assert here == ahead_of * 5
    ahead.drop()
    copies = [i for i, line in enumerate(streams.log) if line.startswith("copy")]
    assert all(streams.log[i - 1] == "the copying stream waits" for i in copies)  # before it writes
    assert sorted(streams.late) == sorted(line.removeprefix("wait for ") for line in streams.log if "wait for" in line)


def test_blocks_stay_when_the_rest_moves(wan):
    adapter = step(wan)
    everything = {id(p) for p in wan.transformer.parameters()}
    frozen = {id(p) for block in blocks_of(wan.transformer) for p in block.parameters() if not p.requires_grad}
    with offloaded(wan.transformer):
        moving = {id(t) for t in residents(wan.transformer)}
        assert moving & everything == everything - frozen
        assert {id(p) for p in adapter.parameters().values()} <= moving
    assert {id(t) for t in residents(wan.transformer)} >= everything


@pytest.mark.parametrize("settings", [{"memory": "offload"}, {"float8": True}, {"memory": "offload", "float8": True}])
def test_a_run_learns_with_weights_elsewhere_and_gives_the_model_back(wan, reward, config, tmp_path, settings):
    before = state(wan.transformer)
    events = list(Trainer(wan, reward, ["one", "two"], replace(config, **settings), tmp_path / "run"))
    assert all(event.grad_norm > 0 for event in events[1:])
    plain = list(Trainer(wan, reward, ["one", "two"], config, tmp_path / "plain"))
    off = 1e-4 if "float8" not in settings else 0.5
    assert events[1].grad_norm == pytest.approx(plain[1].grad_norm, rel=off)
    after = state(wan.transformer)
    assert all(torch.equal(before[name][0], after[name][0]) for name in before)
