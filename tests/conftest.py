"""What several tests share: a tiny random Wan, an adapter with weights in it, and a smooth toy reward."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from reward_lora.lora.adapter import inject_new
from reward_lora.selfcheck.exactness import LATENT_SHAPE, ToyReward, tiny_wan
from reward_lora.training.config import TrainConfig
from reward_lora.training.schedule import BackpropSchedule

from .reward_checkpoints import OPEN_CLIP, write_all

FIXTURES = Path(__file__).parent / "fixtures"


def pytest_collection_modifyitems(items):
    """Modules with slow tests come first: one that was begun last would leave the other processors idle."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def log_levels_are_left_alone():
    """Fails a test after which the package's loggers say more or less to the tests that follow."""
    yield
    assert {name: log.level for name, log in logging.root.manager.loggerDict.items()
            if name.startswith("reward_lora") and getattr(log, "level", 0)} == {}  # fmt: skip


class ToyText:
    """Stands in for a text encoder where the words do not matter: a prompt's letters seed its embedding."""

    def __call__(self, prompts):
        return [torch.randn(3, 8, generator=torch.Generator().manual_seed(sum(p.encode()))) for p in prompts]


@pytest.fixture
def wan():
    """A tiny random float32 Wan: latents 4 channels, frames 8x8, 3 frames."""
    model = tiny_wan(dtype=torch.float32)
    model.encode_text = ToyText()
    return model


@pytest.fixture
def reward():
    return ToyReward()


@pytest.fixture
def config():
    """Four quick steps that train something, without the strengths that are painted at a run's end."""
    return TrainConfig(
        steps=4,
        batch_size=2,
        rank=2,
        network_alpha=2,
        learning_rate=1e-2,
        backprop=BackpropSchedule("tail", 2),
        save_every=2,
        sample_every=2,
        sample_count=2,
        sweep=False,
        save_dtype="float32",
    )


@pytest.fixture
def filled(wan):
    """A LoRA with weights in it, inside ``wan``."""
    adapter = inject_new(wan.transformer, ("all-linear",), rank=2, alpha=1.0, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters().values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return adapter


@pytest.fixture
def predict(wan):
    """The transformer's output for fixed inputs."""
    text = torch.randn(5, 8, generator=torch.Generator().manual_seed(2))
    conditioning = wan.conditioning([text], None, LATENT_SHAPE)
    noise = wan.initial_latents(LATENT_SHAPE, [3])

    @torch.no_grad()
    def run():
        return wan.predict(noise, torch.tensor(0.6, dtype=torch.float64), conditioning.positive)

    return run


@pytest.fixture(scope="session")
def reward_files(tmp_path_factory):
    """A models folder with tiny random image rewards under their published names; HPS is tiny by its architecture."""
    import open_clip
    from reward_lora.reward_models import hps

    folder = tmp_path_factory.mktemp("reward_models")
    write_all(folder)
    config = tmp_path_factory.mktemp("open_clip") / "tiny-test-clip.json"
    config.write_text(json.dumps(OPEN_CLIP))
    open_clip.add_model_config(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hps, "ARCHITECTURE", config.stem)
        yield folder
