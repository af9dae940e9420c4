"""Face identity, end to end: an image-to-video model learns from clips with faces, on tiny nets of the real layouts.

The nets of faces are those of ``test_face``, where whatever is bright is a face.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from reward_lora.cli.shared import read_recipe
from reward_lora.reward_models import load_reward
from reward_lora.tests.families import Case
from reward_lora.training.config import TrainConfig
from reward_lora.training.events import TrainingStopped
from reward_lora.training.examples import read_examples
from reward_lora.training.media import write_video
from reward_lora.training.trainer import Trainer
from reward_lora.video_models import load_video_model

from .test_face import pack, portraits  # noqa: F401 - a fixture

SIZE = {"width": 64, "height": 64, "frames": 5}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    found = {}
    for layout in ("2.1 original inp", "2.2 original i2v pair"):
        Case("wan", layout).write(folder / layout)
        found[layout] = load_video_model(folder / layout, dtype="float32")
    return found


def dataset(folder, light):
    """A folder as ROLL's, with a clip of somebody, or of the dark."""
    write_video(folder / "a.mp4", portraits(5, height=128, width=128)[0] * light, 8)
    (folder / "metadata.csv").write_text('video,prompt\na.mp4,"a woman is smiling"\n')
    return read_examples(folder)


def test_rolls_recipe_is_rolls_algorithm(models):
    """Noise levels, experts and trained steps as its code has them, and its loss but for a constant."""
    config = TrainConfig.from_dict(read_recipe("wan2.2-i2v-a14b-face")["config"])
    model = models["2.2 original i2v pair"]
    sigmas = model.sigmas(config.sampler_steps)
    published = [1.0, 0.9722, 0.9375, 0.8929, 0.8333, 0.75, 0.625, 0.4167, 0.0]
    assert sigmas.tolist() == pytest.approx(published, abs=5e-5)
    works = [model.spec.expert_at(sigma) for sigma in sigmas[:-1]]
    assert works == ["high"] * 3 + ["low"] * 5
    assert config.experts == ("low",)
    low = [step for step, expert in enumerate(works) if expert == "low"]
    assert config.backprop.draw(sigmas, 0, low).trained == (4, 5, 6, 7)
    assert (config.backprop.coupling, config.guidance_scale, config.anchor, config.anchor_by_sigma) == (1, 1, 1, True)
    scores = torch.tensor([-0.2, 0.3, 0.9])
    assert float((config.objective(scores) + (scores - 0.54) / 0.16 * 0.1).std()) < 1e-6


def test_rolls_recipe_trains_on_a_clip_with_a_face(models, pack, tmp_path):  # noqa: F811
    """Its schedule, expert, anchor and objective; one batch a step, small pictures, and a LoRA of rank 2."""
    (tmp_path / "data").mkdir()
    recipe = TrainConfig.from_dict(read_recipe("wan2.2-i2v-a14b-face")["config"])
    config = replace(recipe, **SIZE, steps=2, accumulation=1, rank=2, sample_every=2, sample_count=1, sweep=False)
    face = load_reward("face", pack)
    trainer = Trainer(models["2.2 original i2v pair"], face, dataset(tmp_path / "data", 1), config, tmp_path / "run")
    before, first, second = list(trainer)
    assert [first.skipped, second.skipped] == ["", ""]
    assert 0 < first.grad_norm < float("inf")
    assert second.drift > 0  # the anchor saw what the first step changed
    assert -1 <= before.evaluation.reward <= 1
    assert face.counts[0].faces > 0
    assert (face.counts[0].reference_frames, face.counts[0].reference_faces) == (4, 4)
    assert list(trainer.lora_paths) == ["low"]


def test_without_a_face_the_step_is_skipped_with_a_word(models, pack, tmp_path):  # noqa: F811
    (tmp_path / "data").mkdir()
    config = TrainConfig(**SIZE, steps=3, rank=2, sampler_steps=2, max_skipped=2, judged_latents=0, sample_every=0)
    config = replace(config, backprop=replace(config.backprop, num_steps=1))
    examples = dataset(tmp_path / "data", 0)
    trainer = Trainer(models["2.1 original inp"], load_reward("face", pack), examples, config, tmp_path / "run")
    events = []
    with pytest.raises(TrainingStopped, match="2 steps in a row were skipped"):
        events.extend(iter(trainer))
    assert ["no face" in event.skipped for event in events] == [False, True, True]
    assert torch.isnan(torch.tensor(events[1].grad_norm))
