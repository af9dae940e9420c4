"""The CLIP-cosine reward: parity with PickScore as published, and the promises of the protocol."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from reward_lora.reward_models import REWARDS, load_reward
from reward_lora.reward_models.clip_score import ClipScore
from reward_lora.reward_models.preprocess import resize_and_crop
from reward_lora.reward_models.protocol import Reward
from safetensors.torch import load_file

FIXTURE = Path(__file__).parent / "fixtures" / "rewards"


class GivenIds:
    """A tokenizer for prompts that are numbers of given rows of ids."""

    def __init__(self, ids):
        self._ids = ids

    def __call__(self, prompt, **options):
        return {"input_ids": self._ids[int(prompt)][None]}


@pytest.fixture(scope="module")
def io():
    return load_file(FIXTURE / "io.safetensors")


@pytest.fixture
def pickscore(io):
    from transformers import CLIPConfig, CLIPModel

    config = json.loads((FIXTURE / "meta.json").read_text())["configs"]["pickscore"]
    model = CLIPModel(
        CLIPConfig(text_config=config["text"], vision_config=config["vision"], projection_dim=config["projection_dim"])
    )
    weights = {key: value.float() for key, value in load_file(FIXTURE / "pickscore_clip.safetensors").items()}
    model.load_state_dict(weights)
    return ClipScore(model, GivenIds(io["prompt_ids"]), "pickscore")


def test_against_pickscore_as_videox_fun_runs_it(pickscore, io):
    frames = (io["frames_u8"].float() / 255).requires_grad_()
    scores = pickscore.score(frames, ["0", "1"])
    torch.testing.assert_close(scores.detach(), io["pickscore.reward_per_sample"], rtol=0, atol=1e-5)
    (1 - scores).abs().mean().backward()
    stride = json.loads((FIXTURE / "meta.json").read_text())["grad_stride"]
    reference = io["pickscore.grad_frames"]
    ours = frames.grad[..., ::stride, ::stride]
    assert float((ours - reference).norm() / reference.norm()) < 1e-3


def test_published_scale(pickscore, io):
    frames = io["frames_u8"].float() / 255
    plain = pickscore.score(frames, ["0", "1"])
    pickscore.scaled = True
    torch.testing.assert_close(pickscore.score(frames, ["0", "1"]), plain * pickscore.model.logit_scale.exp())


def test_a_score_does_not_depend_on_its_neighbours(pickscore, io):
    frames = io["frames_u8"].float() / 255
    together = pickscore.score(frames, ["0", "1"])
    alone = torch.cat([pickscore.score(frames[i : i + 1], [str(i)]) for i in range(2)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    assert together.dtype == torch.float32
    assert isinstance(pickscore, Reward)


def test_more_frames_than_fit_at_once(pickscore, io):
    frames = io["frames_u8"].float() / 255
    many = frames[:1].repeat(1, 1, 20, 1, 1)  # 40 frames: two parts
    torch.testing.assert_close(pickscore.score(many, ["0"]), pickscore.score(frames[:1], ["0"]), rtol=1e-5, atol=1e-6)


def test_bad_input(pickscore, tmp_path):
    with pytest.raises(ValueError, match="2 videos need as many prompts, got 1"):
        pickscore.score(torch.zeros(2, 3, 1, 32, 32), ["0"])
    with pytest.raises(ValueError, match="unknown reward 'beauty'; known are tiny_clip"):
        load_reward("beauty")
    with pytest.raises(ValueError, match="PickScore_v1 .*download it and give its path"):
        load_reward("pickscore")
    with pytest.raises(ValueError, match="pickscore lacks PickScore_v1, CLIP-ViT-H-14"):
        load_reward("pickscore", tmp_path)
    assert all(entry.summary for entry in REWARDS.values())


@pytest.mark.parametrize(("height", "width"), [(60, 100), (100, 60), (224, 224), (225, 300)])
def test_short_side_and_centre_crop(height, width):
    """A ramp keeps its middle in the middle."""
    ramp = torch.linspace(0, 1, width).view(1, 1, 1, width).expand(1, 3, height, width)
    out = resize_and_crop(ramp, 224)
    assert out.shape == (1, 3, 224, 224)
    assert float(out.mean()) == pytest.approx(0.5, abs=0.01)
