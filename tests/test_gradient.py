"""The engine's gradient is the autograd graph's, and the check would notice if it were not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from reward_lora import cli
from reward_lora.benchmarks.replay import PromptAlone
from reward_lora.cli import use
from reward_lora.lora.adapter import inject_new
from reward_lora.selfcheck import exactness
from reward_lora.training.config import TrainConfig
from reward_lora.training.gradient import Anchor, Walk, replay, rollout
from reward_lora.training.judge import Objective, View, judge
from reward_lora.training.sample import sample
from reward_lora.training.schedule import BackpropSchedule, Plan


def test_replay_equals_one_graph_in_float64_for_every_schedule():
    lines = list(exactness.check())
    assert len(lines) == len(exactness.SCHEDULES) + 1
    assert [str(line) for line in lines if line.failed] == []


@pytest.fixture
def step():
    """A replayed step as a function of what may be broken."""
    model = exactness.tiny_wan()
    adapter = inject_new(model.transformer, ("all-linear",), rank=2, alpha=2.0, seed=1)
    with torch.no_grad():
        for parameter in adapter.parameters().values():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.2)
    text = torch.randn(4, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    walk = Walk(model, model.conditioning([text], [text * 0], exactness.LATENT_SHAPE), 3.0)
    noise = model.initial_latents(exactness.LATENT_SHAPE, [4]).double()
    plan = Plan(model.sigmas(exactness.STEPS), (2, 4))

    def run(coupling=1.0, trained=(2, 4), guidance=3.0):
        ours = replace(walk, guidance_scale=guidance)
        final, kept = rollout(walk, noise, Plan(plan.sigmas, tuple({2, 4, *trained})))
        verdict = judge(walk, final, exactness.ToyReward(), [""], Objective(), View(0))
        replay(ours, kept, Plan(plan.sigmas, trained), verdict.gradient, coupling)
        return exactness.gradients(adapter)

    exactness.one_graph(walk, noise, plan, exactness.ToyReward(), Objective(), 1.0)
    return run, exactness.gradients(adapter)


@pytest.mark.parametrize(
    "broken", [{"coupling": 0.0}, {"coupling": 0.9}, {"trained": (4,)}, {"trained": (2, 5)}, {"guidance": 4.0}]
)
def test_the_comparison_notices_a_wrong_gradient(step, broken):
    run, reference = step
    assert exactness.relative_error(run(), reference) < 1e-12
    assert exactness.relative_error(run(**broken), reference) > 1e-3


def test_objective():
    rewards = torch.tensor([0.2, 1.5])
    assert Objective()(rewards).tolist() == pytest.approx([-0.2, -1.5])
    assert Objective(1.0, 2.0)(rewards).tolist() == pytest.approx([1.6, 0.0])
    assert Objective(1.0, 1.0, hinge=False)(rewards).tolist() == pytest.approx([0.8, 0.5])


def test_a_view_spreads_from_first_to_last_or_draws():
    assert View(frames=3).pick(9) == [0, 4, 8]
    assert View(frames=1).pick(9) == [0]
    assert View(frames=0).pick(9) == View(frames=20).pick(9) == list(range(9))
    drawn = [View(frames=3, choice="random", seed=seed).pick(9) for seed in range(50)]
    assert all(picked == sorted(set(picked)) and len(picked) == 3 for picked in drawn)
    assert {index for picked in drawn for index in picked} == set(range(9))
    assert drawn == [View(frames=3, choice="random", seed=seed).pick(9) for seed in range(50)]


@pytest.mark.parametrize("coupling", [0.0, 1.0])
def test_the_anchors_gradient_is_that_of_its_loss(coupling):
    model = exactness.tiny_wan()
    adapter = inject_new(model.transformer, ("all-linear",), rank=2, alpha=2.0, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapter.parameters().values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    texts = [torch.randn(5, 8, generator=generator, dtype=torch.float64) for _ in range(2)]
    walk = Walk(model, model.conditioning(texts[:1], texts[1:], exactness.LATENT_SHAPE), 3.0)
    noise = model.initial_latents(exactness.LATENT_SHAPE, [3]).double()
    plan = BackpropSchedule("tail", 2).draw(model.sigmas(5), 0)
    anchor = Anchor(0.7, lambda: adapter.at_strength(0.0), by_sigma=True)

    final, kept = rollout(walk, noise, plan)
    nothing = torch.zeros_like(final)
    drift = replay(walk, kept, plan, nothing, coupling, anchor)
    ours = exactness.gradients(adapter)

    x, loss, distances = noise, 0.0, []
    for i, (sigma, sigma_next) in enumerate(zip(plan.sigmas[:-1], plan.sigmas[1:], strict=True)):
        with torch.enable_grad():
            seen = x if coupling else x.detach()
            prediction = walk.predict(seen, sigma)
            if i in plan.trained:
                with torch.no_grad(), adapter.at_strength(0.0):
                    base = model.predict(seen.detach(), sigma, walk.conditioning.positive)
                squares = (model.predict(seen, sigma, walk.conditioning.positive) - base).square().mean()
                distances.append(squares.item())
                loss = loss + 0.7 / 2 * squares / (2 * sigma**2)
            x = model.step(x, prediction if i in plan.trained else prediction.detach(), sigma, sigma_next)
    loss.backward()
    assert exactness.relative_error(ours, exactness.gradients(adapter)) < 1e-12
    assert drift == pytest.approx(sum(distances) / 2)


def test_a_reward_without_gradient_is_refused(wan):
    class Blind(exactness.ToyReward):
        def score(self, frames, prompts, *, reference=None):
            return super().score(frames.detach(), prompts)

    walk = Walk(wan, wan.conditioning([torch.zeros(2, 8)], None, exactness.LATENT_SHAPE), 1.0)
    latents = wan.initial_latents(exactness.LATENT_SHAPE, [0])
    with pytest.raises(ValueError, match="can score but not train"):
        judge(walk, latents, Blind(), [""], Objective())


def test_rollout_of_a_batch_equals_its_samples_alone(wan):
    texts = wan.encode_text(["a", "bb", "ccc"])
    negative = wan.encode_text([""]) * 3
    noise = wan.initial_latents(exactness.LATENT_SHAPE, [1, 2, 3])
    plan = Plan(wan.sigmas(4), ())
    together, _ = rollout(Walk(wan, wan.conditioning(texts, negative, exactness.LATENT_SHAPE), 5.0), noise, plan)
    for i in range(3):
        alone = Walk(wan, wan.conditioning(texts[i : i + 1], negative[:1], exactness.LATENT_SHAPE), 5.0)
        final, _ = rollout(alone, noise[i : i + 1], plan)
        torch.testing.assert_close(final[0], together[i], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strategy", ["last", "tail", "uniform", "random"])
def test_schedules_draw_valid_steps(strategy):
    sigmas = torch.linspace(1, 0, 11)
    schedule = BackpropSchedule(strategy, 3)
    drawn = {schedule.draw(sigmas, seed).trained for seed in range(200)}
    assert all(t == tuple(sorted(set(t))) and t[0] >= 0 and t[-1] <= 9 for t in drawn)
    assert all(len(t) == (1 if strategy == "last" else 3) for t in drawn)
    assert (len(drawn) == 1) == (strategy in ("last", "tail"))
    if strategy == "uniform":
        assert all(t[1] - t[0] == t[2] - t[1] == 3 for t in drawn)
        assert {t[-1] for t in drawn} == {6, 7, 8, 9}


def test_schedules_keep_to_the_steps_that_can_be_trained():
    sigmas, among = torch.linspace(1, 0, 11), (0, 1, 2, 3)
    assert BackpropSchedule("last").draw(sigmas, 0, among).trained == (3,)
    assert BackpropSchedule("tail", 2).draw(sigmas, 0, among).trained == (2, 3)
    assert BackpropSchedule("uniform", 4).draw(sigmas, 0, among).trained == among
    drawn = {BackpropSchedule("random", 1, start=2).draw(sigmas, seed, among).trained for seed in range(50)}
    assert drawn == {(2,), (3,)}
    with pytest.raises(ValueError, match=r"among 0\.\.3"):
        BackpropSchedule("list", step_list=(4,)).draw(sigmas, 0, among)
    with pytest.raises(ValueError, match="at most the 4 of 10 solver steps that its experts work at"):
        BackpropSchedule("tail", 5).draw(sigmas, 0, among)


def test_x0_judge_stops_at_the_last_trained_step():
    plan = BackpropSchedule("list", step_list=(1, 3), judge="x0").draw(torch.linspace(1, 0, 11), 0)
    assert plan.trained == (1, 3)
    assert len(plan.sigmas) == 5
    assert plan.sigmas[-1] == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"strategy": "first"}, "strategy must be one of"),
        ({"coupling": 1.5}, "0..1"),
        ({"num_steps": 0}, "at least 1"),
        ({"strategy": "list"}, "step_list"),
        ({"strategy": "list", "step_list": (0, 10)}, "0..9"),
        ({"strategy": "tail", "num_steps": 11}, "at most the 10"),
        ({"strategy": "random", "num_steps": 3, "start": 8}, "cannot draw 3"),
        ({"strategy": "random", "num_steps": 1, "end": 10}, "start and end"),
    ],
)
def test_bad_schedules_say_what_is_allowed(settings, words):
    with pytest.raises(ValueError, match=words):
        BackpropSchedule(**settings).draw(torch.linspace(1, 0, 11), 0)


@pytest.mark.parametrize("coupling", [0.0, 0.5, 1.0])
def test_through_the_prompts_branch_alone_it_is_that_of_a_graph_without_the_other(coupling):
    model = exactness.tiny_wan()
    adapter = inject_new(model.transformer, ("all-linear",), rank=2, alpha=2.0, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapter.parameters().values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    texts = [torch.randn(5, 8, generator=generator, dtype=torch.float64) for _ in range(2)]
    conditioning = model.conditioning(texts[:1], texts[1:], exactness.LATENT_SHAPE)
    noise = model.initial_latents(exactness.LATENT_SHAPE, [3]).double()
    plan = BackpropSchedule("tail", 3).draw(model.sigmas(5), 0)
    calls, reward = [], exactness.ToyReward()
    walk = Walk(model, conditioning, 3.0, tick=calls.append)
    exactness.one_graph(PromptAlone(model, conditioning, 3.0), noise, plan, reward, Objective(), coupling)
    reference = exactness.gradients(adapter)
    final, kept = rollout(walk, noise, plan)
    verdict = judge(walk, final, reward, [""], Objective(), View(0))
    replay(walk, kept, plan, verdict.gradient, coupling, branch="prompt")
    assert exactness.relative_error(exactness.gradients(adapter), reference) < 1e-12
    assert calls.count("replay") == 3


def evaluations(network):
    """Samples that a network is called for, by a list that grows."""
    seen = []
    network.register_forward_hook(lambda module, args, kwargs, out: seen.append(len(out[0])), with_kwargs=True)
    return seen


@pytest.mark.parametrize("batched", [True, False])
def test_outside_of_its_interval_guidance_costs_nothing_and_says_nothing(wan, filled, batched):
    filled.train()
    text, negative = wan.encode_text(["a"]), wan.encode_text([""])
    conditioning, noise = wan.conditioning(text, negative, exactness.LATENT_SHAPE), torch.ones(1, 4, 2, 4, 4)
    sigmas, seen = wan.sigmas(6), evaluations(wan.transformer)
    low, high = float(sigmas[4]), float(sigmas[1])
    guided = [1, 2, 3]  # above low, up to high
    walk = Walk(wan, conditioning, 3.0, batched, guidance_interval=(low, high))
    final, kept = rollout(walk, noise, Plan(sigmas, (0, 1, 4, 5)))
    assert sum(seen) == 6 + len(guided)
    x = noise
    for i in range(6):
        scale = 3.0 if i in guided else 1.0
        x = wan.step(x, Walk(wan, conditioning, scale, batched).predict(x, sigmas[i]), sigmas[i], sigmas[i + 1])
    assert torch.equal(final, x)
    seen.clear()
    replay(walk, kept, Plan(sigmas, (0, 1, 4, 5)), torch.zeros_like(final))
    assert sum(seen) == 4 + 1


def test_sampling_keeps_to_the_interval(wan):
    text, negative = wan.encode_text(["a"]), wan.encode_text([""])
    conditioning, seen = wan.conditioning(text, negative, exactness.LATENT_SHAPE), evaluations(wan.transformer)
    frames = sample(wan, conditioning, [1], exactness.LATENT_SHAPE, 4, 3.0, guidance_interval=(0.0, 0.01))
    assert sum(seen) == 4
    assert torch.equal(frames, sample(wan, conditioning, [1], exactness.LATENT_SHAPE, 4, 1.0))


def test_a_video_of_one_prompt_keeps_to_the_interval_from_the_command_line_too(wan, tmp_path, monkeypatch, capsys):
    seen = evaluations(wan.transformer)
    monkeypatch.setattr(use, "open_model", lambda *arguments, **options: wan)

    def generate(*interval):
        seen.clear()
        arguments = ["generate", "--prompt", "a", "--steps", 4, "--output-dir", tmp_path, "--guidance-interval"]
        return cli.main([str(argument) for argument in (*arguments, *interval)])

    assert generate(0, 1) == 0
    assert sum(seen) == 8
    assert generate(0, 0.01) == 0
    assert sum(seen) == 4
    assert generate(0.5, 0.2) == 2
    assert "0 <= low < high <= 1, got 0.5 0.2" in capsys.readouterr().err


@pytest.mark.parametrize("interval", [(0.5, 0.5), (-0.1, 1.0), (0.2, 1.1), (0.3,)])
def test_an_interval_that_is_none_is_refused(interval):
    with pytest.raises(ValueError, match="0 <= low < high <= 1"):
        TrainConfig(guidance_interval=interval)
    whole = TrainConfig.from_dict({"guidance_interval": [0, 1]})
    assert whole.fingerprint() == TrainConfig().fingerprint()
