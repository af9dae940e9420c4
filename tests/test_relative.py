"""Relative words: a difference of two scores, its gradient, its spelling, and who refuses it."""

from __future__ import annotations

import pytest
import torch
from reward_lora.cli.shared import find_reward
from reward_lora.reward_models import load_reward
from reward_lora.reward_models.mixture import Mixture
from reward_lora.reward_models.protocol import Reward
from reward_lora.reward_models.relative import Relative, Words
from reward_lora.reward_models.spelling import Term, parse
from reward_lora.selfcheck.exactness import ToyReward

PROMPTS = ["a red circle moves right on a blue background", "a green square moves left on a white background"]
WORDS = Words("a red circle", "a green square")


@pytest.fixture(scope="module")
def frames():
    return torch.rand(2, 3, 2, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def clip():
    return load_reward("tiny_clip")


def test_it_is_the_difference_of_two_prompts_with_its_gradient(clip, frames):
    reward = Relative(clip, WORDS)
    assert isinstance(reward, Reward)
    seen, plain = frames.clone().requires_grad_(), frames.clone().requires_grad_()
    wanted = clip.score(plain, [f"a red circle. {prompt}" for prompt in PROMPTS])
    expected = wanted - clip.score(plain, [f"a green square. {prompt}" for prompt in PROMPTS])
    scores = reward.score(seen, PROMPTS)
    torch.testing.assert_close(scores, expected)
    (ours,) = torch.autograd.grad(scores.sum(), seen)
    (theirs,) = torch.autograd.grad(expected.sum(), plain)
    torch.testing.assert_close(ours, theirs)
    assert float(ours.abs().max()) > 0


def test_a_liking_for_any_picture_falls_out(clip, frames):
    class Biased:
        """Likes bright pictures, whatever the prompt."""

        name, differentiable, needs = "biased", True, frozenset({"prompt"})

        def score(self, frames, prompts, *, reference=None):
            return clip.score(frames, prompts) + 5 * frames.flatten(1).mean(1)

    torch.testing.assert_close(
        Relative(Biased(), WORDS).score(frames, PROMPTS),
        Relative(clip, WORDS).score(frames, PROMPTS),
        atol=1e-5,
        rtol=0,
    )


def test_one_phrase_is_compared_with_the_prompt_itself(clip, frames):
    only = Relative(clip, Words(positive="a red circle")).score(frames, PROMPTS)
    with_it = clip.score(frames, [f"a red circle. {prompt}" for prompt in PROMPTS])
    torch.testing.assert_close(only, with_it - clip.score(frames, PROMPTS))
    other = Relative(clip, Words(negative="a red circle")).score(frames, PROMPTS)
    torch.testing.assert_close(other, -only)


def test_its_name_is_its_spelling_alone_and_in_a_mixture():
    text = "tiny_clip[positive=a red circle, negative=CG Render]"
    reward = find_reward(text, None, "cpu")
    assert (reward.name, reward.words) == (text, Words("a red circle", "CG Render"))
    mixed = find_reward(f"{text}*2+motion", None, "cpu")
    assert isinstance(mixed, Mixture)
    assert mixed.name == f"{text}*2+motion"
    term = parse("hps[positive=x, preprocessing=vader]").terms[0]
    assert term == Term("hps", 1.0, {"preprocessing": "vader"}, Words("x"))


def test_a_reward_that_does_not_read_the_prompt_refuses_words():
    with pytest.raises(ValueError, match="motion does not read the prompt, so the words positive=fast would change"):
        find_reward("motion[positive=fast]", None, "cpu")
    with pytest.raises(ValueError, match="toy does not read the prompt"):
        Relative(ToyReward(), Words("x"))
    with pytest.raises(ValueError, match="must be different words, got 'x' for both"):
        find_reward("tiny_clip[positive=x, negative=x]", None, "cpu")
