"""Every family with every kind of reward and every schedule: the replayed gradient is that of one autograd graph."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from reward_lora import video_models
from reward_lora.lora.adapter import inject_new
from reward_lora.reward_models import load_reward
from reward_lora.reward_models.protocol import Reward
from reward_lora.selfcheck.exactness import ToyReward, gradients, one_graph, relative_error
from reward_lora.tests.families import cases
from reward_lora.training.gradient import Walk, replay, rollout
from reward_lora.training.judge import Objective, judge
from reward_lora.training.schedule import BackpropSchedule
from reward_lora.video_models import load_video_model
from reward_lora.video_models.protocol import ModelSpec, VideoModel

STEPS, GUIDANCE = 3, 2.0
CASES = cases()
FIRST = {case.family: case for case in reversed(CASES)} | {f"{c.family} pair": c for c in CASES if "pair" in c.layout}
SCHEDULES = {
    "last": BackpropSchedule("last"),
    "tail": BackpropSchedule("tail", 2),
    "uniform": BackpropSchedule("uniform", 2, coupling=0.0),
    "random": BackpropSchedule("random", 2, coupling=0.5),
    "list": BackpropSchedule("list", step_list=(0, 2)),
    "x0": BackpropSchedule("random", 1, judge="x0"),
}


@pytest.fixture(scope="module", params=FIRST)
def walk(request, tmp_path_factory):
    """A model with fresh LoRAs that do something, on its way from noise, and that noise."""
    case = FIRST[request.param]
    folder = tmp_path_factory.mktemp("contract") / "model"
    case.write(folder)
    model = load_video_model(case.source(folder), dtype="float32")
    adapters = [inject_new(network, model.spec.lora_targets, 2, 2.0, 1) for network in model.denoisers.values()]
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for adapter in adapters:
            for parameter in adapter.parameters().values():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    width, height, frames = case.size
    shape, texts = model.spec.latent_shape(width, height, frames), model.encode_text(["a red circle", "the square"])
    conditioning = model.conditioning(texts, model.encode_text(["", ""]), shape)
    seeds = (5, 6)
    walk = Walk(model, conditioning, GUIDANCE, batched_guidance=True, seeds=seeds)
    return walk, adapters, model.initial_latents(shape, seeds)


@pytest.fixture(scope="module", params=["toy", "tiny_clip"])
def reward(request) -> Reward:
    return ToyReward() if request.param == "toy" else load_reward(request.param)


def collect(adapters) -> dict:
    return {f"{i}.{name}": g for i, adapter in enumerate(adapters) for name, g in gradients(adapter).items()}


def test_a_model_and_a_reward_keep_their_protocols(walk, reward):
    assert isinstance(walk[0].model, VideoModel)
    assert isinstance(reward, Reward)


def test_the_guide_for_families_names_all_that_the_protocol_asks():
    guide = (Path(video_models.__file__).parent / "README.md").read_text(encoding="utf-8")
    asked = {name for name in (*vars(VideoModel), *VideoModel.__annotations__) if not name.startswith("_")}
    assert {"predict", "spec", "device"} <= asked
    for name in (*asked, *(field.name for field in dataclasses.fields(ModelSpec))):
        assert re.search(rf"`{name}\b", guide), name


@pytest.mark.parametrize("name", SCHEDULES)
def test_replay_gives_the_gradient_of_one_graph(walk, reward, name):
    walk, adapters, noise = walk
    schedule, objective, prompts = SCHEDULES[name], Objective(), ["a red circle", "the square"]
    plan = schedule.draw(walk.model.sigmas(STEPS), seed=3)
    with torch.enable_grad():
        final, kept = rollout(walk, noise, plan)
        verdict = judge(walk, final, reward, prompts, objective)
        replay(walk, kept, plan, verdict.gradient, schedule.coupling)
        ours = collect(adapters)
        expected = one_graph(walk, noise, plan, reward, objective, schedule.coupling, 1, prompts)
        reference = collect(adapters)
    assert verdict.rewards.shape == (2,)
    assert torch.allclose(final, expected, atol=1e-4)
    assert sum(float(g.norm()) for g in reference.values()) > 0
    assert relative_error(ours, reference) < 1e-3
