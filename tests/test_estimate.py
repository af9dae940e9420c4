"""The estimate counts what a backward pass really keeps, for every family, without computing or allocating it."""

import dataclasses

import pytest
import torch
from reward_lora.selfcheck.exactness import ToyReward
from reward_lora.tests.families import cases
from reward_lora.training.config import TrainConfig
from reward_lora.training.estimate import Estimate, Kept, estimate
from reward_lora.training.memory import PLANS, checkpointed_blocks
from reward_lora.training.schedule import BackpropSchedule
from reward_lora.video_models import load_video_model


def peak_of(run):
    """Highest number of bytes allocated while ``run`` works."""
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    total = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
    return peak


@pytest.mark.parametrize(("size", "checkpointed"), [(16, False), (16, True), (24, False), (24, True)])
def test_it_is_near_the_measured_peak_of_a_replayed_step(size, checkpointed):
    from reward_lora.benchmarks.replay import model_of_20m

    model, _ = model_of_20m("cpu", size)
    model.transformer.requires_grad_(False)
    model.transformer.blocks[0].attn1.to_q.weight.requires_grad_(True)  # something must want a gradient
    config = TrainConfig(width=2 * size, height=2 * size, frames=5, guidance_scale=6.0).for_model(model.spec)
    text = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    found = estimate(model, None, config, text)
    shape = model.spec.latent_shape(config.width, config.height, config.frames)
    branch, sigma = model.conditioning([text], None, shape).positive, model.sigmas(10)[0]

    def step():
        x = model.initial_latents(shape, [1]).requires_grad_()
        with torch.enable_grad(), checkpointed_blocks(model, checkpointed):
            prediction = model.predict(x, sigma, branch)
            prediction.backward(torch.ones_like(prediction))
        model.transformer.blocks[0].attn1.to_q.weight.grad = None

    kept = found.replay.checkpointed if checkpointed else found.replay.whole
    assert kept == pytest.approx(peak_of(step), rel=0.25)
    assert found.denoiser == sum(t.nbytes for t in (*model.transformer.parameters(), *model.transformer.buffers()))


@pytest.mark.parametrize("case", {case.family: case for case in cases()}.values(), ids=str)
def test_every_family_can_be_estimated_and_is_left_as_it_was(case, tmp_path):
    case.write(tmp_path / "model")
    model = load_video_model(case.source(tmp_path / "model"), dtype="float32")
    before = {name: p.data_ptr() for network in model.denoisers.values() for name, p in network.named_parameters()}
    width, height, frames = case.size
    backprop = BackpropSchedule("tail", 1)
    config = TrainConfig(width=width, height=height, frames=frames, sampler_steps=4, judged_latents=0,
                         backprop=backprop).for_model(model.spec)  # fmt: skip
    text = model.encode_text(["a red circle"])[0]
    found = estimate(model, ToyReward(), config, text)
    assert 0 < found.replay.checkpointed < found.replay.whole
    assert 0 < found.judge.checkpointed <= found.judge.whole
    assert found.text > 0
    twice = estimate(model, None, dataclasses.replace(config, batch_size=2), text)
    assert twice.replay.whole > 1.5 * found.replay.whole
    after = {name: p.data_ptr() for network in model.denoisers.values() for name, p in network.named_parameters()}
    assert before == after


def test_plans_are_smaller_one_after_the_other_and_the_fastest_that_fits_is_named():
    found = Estimate(11, 28, 24, 1, 2, Kept(90, 5, 1), Kept(20, 4, 1), 6)
    peaks = [found.peak(plan) for plan in PLANS]
    assert peaks == [28 + 90 + 3, 28 + 20 + 3, 28 + 5, 11]
    assert [found.fitting(free).name for free in (200, 60, 40, 12)] == ["fast", "balanced", "small", "offload"]
    assert found.fitting(3) is None
    assert "nothing fits" in found.table(3)
    assert "memory small fits" in found.table(40)
