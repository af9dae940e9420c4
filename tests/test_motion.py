"""Motion without weights: known speeds, known differences, gradients."""

from __future__ import annotations

import math

import pytest
import torch
from reward_lora.reward_models import load_reward
from reward_lora.reward_models.protocol import Reward

NAMES = ("motion", "dynamic_degree")


def moving(speed, *, frames=4, height=64, width=96, contrast=0.4, scale=1):
    """``[1, 3, T, H, W]``: a smooth pattern that moves ``speed`` pixels a frame to the right."""
    y, x = torch.meshgrid(torch.arange(height) / scale, torch.arange(width) / scale, indexing="ij")
    clip = [
        0.5 + contrast * torch.sin((x - speed * time) * 0.45) * torch.cos(y * 0.35) for time in torch.arange(frames)
    ]
    return torch.stack(clip)[None, None].expand(1, 3, -1, -1, -1).contiguous()


def score(name, frames):
    return load_reward(name).score(frames, [""] * len(frames))


def test_mean_squared_difference_is_what_it_says():
    frames = torch.zeros(2, 3, 3, 8, 8)
    frames[1, :, 1] = 0.5
    assert score("motion", frames).tolist() == [0.0, 0.25]
    frames[1, :, 1], frames[1, :, 2] = 1.0, 1.0
    assert score("motion", frames).tolist() == [0.0, 0.5]


@pytest.mark.parametrize("speed", [0.3, 1.5, 3.0])
def test_dynamic_degree_knows_the_speed(speed):
    """v^2 / (v^2 + (6/256)^2), v in short sides a frame; half at 1.5 pixels of 64."""
    v = speed * 0.45 / math.hypot(0.45, 0.35) / 64  # the part of the slope along the motion
    expected = v**2 / (v**2 + (6 / 256) ** 2)
    assert score("dynamic_degree", moving(speed)).item() == pytest.approx(expected, rel=0.35)


def test_dynamic_degree_rises_with_the_speed_and_not_with_size_contrast_or_light():
    degrees = [score("dynamic_degree", moving(speed)).item() for speed in (0, 0.25, 0.5, 1, 2)]
    assert degrees == sorted(degrees)
    assert degrees[0] == 0
    large = score("dynamic_degree", moving(1, height=256, width=384, scale=4)).item()
    assert large == pytest.approx(degrees[3], rel=0.1)
    assert score("dynamic_degree", moving(1, contrast=0.2)).item() == pytest.approx(degrees[3], rel=0.1)
    still = moving(0) * 0.5
    flicker = still + torch.tensor([0.0, 0.2, 0.1, 0.3]).view(1, 1, 4, 1, 1)
    assert score("dynamic_degree", flicker).item() < 1e-6
    assert score("motion", flicker).item() > 0.01


def test_a_small_moving_part_makes_a_clip_dynamic():
    frames = moving(0)
    frames[..., :16, :16] = moving(3)[..., :16, :16]
    assert score("dynamic_degree", frames).item() > 0.4


@pytest.mark.parametrize("name", NAMES)
def test_promises_of_a_reward(name):
    reward, frames = load_reward(name), torch.cat([moving(1), moving(2), moving(0)])
    together = reward.score(frames, [""] * 3)
    alone = torch.cat([reward.score(clip, [""]) for clip in frames.split(1)])
    torch.testing.assert_close(together, alone, rtol=0, atol=0)
    assert isinstance(reward, Reward)
    assert together.dtype == torch.float32
    assert ((together >= 0) & (together <= 1)).all()
    bytes_of = (frames * 255).round()
    torch.testing.assert_close(reward.score(bytes_of.byte(), [""] * 3), reward.score(bytes_of / 255, [""] * 3))
    still = moving(0).requires_grad_()
    (gradient,) = torch.autograd.grad(reward.score(still, [""]).sum(), still)
    assert gradient.isfinite().all()
    one = moving(1, frames=1).requires_grad_()
    assert reward.score(one, [""]).item() == 0
    (gradient,) = torch.autograd.grad(reward.score(one, [""]).sum(), one)
    assert not gradient.any()
    with pytest.raises(ValueError, match="1 videos need as many prompts, got 2"):
        reward.score(moving(1), ["", ""])


@pytest.mark.parametrize("name", NAMES)
def test_gradient_check_and_ascent(name):
    generator = torch.Generator().manual_seed(0)
    frames = torch.rand(2, 3, 3, 9, 17, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: score(name, x), frames, fast_mode=True)
    frames = moving(0.2)
    before = score(name, frames).item()
    for _ in range(5):
        frames.requires_grad_()
        (gradient,) = torch.autograd.grad(score(name, frames).sum(), frames)
        frames = (frames + 0.02 * gradient.sign()).clamp(0, 1).detach()
    assert score(name, frames).item() > 2 * before
