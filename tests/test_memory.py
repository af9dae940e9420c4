"""Memory plans: equal gradients, a step made again in less memory, parts where a phase needs them."""

from dataclasses import replace

import pytest
import torch
from reward_lora.benchmarks.allocated import peak_bytes
from reward_lora.lora.adapter import inject_new
from reward_lora.selfcheck import exactness
from reward_lora.training.gradient import Walk, replay, rollout
from reward_lora.training.judge import Objective, View, judge
from reward_lora.training.memory import PLANS, MemoryPlan, Placement, checkpointed_blocks, plan_for, smaller
from reward_lora.training.schedule import BackpropSchedule
from reward_lora.training.trainer import Trainer
from reward_lora.video_models.wan import WanModel

PROMPTS = ["one", "two", "three"]


def run(wan, reward, config, folder, memory, tick=lambda phase: None):
    config = replace(config, memory=memory, judged_latents=0, sample_every=0)
    trainer = Trainer(wan, reward, PROMPTS, config, folder, tick=tick)
    return [event for event in trainer if event.step], trainer


def test_every_plan_learns_the_same(wan, reward, config, tmp_path):
    found = {plan.name: run(wan, reward, config, tmp_path / plan.name, plan.name)[0] for plan in PLANS}
    for name in ("balanced", "small", "offload"):
        for ours, reference in zip(found[name], found["fast"], strict=True):
            assert ours.reward == pytest.approx(reference.reward, rel=1e-5)
            assert ours.grad_norm == pytest.approx(reference.grad_norm, rel=1e-4)


def saved_bytes(wan, plan):
    """Bytes that one prediction keeps for its backward pass, outside of checkpoints."""
    total = 0

    def pack(tensor):
        nonlocal total
        total += tensor.nbytes
        return tensor

    text = torch.zeros(2, 8)
    branch = wan.conditioning([text], None, exactness.LATENT_SHAPE).positive
    x = wan.initial_latents(exactness.LATENT_SHAPE, [0]).requires_grad_()
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with torch.enable_grad(), checkpointed_blocks(wan, plan.checkpoint_blocks), hooks:
        wan.predict(x, torch.tensor(0.5), branch)
    return total


def test_checkpointed_blocks_keep_less_and_are_switched_back(wan):
    fast, balanced = PLANS[:2]
    assert saved_bytes(wan, balanced) < 0.5 * saved_bytes(wan, fast)
    assert not wan.transformer.is_gradient_checkpointing


def test_a_step_that_runs_out_of_memory_is_made_again_in_less(wan, reward, config, tmp_path, caplog):
    reference, _ = run(wan, reward, config, tmp_path / "whole", "fast")
    failures = iter([7, 19])
    fail_at, count = next(failures), 0

    def tick(phase):
        nonlocal count, fail_at
        count += phase == "replay"
        if count == fail_at:
            fail_at = next(failures, -1)
            raise torch.OutOfMemoryError("CUDA out of memory")

    events, trainer = run(wan, reward, config, tmp_path / "short", "fast", tick)
    assert [e.grad_norm for e in events] == pytest.approx([e.grad_norm for e in reference], rel=1e-4)
    assert [r.message for r in caplog.records] == [
        "out of GPU memory with memory: fast; going on with balanced",
        "out of GPU memory with memory: balanced; going on with small",
    ]
    assert not wan.transformer.is_gradient_checkpointing


def test_when_nothing_smaller_is_left_the_error_leaves_and_the_run_can_go_on(wan, reward, config, tmp_path):
    def tick(phase):
        if phase == "replay":
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        run(wan, reward, config, tmp_path / "run", "fast", tick)
    events, _ = run(wan, reward, config, tmp_path / "run", "fast")
    assert events[-1].step == config.steps


def test_auto_checkpoints_large_models_alone(wan, monkeypatch):
    assert plan_for("auto", wan).name == "fast"
    monkeypatch.setattr("reward_lora.training.memory.LARGE", 1000)
    assert plan_for("auto", wan).name == "balanced"
    assert smaller(plan_for("offload", wan)) is None
    with pytest.raises(ValueError, match="memory must be one of auto, fast, balanced, small, offload, got 'tiny'"):
        plan_for("tiny", wan)


SHAPE, STEPS = (4, 3, 12, 12), 9


@pytest.fixture(scope="module")
def step_of():
    """One training step with K trained solver steps, or one autograd graph of it, on a small Wan."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    tiny = exactness.tiny_wan(dtype=torch.float32)
    network = WanTransformer3DModel(num_attention_heads=2, attention_head_dim=48, in_channels=4, out_channels=4,
                                    text_dim=8, freq_dim=32, ffn_dim=384, num_layers=3)  # fmt: skip
    model = WanModel(tiny.spec, network, tiny.vae)
    adapter = inject_new(network, ("all-linear",), rank=4, alpha=4.0, seed=1)
    text = torch.ones(4, 8)
    walk = Walk(model, model.conditioning([text], [text * 0], SHAPE), 3.0)
    noise, reward, objective = model.initial_latents(SHAPE, [1]), exactness.ToyReward(), Objective()

    def step(trained, one_graph=False, checkpointed=False):
        plan = BackpropSchedule("tail", trained).draw(model.sigmas(STEPS), 0)
        for parameter in adapter.parameters().values():
            parameter.grad = None
        with checkpointed_blocks(model, checkpointed):
            if one_graph:
                exactness.one_graph(walk, noise, plan, reward, objective, 1.0)
                return
            final, kept = rollout(walk, noise, plan)
            verdict = judge(walk, final, reward, [""], objective, View(0))
            replay(walk, kept, plan, verdict.gradient)

    return step


def test_the_peak_of_a_step_does_not_depend_on_how_many_solver_steps_are_trained(step_of):
    peaks = {trained: peak_bytes(lambda k=trained: step_of(k)) for trained in (1, 2, 4, 8, STEPS)}
    assert max(peaks.values()) <= 1.02 * min(peaks.values())


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_peak_of_a_step_is_a_fraction_of_one_graphs(step_of, checkpointed):
    graph = peak_bytes(lambda: step_of(8, one_graph=True, checkpointed=checkpointed))
    assert peak_bytes(lambda: step_of(8, checkpointed=checkpointed)) <= 0.3 * graph


class Moves:
    """Records where its parts are sent."""

    device = torch.device("cpu")

    def __init__(self, log, name):
        self.log, self.name = log, name

    def to(self, device, *parts):
        self.log.append((self.name, *parts, str(device)))


@pytest.mark.parametrize(("swap", "expected"), [
    (False, [
        ("model", "text", "cuda:0"), "text",
        ("model", "text", "cpu"), ("model", "denoiser", "cuda:0"), ("model", "vae", "cuda:0"), ("reward", "cuda:0"),
        "rollout", "decode", "reward", "replay",
        ("model", "denoiser", "cpu"), ("model", "vae", "cpu"), ("reward", "cpu"),
    ]),
    (True, [
        ("model", "text", "cuda:0"), "text",
        ("model", "text", "cpu"), ("model", "denoiser", "cuda:0"), "rollout",
        ("model", "denoiser", "cpu"), ("model", "vae", "cuda:0"), ("reward", "cuda:0"), "decode", "reward",
        ("model", "vae", "cpu"), ("reward", "cpu"), ("model", "denoiser", "cuda:0"), "replay",
        ("model", "denoiser", "cpu"),
    ]),
])  # fmt: skip
def test_a_phase_has_what_it_needs_on_the_device(swap, expected):
    log = []
    plan = MemoryPlan("x", False, False, True, swap)
    placement = Placement(Moves(log, "model"), Moves(log, "reward"), log.append, plan, torch.device("cuda:0"))
    for phase in ("text", "rollout", "decode", "reward", "replay"):
        placement(phase)
    placement.clear()
    assert log == expected
