"""Mixtures: the arithmetic of every combination, scales that learn and resume, gradients of equal say, the spelling."""

from __future__ import annotations

import pytest
import torch
from reward_lora.reward_models.mixture import WARM_UP, Mixture, MixtureSettings
from reward_lora.reward_models.protocol import Reward
from reward_lora.reward_models.spelling import Term, parse
from reward_lora.training.gradient import Walk
from reward_lora.training.judge import Objective, View, judge


class Smooth:
    """A smooth reward of all pixels, of a chosen size; every instance another function."""

    differentiable, needs = True, frozenset()

    def __init__(self, name: str, seed: int, size: float = 1.0, offset: float = 0.0) -> None:
        self.name, self.seed, self.size, self.offset = name, seed, size, offset

    def score(self, frames, prompts, *, reference=None):
        direction = torch.randn(frames[0].shape, generator=torch.Generator().manual_seed(self.seed), dtype=frames.dtype)
        inner = (frames * direction).flatten(1).mean(1)
        return self.offset + self.size * (inner.sin() + frames.square().flatten(1).mean(1))


class Still(Smooth):
    """A reward without an opinion, as a face reward on clips without a face."""

    def score(self, frames, prompts, *, reference=None):
        return frames.new_zeros(len(frames))


class Unruly(Smooth):
    """Says NaN of dark clips."""

    def score(self, frames, prompts, *, reference=None):
        value = super().score(frames, prompts)
        return torch.where(frames.flatten(1).mean(1) < 0, torch.nan, value)


A, B = Smooth("a", 1), Smooth("b", 2, 0.01, 1.0)


def clips(batch: int = 3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, 2, 4, 5, generator=generator, dtype=torch.float64)


def mixture(*rewards, weights=None, **settings) -> Mixture:
    return Mixture(rewards, weights or [1.0] * len(rewards), MixtureSettings(**settings))


def warmed(mix: Mixture, steps: int = 4) -> Mixture:
    for step in range(steps):
        mix.score(clips(4, seed=100 + step), [""] * 4)
        mix.observe(mix.terms)
    return mix


def per_sample_gradients(reward, frames) -> torch.Tensor:
    """Sample by sample, so that nothing can leak between neighbours."""
    frames = frames.clone().requires_grad_()
    return torch.cat([
        torch.autograd.grad(reward.score(frames[i : i + 1], [""]).sum(), frames)[0][i : i + 1]
        for i in range(len(frames))
    ])  # fmt: skip


def test_combinations_are_what_they_are_called():
    frames = clips()
    a, b = A.score(frames, []), B.score(frames, [])
    x = torch.stack([2 * a, -0.5 * b])
    expected = {
        "sum": 2 * a - 0.5 * b,
        "mean": (2 * a - 0.5 * b) / 2.5,
        "min": torch.minimum(2 * a, -0.5 * b),
        "softmin": -0.3 * ((-x / 0.3).exp().mean(0)).log(),
    }
    for combine, value in expected.items():
        mix = mixture(A, B, weights=[2, -0.5], combine=combine, temperature=0.3)
        torch.testing.assert_close(mix.score(frames, [""] * 3), value, msg=combine)
        assert isinstance(mix, Reward)


def test_softmin_lies_between_min_and_mean_and_reaches_both():
    frames = clips()
    x = torch.stack([A.score(frames, []), B.score(frames, [])])

    def soft(temperature):
        return mixture(A, B, combine="softmin", temperature=temperature).score(frames, [""] * 3)

    assert (x.amin(0) < soft(1.0)).all()
    assert (soft(1.0) < x.mean(0)).all()
    torch.testing.assert_close(soft(1e-3), x.amin(0), rtol=0, atol=1e-3)
    torch.testing.assert_close(soft(1e4), x.mean(0), rtol=0, atol=2e-3)


@pytest.mark.parametrize("combine", ["sum", "mean", "min", "softmin"])
@pytest.mark.parametrize("normalised", [False, True])
def test_gradient_is_exact_in_float64(combine, normalised):
    mix = warmed(mixture(A, B, Still("still", 0), weights=[1.5, -0.7, 1], combine=combine, normalised=normalised))
    frames = clips(2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: mix.score(x, ["", ""]), frames)


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("combine", ["sum", "softmin"])
def test_score_and_gradient_do_not_depend_on_neighbours(combine, balanced):
    mix = warmed(mixture(A, B, weights=[1, 0.3], combine=combine, normalised=True, balanced=balanced))
    frames = clips(3).requires_grad_()
    together = mix.score(frames, [""] * 3)
    (gradient,) = torch.autograd.grad(together.sum(), frames)
    alone = torch.cat([mix.score(frames[i : i + 1], [""]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, per_sample_gradients(mix, frames.detach()), rtol=1e-12, atol=1e-15)


def test_terms_are_what_each_reward_says_by_itself():
    mix = warmed(mixture(A, Smooth("a", 7), B, combine="min", normalised=True))
    frames = clips().requires_grad_()
    mix.score(frames, [""] * 3)
    assert list(mix.terms) == ["a", "a#2", "b"]
    torch.testing.assert_close(mix.terms["b"], B.score(frames, []).detach())
    assert not mix.terms["b"].requires_grad


def test_needs_and_differentiability_are_those_of_all():
    reads, blind = Smooth("reads", 1), Smooth("blind", 2)
    reads.needs, blind.needs, blind.differentiable = frozenset({"prompt"}), frozenset({"reference"}), False
    mix = mixture(reads, blind, balanced=True)
    assert mix.needs == {"prompt", "reference"}
    assert not mix.differentiable
    assert mixture(A, B).differentiable
    assert mixture(A, B).per_frame
    blind.per_frame = False
    assert not mixture(A, blind).per_frame
    torch.testing.assert_close(mix.score(clips(), [""] * 3), reads.score(clips(), []) + blind.score(clips(), []))


def test_balanced_gradients_all_have_the_mean_norm_and_keep_their_direction():
    frames = clips()
    a, b = per_sample_gradients(A, frames), per_sample_gradients(B, frames)

    def norm(g):
        return g.flatten(1).norm(dim=1).view(-1, 1, 1, 1, 1)

    common = (norm(a) + norm(b)) / 2
    assert (norm(a) / norm(b) > 30).all(), "otherwise this shows nothing"
    expected = common * (2 * a / norm(a) - 0.5 * b / norm(b))
    mix = mixture(A, B, Still("still", 0), weights=[2, -0.5, 1], balanced=True)
    torch.testing.assert_close(per_sample_gradients(mix, frames), expected)
    plain = mixture(A, B, Still("still", 0), weights=[2, -0.5, 1])
    torch.testing.assert_close(mix.score(frames, [""] * 3), plain.score(frames, [""] * 3), rtol=0, atol=0)


def test_a_term_with_a_hundred_times_the_gradient_does_not_dominate():
    """Following the mixture's gradient, both terms rise where they are balanced; else the loud one alone."""
    quiet, loud = Smooth("quiet", 1), Smooth("loud", 2, size=100.0)

    def shares(**settings):
        followed = per_sample_gradients(mixture(quiet, loud, **settings), clips()).flatten(1)
        alone = [per_sample_gradients(term, clips()).flatten(1) for term in (quiet, loud)]
        return [torch.cosine_similarity(followed, part).mean() for part in alone]

    plain, balanced = shares(), shares(balanced=True)
    assert plain[1] > 0.999 > 0.9 > plain[0]
    assert balanced[0] == pytest.approx(balanced[1].item(), abs=1e-9)
    assert balanced[0] > plain[0]


def test_balancing_one_term_changes_nothing():
    frames = clips()
    torch.testing.assert_close(
        per_sample_gradients(mixture(A, balanced=True), frames), per_sample_gradients(A, frames), rtol=1e-12, atol=0
    )


def test_balanced_and_normalised_follow_the_combination():
    """With softmin, each term's share of the gradient is its softmin weight."""
    mix = warmed(mixture(A, B, combine="softmin", temperature=0.7, normalised=True, balanced=True))
    frames = clips(1)
    state = mix.state()
    deviation = (state["squares"] / state["count"]).sqrt()
    mix.score(frames, [""])
    x = (torch.stack(list(mix.terms.values()))[:, 0] - state["mean"]) / deviation
    share = (-x / 0.7).softmax(0)
    a, b = (per_sample_gradients(r, frames) / d for r, d in zip((A, B), deviation, strict=True))
    common = (a.norm() + b.norm()) / 2
    expected = common * (share[0] * a / a.norm() + share[1] * b / b.norm())
    torch.testing.assert_close(per_sample_gradients(mix, frames), expected)


def test_running_statistics_are_exact_whatever_the_parts():
    values = {"a": torch.randn(40, dtype=torch.float64) * 3 + 1e4, "b": torch.rand(40, dtype=torch.float64)}
    states = []
    for sizes in ((40,), (1,) * 40, (7, 1, 20, 12)):
        mix, start = mixture(A, B, normalised=True), 0
        for size in sizes:
            mix.observe({name: value[start : start + size] for name, value in values.items()})
            start += size
        states.append(mix.state())
    for state in states:
        assert int(state["count"]) == 40
        for i, value in enumerate(values.values()):
            assert float(state["mean"][i]) == pytest.approx(float(value.mean()), rel=1e-12)
            assert float(state["squares"][i] / 40) == pytest.approx(float(value.var(unbiased=False)), rel=1e-9)


def test_normalised_terms_have_mean_zero_and_deviation_one_over_what_was_seen():
    frames = clips(16)
    mix = mixture(A, B, weights=[1, 1], normalised=True)
    raw = mix.score(frames, [""] * 16)
    torch.testing.assert_close(raw, A.score(frames, []) + B.score(frames, []))  # nothing seen yet
    mix.observe(mix.terms)
    score = mix.score(frames, [""] * 16)
    assert abs(float(score.mean())) < 1e-9
    parts = [(r.score(frames, []) - r.score(frames, []).mean()) / r.score(frames, []).std(correction=0) for r in (A, B)]
    torch.testing.assert_close(score, parts[0] + parts[1])


def test_few_or_equal_or_broken_values_do_no_harm():
    mix = mixture(Smooth("c", 3, size=0.0, offset=4.0), normalised=True)
    mix.observe({"c": torch.full((WARM_UP - 1,), 4.0)})
    assert float(mix.score(clips(1), [""])) == 4.0  # still raw
    mix.observe({"c": torch.tensor([4.0, torch.nan, torch.inf])})
    assert int(mix.state()["count"]) == WARM_UP
    score = mix.score(clips(1), [""])
    assert float(score) == 0.0
    two = mixture(A, Unruly("u", 4), normalised=True)
    two.score(torch.cat([clips(1), -clips(1)]), ["", ""])
    two.observe(two.terms)
    assert int(two.state()["count"]) == 1


def test_scoring_moves_no_statistics_and_a_resumed_run_repeats_the_uninterrupted_one():
    def run(mix, steps):
        seen = []
        for step in steps:
            seen.append(mix.score(clips(4, seed=step), [""] * 4))
            mix.score(clips(9, seed=1000 + step), [""] * 9)  # an evaluation
            mix.score(clips(4, seed=step), [""] * 4)
            mix.observe(mix.terms)
        return torch.stack(seen)

    def make():
        return mixture(A, B, combine="softmin", normalised=True)

    whole = run(make(), range(10))
    first = make()
    before = run(first, range(6))
    saved = {name: value.clone() for name, value in first.state().items()}
    run(first, range(6, 8))  # steps that are lost
    second = make()
    second.load_state(saved)
    assert torch.equal(torch.cat([before, run(second, range(6, 10))]), whole)
    second.load_state({})
    assert torch.equal(run(second, range(10)), whole)
    with pytest.raises(ValueError, match="is that of 2 rewards, and a has 1"):
        mixture(A).load_state(saved)


def test_judge_takes_the_gradient_of_a_mixture_as_it_is(wan, reward):
    conditioning = wan.conditioning([torch.zeros(3, 8)] * 2, None, (4, 2, 4, 4))
    latents = wan.initial_latents((4, 2, 4, 4), [3, 4])
    walk = Walk(wan, conditioning, 1.0)

    def gradient(mix):
        return judge(walk, latents, mix, ["", ""], Objective(), View(0))

    plain, doubled = gradient(reward), gradient(mixture(reward, reward, balanced=True))
    torch.testing.assert_close(doubled.gradient, 2 * plain.gradient)
    torch.testing.assert_close(doubled.rewards, 2 * plain.rewards)


@pytest.mark.parametrize(
    ("text", "terms", "settings"),
    [
        ("tiny_clip", [Term("tiny_clip")], {}),
        ("hps_v2.1*0.5+aesthetic_v2*0.1", [Term("hps_v2.1", 0.5), Term("aesthetic_v2", 0.1)], {}),
        (" a * 2 + b * -0.5 ", [Term("a", 2), Term("b", -0.5)], {}),
        ("hps[preprocessing=official, x=a+b]*2", [Term("hps", 2, {"preprocessing": "official", "x": "a+b"})], {}),
        ("./mine.py:Red+a", [Term("./mine.py:Red"), Term("a")], {}),
        ("min(a+b[x=1,y=2]*3)", [Term("a"), Term("b", 3, {"x": "1", "y": "2"})], {"combine": "min"}),
        (
            "softmin( a+b , temperature=0.1, normalised, balanced )",
            [Term("a"), Term("b")],
            {"combine": "softmin", "temperature": 0.1, "normalised": True, "balanced": True},
        ),
    ],
)
def test_spelling(text, terms, settings):
    spelling = parse(text)
    assert spelling.terms == tuple(terms)
    assert spelling.settings == MixtureSettings(**settings)


@pytest.mark.parametrize(
    "text",
    ["a", "a*2", "a+b*-0.25", "mean(a+b)", "softmin(a+b*3, temperature=0.1, normalised, balanced)", "sum(a, balanced)"],
)
def test_name_of_a_mixture_is_its_spelling(text):
    reward = parse(text).load(lambda name, options: Smooth(name, 1))
    assert reward.name == text
    assert isinstance(reward, Mixture) == (text != "a")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "'' in the reward '' is no term"),
        ("a+", "'' in the reward 'a\\+' is no term"),
        ("a*two", "'two' in the reward 'a\\*two' is no number"),
        ("a*0+b", "weight of a must be a number other than 0, got 0"),
        ("a*nan+b", "weight of a must be a number other than 0, got nan"),
        ("a*2*3", "is no term"),
        ("a[x]", "'x' in the reward .* is no option; write NAME\\[option=value\\]"),
        ("max(a+b)", "'max' in the reward .* known are sum, mean, min, softmin"),
        ("min(a+b, fast)", "'fast' in the reward .* is no setting; known are temperature"),
        ("softmin(a, temperature=0)", "temperature must be above 0, got 0"),
        ("min(a+b", "is no term"),
    ],
)
def test_bad_spelling_is_answered_in_a_sentence(text, words):
    with pytest.raises(ValueError, match=words):
        parse(text).load(lambda name, options: Smooth(name, 1))


def test_a_mixture_in_a_mixture_is_refused():
    with pytest.raises(ValueError, match="a\\+b is a mixture already"):
        mixture(mixture(A, B), A)
    with pytest.raises(ValueError, match="one weight a reward, got 2 and 1"):
        Mixture([A, B], [1.0])
