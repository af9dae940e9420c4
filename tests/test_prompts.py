"""Prompt files, settings, and what bad ones are told."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from reward_lora.training.config import TrainConfig
from reward_lora.training.media import read_video, write_video
from reward_lora.training.prompts import PromptFileError, read_prompts
from reward_lora.training.seeds import draw_prompts, seed_for


def test_text_and_jsonl(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffa red circle\n\n  ein grüner Kreis  \r\n".encode())
    assert read_prompts(tmp_path / "a.txt") == ["a red circle", "ein grüner Kreis"]
    (tmp_path / "a.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two", "x": 1}\n', encoding="utf-8")
    assert read_prompts(tmp_path / "a.jsonl") == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"", "holds no prompt"),
        ("a.txt", b" \n\n", "holds no prompt"),
        ("a.txt", b"good\nb\xe4d\n", r"not UTF-8 text \(line 2\)"),
        ("a.jsonl", b'{"prompt": "one"}\nnonsense', "line 2: expected an object"),
        ("a.jsonl", b'{"text": "one"}', "line 1: expected an object"),
        ("b.txt", None, "no such prompt file"),
    ],
)
def test_bad_prompt_files(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(PromptFileError, match=words):
        read_prompts(tmp_path / name)


def test_every_prompt_is_drawn_once_before_any_comes_again():
    drawn = [i for draw in range(10) for i in draw_prompts(5, 7, draw, 3)]
    for epoch in range(6):
        assert sorted(drawn[5 * epoch : 5 * epoch + 5]) == [0, 1, 2, 3, 4]
    assert len({tuple(drawn[5 * e : 5 * e + 5]) for e in range(6)}) > 1


def test_seeds_depend_on_everything():
    seeds = {seed_for(name, a, b) for name in "xy" for a in range(20) for b in range(20)}
    assert len(seeds) == 800
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_config_round_trip_and_fingerprint():
    config = TrainConfig(learning_rate=3e-4, lora_targets=("q",))
    assert TrainConfig.from_dict(config.to_dict()) == config
    assert TrainConfig.from_dict({"learning_rate": "3e-4"}).learning_rate == 3e-4
    assert replace(config, steps=7, save_every=3).fingerprint() == config.fingerprint()
    assert replace(config, seed=7).fingerprint() != config.fingerprint()
    assert (
        replace(config, lr_schedule="cosine", steps=7).fingerprint()
        != replace(config, lr_schedule="cosine").fingerprint()
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be above 0"),
        ({"rank": -1}, "rank must be at least 1"),
        ({"beta2": 1.0}, "beta2"),
        ({"lr_schedule": "step"}, "lr_schedule must be one of"),
        ({"ranks": 4}, "unknown setting 'ranks'"),
        ({"backprop": {"strategy": "all"}}, "strategy must be one of"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        TrainConfig.from_dict(settings)


def test_settings_are_checked_against_the_model(wan):
    config = TrainConfig(backprop=TrainConfig().backprop)
    filled = config.for_model(wan.spec)
    assert (filled.width, filled.height, filled.frames, filled.sampler_steps) == (8, 8, 3, 6)
    for settings, words in (
        ({"frames": 82}, "2n\\+1.*got 82; the nearest is"),
        ({"height": 250}, "multiples of 4.*250; the nearest is 8x248"),
        ({"judged_latents": 3}, "at most 2"),
        ({"sampler_steps": 3}, "at most the 3 solver steps"),
    ):
        with pytest.raises(ValueError, match=words):
            replace(config, **settings).for_model(wan.spec)


def test_learning_rate_schedules():
    config = TrainConfig(steps=10, learning_rate=1.0, warmup_steps=2)
    assert [config.lr_at(s) for s in (0, 1, 2, 9)] == [0.5, 1.0, 1.0, 1.0]
    linear = replace(config, lr_schedule="linear")
    assert [linear.lr_at(s) for s in (2, 6, 10)] == [1.0, 0.5, 0.0]
    assert replace(config, lr_schedule="cosine").lr_at(6) == pytest.approx(0.5)


def test_video_round_trip(tmp_path):
    ramp = torch.linspace(0.1, 0.9, 5).view(1, 5, 1, 1).expand(3, 5, 64, 64)
    path = write_video(tmp_path / "a.mp4", ramp, 8)
    video = read_video(path)
    assert video.shape == (3, 5, 256, 256)  # small frames are enlarged for the eye
    torch.testing.assert_close(video.mean((0, 2, 3)), ramp.mean((0, 2, 3)), atol=0.03, rtol=0)
    titled = path.read_bytes().replace(b"Lavf", "Bär".encode("latin-1") + b"f")
    (tmp_path / "titled.mp4").write_bytes(titled)
    assert titled != path.read_bytes()
    assert torch.equal(read_video(tmp_path / "titled.mp4"), video)
    (tmp_path / "b.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match="cannot be read"):
        read_video(tmp_path / "b.mp4")
