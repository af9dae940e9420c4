"""Paired comparison: the interval means what it says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reward_lora.training.compare import difference_picture, frame_picture, paired_difference, ranking_picture


def test_mean_and_interval_agree_with_theory_on_many_pairs():
    generator = np.random.default_rng(1)
    a = generator.normal(5, 1, 400)  # what differs between prompts must not blur the difference
    b = a + generator.normal(0.1, 0.2, 400)
    result = paired_difference(a.tolist(), b.tolist())
    error = np.std(b - a) / np.sqrt(400)
    assert result.mean == pytest.approx(np.mean(b - a))
    assert result.low == pytest.approx(result.mean - 1.96 * error, abs=0.1 * error)
    assert result.high == pytest.approx(result.mean + 1.96 * error, abs=0.1 * error)
    assert result.verdict == "B is better"
    assert paired_difference(b.tolist(), a.tolist()).verdict == "A is better"


def test_interval_covers_the_truth_about_as_often_as_it_promises():
    generator, covered = np.random.default_rng(2), 0
    for _ in range(100):
        result = paired_difference([0.0] * 40, generator.normal(1, 1, 40).tolist())
        covered += result.low <= 1 <= result.high
    assert 88 <= covered <= 99


def test_same_numbers_give_the_same_interval_and_noise_shows_no_difference():
    values = np.random.default_rng(3).normal(0, 1, 20)
    first, again = (paired_difference([0.0] * 20, (values - values.mean()).tolist()) for _ in range(2))
    assert (first.low, first.high) == (again.low, again.high)
    assert first.verdict == "no difference shown"
    assert first.describe("hps").startswith("hps: no difference shown; A 0.0000")


def test_nothing_is_claimed_of_few_pairs():
    assert paired_difference([0.0] * 5, [1.0] * 5).verdict == "5 pairs are too few to tell"
    assert paired_difference([0.0] * 6, [1.0] * 6).verdict == "B is better"


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        ([1.0], [2.0], "at least 2 pairs"),
        ([1.0, 2.0], [1.0], "got 2 and 1"),
        ([1.0, 2.0], [1.0, np.nan], "not a finite"),
    ],
)
def test_what_cannot_be_compared(a, b, words):
    with pytest.raises(ValueError, match=words):
        paired_difference(a, b)


def test_pictures_show_their_numbers():
    """More frames, terms and clips make larger pictures, and other numbers other pictures."""
    one = frame_picture({"a": [0.1, 0.2]}, {"a": 0.15})
    assert one.dtype == np.uint8
    assert frame_picture({"a": [0.1, 0.2], "b": [1, 2]}, {"a": 0.15, "b": 1.5}).shape[0] > one.shape[0]
    clips = [torch.rand(3, 5, 32, 48), torch.rand(3, 1, 32, 32), torch.rand(3, 2, 64, 32), torch.rand(3, 9, 8, 8)]
    small = ranking_picture(clips[:3], [1.0, 3.0, 2.0], [1, 2, 0], "a")
    assert ranking_picture(clips, [1.0, 3.0, 2.0, 0.0], [1, 2, 0, 3], "a").shape[0] > small.shape[0]
    up, down = (difference_picture(paired_difference([0.0, 0.0], [x, 2 * x]), "a") for x in (1.0, -1.0))
    assert up.shape == down.shape
    assert not np.array_equal(up, down)
