"""The strength sweep: what it paints and measures, and the strength it recommends."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from reward_lora.lora.adapter import LoraUse, applied
from reward_lora.lora.files import read_lora, write_lora
from reward_lora.training.sample import sample
from reward_lora.training.sweep import Sweep, SweepConfig, SweepPoint, gathered, mean_motion, run_sweep
from reward_lora.training.sweep_report import sweep_csv, sweep_plot, sweep_rows, sweep_sheet


def point(strength, scores, motion=1.0, count=4):
    """Made-up results: every reward's scores are its number plus a small spread over the videos."""
    spread = [0.01 * (i - 1.5) for i in range(count)]
    columns = {name: tuple(value + s for s in spread) for name, value in scores.items()}
    return SweepPoint(strength, columns, (motion,) * count, torch.zeros(2, 3, 3, 8, 8))


def made_up(rows, floor=0.75, held_out=("other",)):
    """A sweep of ``(strength, judge, other, motion)``."""
    config = SweepConfig(tuple(row[0] for row in rows), prompts=tuple("abcd"), motion_floor=floor, shown=2)
    points = [point(s, {"judge": judge, "other": other}, motion) for s, judge, other, motion in rows]
    return Sweep(config, tuple(points), held_out)


HACKED = [(0, 0.5, 0.5, 1.0), (0.5, 0.6, 0.58, 0.95), (1, 0.8, 0.55, 0.9), (1.5, 0.9, 0.4, 0.8), (2, 1.0, 0.3, 0.2)]


def test_the_held_out_reward_decides_not_the_one_trained_towards():
    sweep = made_up(HACKED)
    assert sweep.best.strength == 0.5
    assert made_up(HACKED, held_out=("judge",)).best.strength == 1.5
    reason = sweep.reason()
    assert reason.startswith("Use strength 0.5: the highest gain by other, +0.0800")
    assert "at 2 motion falls to 0.20 of the base model's, below the floor of 0.75" in reason
    assert "95% interval" in reason


def test_of_nearly_equal_gains_the_gentlest_is_taken():
    rows = [(0, 0, 0, 1), (0.5, 0, 0.1, 1), (1, 0, 0.2, 1), (1.25, 0, 0.204, 1), (1.5, 0, 0.15, 1)]
    sweep = made_up(rows)
    assert sweep.best.strength == 1
    assert "the gentlest with nearly the highest gain (98% of that at 1.25) by other, +0.2000" in sweep.reason()
    assert made_up([*rows[:3], (1.25, 0, 0.21, 1)]).best.strength == 1.25


def test_nothing_beyond_the_first_fall_of_motion_is_recommended():
    rows = [(0, 0, 0, 1), (0.5, 0.1, 0.1, 0.9), (1, 0.2, 0.2, 0.5), (1.5, 0.3, 0.3, 0.9)]
    sweep = made_up(rows)
    assert sweep.best.strength == 0.5
    assert made_up(rows, floor=0.4).best.strength == 1.5
    assert "it is the highest strength tried" in made_up(rows, floor=0.4).reason()
    notes = {row[0]: row[-1] for row in sweep_rows(sweep)[1]}
    assert notes == {"0": "", "0.5": "recommended", "1": "too little motion", "1.5": "after the motion fell"}


def test_a_lora_that_helps_nowhere_is_not_recommended():
    sweep = made_up([(-1, 2, 2, 1), (0, 0.5, 0.5, 1), (1, 0.9, 0.4, 1)])
    assert sweep.best.strength == 0, "below 0 is shown, never recommended"
    assert sweep.reason().startswith("Use no LoRA: by other no strength is better")


def test_several_held_out_rewards_count_alike_whatever_their_scales():
    rows = [point(s, {"judge": j, "a": a, "b": b}) for s, j, a, b in
            ((0, 0, 0, 0), (1, 0, 0.02, 100), (2, 0, 0.1, 0))]  # fmt: skip
    scaled = [dataclasses.replace(p, scores={**p.scores, "b": tuple(1000 * v for v in p.scores["b"])}) for p in rows]
    config = SweepConfig((1, 2), prompts=tuple("abcd"))
    for points in (rows, scaled):
        sweep = Sweep(config, tuple(points), ("a", "b"))
        assert sweep.best.strength == 1
        assert "standard deviations" in sweep.reason()
        gain = sweep.held_out_gain(points[1]).mean
        assert gain == pytest.approx((0.02 + 100) / 2 / 0.012909944, rel=1e-3)


def test_a_gain_within_its_noise_is_called_so():
    base, after = [0.0, 1.0, 0.0, 1.0], [1.0, 0.1, 1.0, 0.1]
    points = [SweepPoint(s, {"judge": tuple(v)}, (1.0,) * 4, torch.zeros(1, 3, 3, 8, 8)) for s, v in
              ((0.0, base), (1.0, after))]  # fmt: skip
    sweep = gathered(SweepConfig((1.0,), prompts=tuple("abcd")), points)
    assert sweep.held_out == ("judge",)
    assert "a gain is not shown: take more prompts or seeds" in sweep.reason()


def test_seeds_of_one_prompt_are_one_witness():
    scores = {"judge": (0.0, 2.0, 4.0, 6.0)}
    base = SweepPoint(0.0, {"judge": (0.0,) * 4}, (1.0,) * 4, torch.zeros(1))
    config = SweepConfig((1.0,), prompts=("a", "b"), seeds=2)
    gain = gathered(config, [base, SweepPoint(1.0, scores, (1.0,) * 4, torch.zeros(1))]).gain
    assert gain(SweepPoint(1.0, scores, (1.0,), torch.zeros(1)), "judge").b == (1.0, 5.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strengths": (0.5, 7)}, "strength must lie in -2..2"),
        ({"strengths": (0.0,)}, "needs a strength besides 0"),
        ({"prompts": ("a",)}, "at least two videos"),
        ({"prompts": ()}, "at least two videos"),
        ({"motion_floor": 1.5}, "motion_floor must lie in 0..1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_settings_out_of_range(change, message):
    with pytest.raises(ValueError, match=message):
        SweepConfig(**{"prompts": ("a", "b"), **change})


def test_motion():
    still = torch.rand(1, 3, 1, 4, 4).expand(-1, -1, 5, -1, -1)
    blinking = torch.tensor([0.0, 1.0, 0.0]).view(1, 1, 3, 1, 1).expand(1, 3, 3, 4, 4)
    assert mean_motion(still).tolist() == [0.0]
    assert mean_motion(blinking).tolist() == [1.0]
    assert mean_motion(still[:, :, :1]).tolist() == [0.0]


@pytest.fixture
def use(wan, filled, tmp_path):
    path = write_lora(tmp_path / "a.safetensors", filled.weights(), wan.lora_names("transformer"), {})
    filled.remove()
    return LoraUse(read_lora(path), 1.0)


class Brightness:
    name, differentiable, needs = "brightness", False, frozenset({"prompt"})

    def score(self, frames, prompts, *, reference=None):
        assert len(prompts) == len(frames)
        return frames.flatten(1).mean(1)


def test_a_sweep_paints_the_same_noise_at_every_strength_and_leaves_the_model(wan, reward, use):
    config = SweepConfig((-0.5, 1.0), prompts=("one", "two"), seeds=2, batch_size=3, steps=3, guidance_scale=2.0)
    state = {key: value.clone() for key, value in wan.transformer.state_dict().items()}
    ticks = []
    points = list(run_sweep(wan, use, config, reward, [Brightness()], tick=ticks.append))
    assert [p.strength for p in points] == [0.0, -0.5, 1.0]
    assert {"text", "rollout", "decode", "reward"} == set(ticks)
    assert all(len(p.motion) == 4 and p.shown.shape[0] == 4 for p in points)
    shape = wan.spec.latent_shape(8, 8, 3)
    texts, seeds = wan.encode_text([p for p, _ in config.videos]), [seed for _, seed in config.videos]
    conditioning = wan.conditioning(texts, wan.encode_text([""]) * 4, shape)
    for p in points:
        with applied(wan, [dataclasses.replace(use, strength=p.strength)]):
            clips = sample(wan, conditioning, seeds, shape, 3, 2.0)
        assert p.scores["brightness"] == pytest.approx(clips.flatten(1).mean(1).tolist(), abs=1e-5)
        assert p.motion == pytest.approx(mean_motion(clips).tolist(), abs=1e-5)
    assert points[2].scores != points[1].scores
    assert all(torch.equal(state[key], value) for key, value in wan.transformer.state_dict().items())
    sweep = gathered(config, points)
    assert sweep.held_out == ("brightness",)
    for picture in (sweep_plot(sweep), sweep_sheet(sweep)):
        assert picture.dtype.name == "uint8"
        assert min(picture.shape[:2]) > 100
        assert picture.std() > 5
    lines = sweep_csv(sweep).splitlines()
    assert lines[0].split(",")[:5] == ["strength", "toy", "toy gain", "toy gain low", "toy gain high"]
    assert lines[0].endswith("brightness gain low,brightness gain high,motion,note")
    assert len(lines) == 4


def test_a_sweep_refuses_what_it_cannot_judge(wan, reward, use):
    config = SweepConfig((1.0,), prompts=("one", "two"), steps=1)
    with pytest.raises(ValueError, match="must differ"):
        list(run_sweep(wan, use, config, reward, [reward]))
    needy = type("Needy", (Brightness,), {"needs": frozenset({"reference"})})()
    with pytest.raises(ValueError, match="needs a reference video"):
        list(run_sweep(wan, use, config, needy))
    broken = type("Broken", (Brightness,), {"score": lambda self, f, p: f.flatten(1).mean(1) * float("nan")})()
    with pytest.raises(ValueError, match="not finite at strength 0"):
        list(run_sweep(wan, use, config, broken))
