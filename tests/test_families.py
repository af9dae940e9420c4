"""Every family in every published layout: a tiny random checkpoint loads, paints, learns, and is told from a bad one.

The checkpoints are written by ``tests/families``; a family that has a module there is tested here.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from reward_lora import files
from reward_lora.lora.adapter import LoraUse, applied
from reward_lora.lora.files import read_lora
from reward_lora.selfcheck.exactness import ToyReward
from reward_lora.tests.families import Case, cases
from reward_lora.training.config import TrainConfig
from reward_lora.training.sample import sample_prompt
from reward_lora.training.schedule import BackpropSchedule
from reward_lora.training.trainer import Trainer
from reward_lora.video_models import FAMILIES, WeightFileError, load_video_model
from reward_lora.video_models.protocol import VideoModel
from safetensors.torch import load_file, save_file

CASES = cases()
RECIPES = Path(files.__file__).parent / "recipes"
PROMPT = "a red circle moves right"


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request) -> Case:
    return request.param


@pytest.fixture(scope="module")
def folder(case, tmp_path_factory):
    """The checkpoint; read, never changed."""
    where = tmp_path_factory.mktemp(str(case).replace(" ", "-").replace(",", "")) / "model"
    case.write(where)
    return where


@pytest.fixture
def copy(folder, tmp_path):
    """A checkpoint to spoil."""
    return shutil.copytree(folder, tmp_path / "copy")


def load(source, **options) -> VideoModel:
    return load_video_model(source, dtype="float32", **options)


def paint(model, case, **options):
    width, height, frames = case.size
    settings = {"seed": 3, "steps": 3, "guidance_scale": 2.0, "width": width, "height": height, "frames": frames}
    return sample_prompt(model, PROMPT, **settings | options)


def test_there_is_a_checkpoint_of_every_family():
    assert {case.family for case in CASES} == {name.removesuffix("_files") for name in FAMILIES}


def test_a_checkpoint_paints_learns_and_its_lora_repeats_what_was_learned(case, folder, tmp_path):
    model = load(case.source(folder))
    spec, (width, height, frames) = model.spec, case.size
    assert isinstance(model, VideoModel)
    assert tuple(model.denoisers) == spec.experts
    assert not any(p.requires_grad for network in model.denoisers.values() for p in network.parameters())
    base = paint(model, case)
    assert base.shape == (1, 3, frames, height, width)
    assert torch.isfinite(base).all()
    assert base.min() >= 0
    assert base.max() <= 1
    assert base.std() > 1e-3, "a constant picture teaches nothing"
    assert torch.equal(base, paint(model, case))

    config = TrainConfig(
        steps=3, rank=2, network_alpha=1, learning_rate=0.05, width=width, height=height, frames=frames,
        sampler_steps=3, guidance_scale=2.0, backprop=BackpropSchedule("tail", 3), sample_every=3, sample_count=1,
        sweep=False, save_dtype="float32",
    )  # fmt: skip
    trainer = Trainer(model, ToyReward(), [PROMPT], config, tmp_path / "run")
    events = list(trainer)
    assert [event.skipped for event in events] == [""] * 4
    assert all(event.grad_norm > 0 for event in events[1:])
    assert torch.equal(base, paint(model, case)), "training left a trace in the model"

    uses = [LoraUse(read_lora(path), 1.0) for path in trainer.lora_paths.values()]
    assert len(uses) == len(spec.experts)
    with applied(model, uses):
        taught = paint(model, case)
    assert not torch.equal(taught, base)
    again = load(case.source(folder))
    assert torch.equal(paint(again, case), base)
    with applied(again, uses) as reports:
        assert torch.equal(paint(again, case), taught)
    assert not any("not in this model" in report for report in reports)


def test_16_bits_load_and_paint(case, folder):
    model = load_video_model(case.source(folder), dtype="bfloat16")
    assert any(p.dtype == torch.bfloat16 for network in model.denoisers.values() for p in network.parameters())
    frames = paint(model, case)
    assert frames.dtype == torch.float32
    assert torch.isfinite(frames).all()


def test_wrong_sizes_and_counts_are_answered_with_the_nearest(case, folder):
    spec = load(case.source(folder), text=False).spec
    width, height, frames = case.size
    spec.check_size(width, height, frames)
    with pytest.raises(ValueError, match=f"got {width + 1}x{height}; the nearest is {width}x{height}"):
        spec.check_size(width + 1, height, frames)
    # A model without strides in time paints any number of frames, but not none.
    wrong = next((count for count in range(frames, frames + 20) if spec.nearest_frames(count) != count), 0)
    with pytest.raises(ValueError, match=f"got {wrong}; the nearest is {spec.nearest_frames(wrong)}"):
        spec.check_size(width, height, wrong)
    spec.check_size(width, height, spec.nearest_frames(wrong))
    spec.check_size(spec.width, spec.height, spec.frames)


def weight_files(folder):
    return [p for p in sorted(folder.rglob("*")) if p.suffix in (".safetensors", ".pth", ".bin", ".ckpt", ".pt")]


def use_every_part(case, source) -> None:
    """Load, and ask for what is loaded late."""
    model = load(source)
    width, height, frames = case.size
    shape, texts = model.spec.latent_shape(width, height, frames), model.encode_text([PROMPT])
    images = {"start_image": torch.zeros(1, 3, height, width)} if model.spec.image_to_video else {}
    model.conditioning(texts, None, shape, **images)


def assert_refused(case, source, *words) -> None:
    with pytest.raises(WeightFileError) as caught:
        use_every_part(case, source)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_every_truncated_file_is_named(case, copy):
    source = case.source(copy)
    for path in weight_files(copy):
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) * 2 // 3])
        assert_refused(case, source, path.name)
        path.write_bytes(whole)


def test_every_missing_file_is_named(case, copy):
    """A shard by its name; a whole part by the name of its folder or file."""
    source = case.source(copy)
    for path in weight_files(copy):
        aside = path.rename(path.with_name("aside"))
        stem = path.name.partition(".")[0]
        assert_refused(case, source, stem if any(path.parent.glob("*.index.json")) else str(path.parent.name))
        aside.rename(path)


def test_every_file_of_another_model_is_said_not_to_fit(case, copy):
    """In place of each file a sound one of another kind of network."""
    source = case.source(copy)
    for path in weight_files(copy):
        whole = path.read_bytes()
        foreign = {"layers.0.attention.wq.weight": torch.zeros(4, 4), "layers.0.norm.weight": torch.zeros(4)}
        save_file(foreign, path) if path.suffix == ".safetensors" else torch.save(foreign, path)
        assert_refused(case, source, path.parent.name)
        path.write_bytes(whole)


def test_weights_of_another_size_are_said_not_to_fit(case, copy):
    """The same names, one shape off: another size of the same model."""
    source = case.source(copy)
    for path in (p for p in weight_files(copy) if p.suffix == ".safetensors"):
        tensors = load_file(path)
        name = max(tensors, key=lambda key: (tensors[key].dim(), key))
        save_file(tensors | {name: torch.zeros(*(n + 1 for n in tensors[name].shape))}, path)
        assert_refused(case, source)
        save_file(tensors, path)


def test_a_recipe_that_a_model_names_is_there(case, folder):
    recipe = load(case.source(folder), text=False).spec.recipe
    assert not recipe or (RECIPES / f"{recipe}.yaml").is_file()
