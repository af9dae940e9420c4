"""The estimate is what the allocator sees, for every family, without computing or allocating it."""

import dataclasses
import logging

import pytest
import torch
from reward_lora.benchmarks.allocated import peak_bytes
from reward_lora.benchmarks.scoring import judge_of
from reward_lora.lora.adapter import inject_new
from reward_lora.reward_models.mixture import Mixture
from reward_lora.reward_models.scoring import FrameReward
from reward_lora.selfcheck.exactness import ToyReward
from reward_lora.tests.families import cases
from reward_lora.training.config import TrainConfig
from reward_lora.training.estimate import Borrowed, Estimate, estimate
from reward_lora.training.gradient import Walk, replay, rollout
from reward_lora.training.judge import Objective, judge
from reward_lora.training.memory import PLANS, checkpointed_blocks
from reward_lora.training.schedule import BackpropSchedule
from reward_lora.training.trainer import Trainer
from reward_lora.video_models import load_video_model
from reward_lora.video_models.protocol import ModelSpec
from reward_lora.video_models.wan import WanModel

TEXT = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))


def transformer(size, layers):
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(num_attention_heads=2, attention_head_dim=size, in_channels=4, out_channels=4,
                                 text_dim=64, freq_dim=32, ffn_dim=8 * size, num_layers=layers)  # fmt: skip


def large_wan(size, layers, base):
    """A Wan whose VAE makes four frames of a latent, eight times as wide in three steps."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=base, z_dim=4, num_res_blocks=1, dim_mult=[1, 1, 2, 2], latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )
    spec = ModelSpec("wan", "wan", 4, 4, 8, 16, False, ("all-linear",), 0, 0, 1, 4, 3.0, 8)
    return WanModel(spec, transformer(size, layers), vae)


def cogvideox(size, layers, base):
    from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
    from reward_lora.video_models.cogvideox import CogVideoXModel, CogVideoXSpec
    from reward_lora.video_models.solvers import Ddim

    torch.manual_seed(0)
    network = CogVideoXTransformer3DModel(num_attention_heads=2, attention_head_dim=size, in_channels=4, out_channels=4,
                                          text_embed_dim=64, num_layers=layers, max_text_seq_length=16,
                                          use_rotary_positional_embeddings=True)  # fmt: skip
    vae = AutoencoderKLCogVideoX(block_out_channels=(base, base, 2 * base, 2 * base), latent_channels=4,
                                 layers_per_block=1, norm_num_groups=4)  # fmt: skip
    spec = CogVideoXSpec("cogvideox", "cogvideox", 4, 4, 8, 16, False, ("all-linear",), 0, 0, 9, 4, 3.0, 8)
    return CogVideoXModel(spec, network, vae, Ddim(torch.linspace(0.999, 0.001, 1000).double()))


CONFIGURATIONS = {
    "all latents of a wan": (large_wan, (24, 2, 16), (64, 64, 13), 0, ("fast", "small")),
    "the first latent of a wan with a larger denoiser": (large_wan, (96, 3, 8), (128, 128, 9), 1, ("fast", "balanced")),
    "all latents of a cogvideox": (cogvideox, (32, 1, 16), (64, 64, 9), 0, ("fast", "small")),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_it_is_near_the_measured_peak_of_a_training_step(name):
    build, sizes, (width, height, frames), judged, plans = CONFIGURATIONS[name]
    model = build(*sizes)
    config = TrainConfig(width=width, height=height, frames=frames, guidance_scale=3.0, sampler_steps=2, rank=4,
                         judged_latents=judged, backprop=BackpropSchedule("last")).for_model(model.spec)  # fmt: skip
    found = estimate(model, ToyReward(), config, TEXT)
    adapter = inject_new(model.transformer, config.lora_targets, config.rank, config.network_alpha, 1)
    parameters = adapter.parameters().values()
    shape = model.spec.latent_shape(width, height, frames)
    conditioning = model.conditioning([TEXT], [TEXT], shape)
    solver = config.backprop.draw(model.sigmas(2), 0)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)  # counted with the LoRA
    for plan in (plan for plan in PLANS if plan.name in plans):
        walk = Walk(model, conditioning, 3.0, plan.batched_guidance)

        def step(walk=walk, plan=plan):
            with checkpointed_blocks(model, plan.checkpoint_blocks):
                final, kept = rollout(walk, model.initial_latents(shape, [1]), solver)
                verdict = judge(walk, final, ToyReward(), [""], Objective(), config.view_at(0, plan.checkpoint_vae))
                replay(walk, kept, solver, verdict.gradient)

        borrowed = found.peak(plan) - found.weights - found.lora
        assert borrowed == pytest.approx(peak_bytes(step), rel=0.25)  # stricter than with the weights in it


def judge_peak(model, reward, config):
    latents = model.initial_latents(model.spec.latent_shape(config.width, config.height, config.frames), [1])
    walk = Walk(model, None, 1.0)
    return peak_bytes(lambda: judge(walk, latents, reward, ["a video"], Objective(), config.view_at(0, False)))


@pytest.mark.parametrize("judged", [0, 1])
def test_a_reward_that_needs_more_than_the_decoder_is_counted(wan, judged):
    config = TrainConfig(sampler_steps=2, judged_latents=judged, backprop=BackpropSchedule("last")).for_model(wan.spec)
    reward = FrameReward(judge_of("hps", "tiny", []), "hps")
    alone = estimate(wan, None, config, torch.ones(4, 8))
    found = estimate(wan, Mixture([reward, ToyReward()], [1.0, 2.0]), config, torch.ones(4, 8))
    assert found.reward == sum(p.nbytes for p in (*reward.judge.parameters(), *reward.judge.buffers()))
    assert found.scoring_counted
    assert reward._texts == {}  # it was not the reward itself that worked
    assert found.judge.whole == pytest.approx(judge_peak(wan, reward, config), rel=0.25)
    assert found.judge.whole > 2 * alone.judge.whole


def test_a_reward_that_looks_at_what_it_gets_is_said_not_to_be_counted(wan):
    class Choosy(ToyReward):
        def score(self, frames, prompts, *, reference=None):
            return super().score(frames, prompts) if frames.mean() > 0.1 else frames.flatten(1).sum(1)

    config = TrainConfig(sampler_steps=2, backprop=BackpropSchedule("last")).for_model(wan.spec)
    found = estimate(wan, Choosy(), config, torch.ones(4, 8))
    assert "; what the reward needs beside its weights is not counted" in found.line(PLANS[0], 10**9)
    assert found.table(10**9).endswith("is not counted")
    assert "not counted" not in estimate(wan, ToyReward(), config, torch.ones(4, 8)).line(PLANS[0], 10**9)


def test_a_lora_that_is_there_is_the_one_that_is_counted(wan):
    config = TrainConfig(rank=4, sampler_steps=2, backprop=BackpropSchedule("last")).for_model(wan.spec)
    before = estimate(wan, None, config, torch.ones(4, 8))
    adapter = inject_new(wan.transformer, config.lora_targets, 4, 4.0, 1)
    assert estimate(wan, None, config, torch.ones(4, 8)) == before
    assert before.lora == 4 * sum(parameter.nbytes for parameter in adapter.parameters().values())
    twice = estimate(wan, None, dataclasses.replace(config, batch_size=2), torch.ones(4, 8))
    assert twice.replay.whole > 1.5 * before.replay.whole
    assert twice.judge.whole > 1.5 * before.judge.whole
    half = estimate(wan, None, dataclasses.replace(config, float8=True), torch.ones(4, 8))
    assert half.blocks < 0.4 * before.blocks
    assert half.replay.checkpointed > before.replay.checkpointed


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
    assert 0 < found.rollout < found.replay.whole
    assert 0 < found.replay.checkpointed < found.replay.whole
    assert 0 < found.judge.checkpointed <= found.judge.whole
    assert found.lora > 0
    assert not any(p.requires_grad for network in model.denoisers.values() for p in network.parameters())
    assert found.text > 0
    after = {name: p.data_ptr() for network in model.denoisers.values() for name, p in network.named_parameters()}
    assert before == after


def test_plans_are_smaller_one_after_the_other_and_the_fastest_that_fits_is_named():
    found = Estimate(11, 28, 24, 1, 1, 1, 2, 3, Borrowed(90, 5), Borrowed(20, 4), 6, 20)
    peaks = [found.peak(plan) for plan in PLANS]
    assert peaks == [1 + 28 + 90 + 3, 1 + 28 + 20 + 3, 1 + 28 + 5, 4 + 2 + 1 + 5]
    assert [found.fitting(free).name for free in (200, 60, 40, 13)] == ["fast", "balanced", "small", "offload"]
    assert [found.carried(plan) for plan in PLANS] == [120, 120, 48, 48]  # of 20 boundaries 4 and 4 at a time
    assert found.fitting(3) is None
    assert "nothing fits" in found.table(3)
    assert "memory small fits" in found.table(40)
    fast, _, small, _ = PLANS
    assert found.line(fast, 10**9) == ("memory: fast needs about 0.00 GB, most to replay a solver step; 1.00 GB free")
    assert found.line(fast, 40).endswith("that is too little: set memory to small")
    assert "that is too little: take fewer or smaller frames" in found.line(small, 3)


def test_in_main_memory_weights_and_features_are_there_all_the_time():
    found = Estimate(11, 28, 24, 1, 1, 1, 2, 3, Borrowed(90, 5), Borrowed(20, 4), 6, 20, main_memory=True)
    assert found.phases(PLANS[2]) == {"text": 43, "rollout": 46, "judge": 43 + 4 + 48, "replay": 48}
    assert found.fitting(60).name == "small"


def test_a_run_says_what_it_needs_where_somebody_listens(wan, reward, config, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="reward_lora.training.learner"):
        next(iter(Trainer(wan, reward, ["a prompt"], config, tmp_path / "run")))
    (line,) = [record.message for record in caplog.records if record.message.startswith("memory:")]
    assert "memory: fast needs about" in line
    assert "GB free" in line
