"""Image rewards on tiny random checkpoints in the published layouts: gradients, independence, texts, memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from reward_lora.assets import TINY_CLIP
from reward_lora.reward_models import load_reward
from reward_lora.reward_models import preprocess as pre
from reward_lora.reward_models.mps import CONDITION
from reward_lora.reward_models.protocol import Reward
from reward_lora.reward_models.scoring import FrameReward
from reward_lora.selfcheck.fixtures import find
from reward_lora.selfcheck.rewards import check_rewards
from torch.nn import functional as F

FIXTURE = Path(__file__).parent / "fixtures" / "rewards"
PROMPTS = ["a red circle moves left", "a blue square moves up", "a red circle moves left"]
REWARDS = {
    "pickscore": ("pickscore", {}),
    "pickscore_scaled": ("pickscore_scaled", {}),
    "clip_l14": ("clip_l14", {}),
    "hps_v2 official": ("hps_v2", {}),
    "hps_v2.1 videox-fun": ("hps_v2.1", {"preprocessing": "videox-fun"}),
    "mps": ("mps", {}),
    "aesthetic_v2": ("aesthetic_v2", {}),
    "aesthetic_v2.5": ("aesthetic_v2.5", {}),
}


@pytest.fixture(params=REWARDS)
def name(request):
    return request.param


@pytest.fixture
def make(name, reward_files):
    """The reward of the parameter, in any precision."""
    key, options = REWARDS[name]
    return lambda dtype=torch.float32: load_reward(key, search=[reward_files], options=options, dtype=dtype)


def clips(count=3, frames=3, size=(11, 19), dtype=torch.float32):
    generator = torch.Generator().manual_seed(4)
    noise = torch.rand(count, 3, frames, *size, generator=generator, dtype=torch.float64)
    return noise.to(dtype)


def test_parity_with_videox_fun():
    """PickScore and MPS with gradients; the others' weights are too large for this repository."""
    (fixture,) = find([FIXTURE])
    lines = {line.name: line for line in check_rewards(fixture)}
    for part in ("pickscore, scores", "pickscore, gradient", "mps, alone, pixels not rounded", "mps, scores"):
        assert lines[part].error <= lines[part].tolerance, lines[part]
    assert not any(line.failed for line in lines.values())


@pytest.fixture
def double():
    """Older transformers make the mask of a text in the default precision."""
    torch.set_default_dtype(torch.float64)
    yield torch.float64
    torch.set_default_dtype(torch.float32)


def test_gradient_in_double_precision(make, double):
    reward = make(double)
    frames = clips(1, 2, (6, 9), torch.float64).requires_grad_()
    assert reward.score(frames, PROMPTS[:1]).dtype == torch.float64
    assert torch.autograd.gradcheck(lambda x: reward.score(x, PROMPTS[:1]), frames, fast_mode=True)


def test_ascent_on_pixels_raises_the_score(make):
    reward = make()
    frames = clips(1, 2)
    before = float(reward.score(frames, PROMPTS[:1]))
    for _ in range(12):
        frames.requires_grad_()
        (gradient,) = torch.autograd.grad(reward.score(frames, PROMPTS[:1]).sum(), frames)
        frames = (frames.detach() + 0.02 * gradient / gradient.abs().max()).clamp(0, 1)
    after = float(reward.score(frames, PROMPTS[:1]))
    assert after > before + 1e-3 * abs(before)


def test_a_score_depends_on_its_own_clip_alone(make):
    reward, frames = make(), clips()
    together = reward.score(frames, PROMPTS)
    assert together.dtype == torch.float32
    assert isinstance(reward, Reward)
    assert together.std() > 1e-4  # clips and prompts do differ
    alone = torch.cat([reward.score(frames[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    for reward.chunk in (1, 4, 100):
        torch.testing.assert_close(reward.score(frames, PROMPTS), together, rtol=1e-5, atol=1e-6)
    singles = reward.score(frames.transpose(1, 2).flatten(0, 1)[:, :, None], [p for p in PROMPTS for _ in range(3)])
    torch.testing.assert_close(singles.view(3, 3).mean(1), together, rtol=1e-5, atol=1e-6)


def test_a_gradient_depends_on_its_own_clip_alone(make):
    reward, frames = make(), clips()

    def gradient(chunk, frames, prompts, weights):
        reward.chunk = chunk
        frames = frames.clone().requires_grad_()
        (reward.score(frames, prompts) * torch.tensor(weights)).sum().backward()
        return frames.grad

    together = gradient(8, frames, PROMPTS, [1.0, -2.0, 0.5])
    for other, ours in (
        (gradient(2, frames, PROMPTS, [1.0, -2.0, 0.5]), together),
        (gradient(8, frames[1:2], PROMPTS[1:2], [-2.0]), together[1:2]),
    ):
        assert float((other - ours).norm() / ours.norm()) < 1e-4


def test_bytes_and_floats_score_the_same(make):
    pixels = (clips() * 255).byte()
    reward = make()
    torch.testing.assert_close(
        reward.score(pixels, PROMPTS), reward.score(pixels.float() / 255, PROMPTS), rtol=0, atol=0
    )


def test_one_pass_of_the_text_tower_a_distinct_prompt(make):
    reward = make()
    if not reward.needs:
        assert not hasattr(reward.judge, "encode_text")
        return
    asked, tokenize = [], reward.judge.tokenize
    reward.judge.tokenize = lambda text: asked.append(text) or tokenize(text)
    frames = clips()
    first = reward.score(frames, PROMPTS)
    second = reward.score(frames, PROMPTS)
    assert torch.equal(first, second)
    assert sorted(asked) == sorted({*PROMPTS, *([CONDITION] if reward.name == "mps" else [])})


def test_memory_is_that_of_a_chunk(make):
    """Bytes kept for backward at any moment do not grow with the number of frames."""
    reward = make()
    reward.chunk = 2

    def peak(count):
        live, highest = 0, 0

        class Kept:
            def __init__(self, tensor):
                nonlocal live, highest
                self.tensor = tensor
                live += tensor.untyped_storage().nbytes()
                highest = max(highest, live)

            def __del__(self):
                nonlocal live
                live -= self.tensor.untyped_storage().nbytes()

        frames = clips(1, count).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            score = reward.score(frames, PROMPTS[:1])
        inside = highest
        assert live <= 3 * frames.numel() * 4  # what is left is the gradient of the frames, not a network's graph
        score.sum().backward()
        return inside

    peak(2)
    few, many = peak(4), peak(16)
    assert few > 1000
    assert many - few <= 3 * 12 * 11 * 19 * 4 * 2  # twelve more frames, and their gradient


def test_half_precision_is_near(make):
    """The gradient of a float16 network would vanish without its scale."""
    frames, results = clips(1, 2), {}
    for dtype in (torch.float32, torch.float16):
        reward, x = make(dtype), frames.clone().requires_grad_()
        score = reward.score(x, PROMPTS[:1])
        score.sum().backward()
        assert score.dtype == torch.float32
        results[dtype] = score.item(), x.grad
    exact, near = results[torch.float32], results[torch.float16]
    assert near[0] == pytest.approx(exact[0], abs=0.03 * max(1, abs(exact[0])))
    assert F.cosine_similarity(exact[1].flatten(), near[1].flatten(), dim=0) > 0.95


def test_a_gradient_that_overflows_in_half_precision_is_taken_again_smaller():
    """1024 times this one is beyond float16."""
    judge = torch.nn.Linear(3, 1, bias=False).half().requires_grad_(False)
    judge.weight.fill_(400.0)
    reward = FrameReward(_Colour(judge), "steep", reads_prompt=False)
    frames = torch.full((1, 3, 1, 2, 2), 0.5, requires_grad=True)
    reward.score(frames, [""]).sum().backward()
    torch.testing.assert_close(frames.grad, torch.full_like(frames, 100.0))


class _Colour(torch.nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, images, texts):
        return self.linear(images.mean((2, 3)).half())[:, 0]


def test_pickscore_against_transformers(reward_files):
    """The published score is ``logits_per_image`` of the model itself, padded texts masked."""
    from transformers import AutoTokenizer, CLIPModel

    frames = clips(3, 1, (16, 16))  # the model's own size: no resizing
    model = CLIPModel.from_pretrained(reward_files / "PickScore_v1").eval()
    tokens = AutoTokenizer.from_pretrained(TINY_CLIP)(PROMPTS, padding=True, return_tensors="pt")
    pixels = pre.normalize(frames[:, :, 0], pre.CLIP_MEAN, pre.CLIP_STD)
    with torch.no_grad():
        expected = model(tokens.input_ids, pixels, tokens.attention_mask).logits_per_image.diag()
    scaled = load_reward("pickscore_scaled", search=[reward_files]).score(frames, PROMPTS)
    torch.testing.assert_close(scaled, expected, rtol=1e-5, atol=1e-5)
    plain = load_reward("pickscore", search=[reward_files]).score(frames, PROMPTS)
    torch.testing.assert_close(plain * model.logit_scale.exp().detach(), expected, rtol=1e-5, atol=1e-5)


def test_hps_versions_and_preprocessings_differ(reward_files):
    wide, square = clips(1, 1, (8, 20)), clips(1, 1, (20, 20))

    def score(name, way, frames):
        options = {"preprocessing": way}
        return float(load_reward(name, search=[reward_files], options=options).score(frames, PROMPTS[:1]))

    assert score("hps_v2.1", "official", wide) != pytest.approx(score("hps_v2.1", "videox-fun", wide), abs=1e-4)
    assert score("hps_v2.1", "official", square) == pytest.approx(score("hps_v2.1", "videox-fun", square), abs=1e-6)
    assert score("hps_v2.1", "official", square) != pytest.approx(score("hps_v2", "official", square), abs=1e-4)


def test_mps_reads_the_prompt_through_its_condition(reward_files):
    """A token that the condition does not ask for is not read by the image."""
    reward = load_reward("mps", search=[reward_files])
    tokens, whole, keep = reward.judge.encode_text(PROMPTS[0])
    assert keep.any()
    images = clips(1, 1)[:, :, 0]
    moved = tokens + (~keep)[:, None] * 100.0
    same = reward.judge(images, [(moved, whole, keep)])
    torch.testing.assert_close(same, reward.judge(images, [(tokens, whole, keep)]))
    assert not torch.allclose(reward.judge(images, [(tokens, whole, ~keep | (torch.arange(12) == 0))]), same)


def test_scores_made_in_inference_mode_do_not_spoil_training(make):
    reward, frames = make(), clips(1, 1)
    with torch.inference_mode():
        reward.score(frames.clone(), PROMPTS[:1])
    frames.requires_grad_()
    reward.score(frames, PROMPTS[:1]).sum().backward()
    assert frames.grad.abs().sum() > 0


def test_remembered_texts_are_bounded(reward_files, monkeypatch):
    monkeypatch.setattr("reward_lora.reward_models.scoring.REMEMBERED_TEXTS", 2)
    reward = load_reward("pickscore", search=[reward_files])
    frames = clips(1, 1)
    scores = [float(reward.score(frames, [prompt])) for prompt in ("red", "blue", "green", "red")]
    assert scores[0] == scores[3]
    assert len(reward._texts) == 2


def test_bad_input(reward_files):
    reward = load_reward("pickscore", search=[reward_files])
    with pytest.raises(ValueError, match="2 videos need as many prompts, got 1"):
        reward.score(torch.zeros(2, 3, 1, 32, 32), ["0"])
    with pytest.raises(
        ValueError, match=r"frames must be \[B, 3, T, H, W\] with at least one frame, got \[3, 1, 8, 8\]"
    ):
        reward.score(torch.zeros(3, 1, 8, 8), ["0"])


def test_moving_forgets_the_texts_of_the_other_device(reward_files):
    reward = load_reward("pickscore", search=[reward_files])
    reward.score(clips(1, 1), PROMPTS[:1])
    assert reward.to("cpu") is reward
    assert reward._texts
    reward.to("meta")
    assert not reward._texts


@pytest.mark.parametrize(("height", "width"), [(60, 100), (100, 60), (224, 224), (225, 300), (7, 224)])
def test_preprocessing_keeps_the_middle(height, width):
    ramp = torch.linspace(0, 1, width).view(1, 1, 1, width).expand(1, 3, height, width)
    for way in (pre.resize_and_crop, pre.squash, pre.resize_and_pad):
        out = way(ramp, 224)
        assert out.shape == (1, 3, 224, 224)
        filled = out[..., 112, :] if way is pre.resize_and_pad else out
        assert float(filled[filled != 0].mean()) == pytest.approx(0.5, abs=0.01)


def test_black_bars_are_half_on_each_side():
    out = pre.resize_and_pad(torch.ones(1, 3, 10, 20), 16)
    bars = (out[0, 0, :, 8] == 0).int().tolist()
    assert bars == [1] * 4 + [0] * 8 + [1] * 4
    odd = pre.resize_and_pad(torch.ones(1, 3, 13, 20), 16)  # 10 rows of 16 stay
    assert (odd[0, 0, :, 8] == 0).int().tolist() == [1] * 3 + [0] * 10 + [1] * 3


def test_half_precision_frames_are_read_in_float32():
    images = torch.rand(1, 3, 8, 8)
    assert pre.unit_range(images.half()).dtype == torch.float32
    assert pre.unit_range(images.double()).dtype == torch.float64
    assert float(pre.unit_range(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)).min()) == 1.0
