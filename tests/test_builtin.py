"""The whole road on the built-in model: base, training, LoRA, and prompts that were never trained on."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from reward_lora import cli, files
from reward_lora.assets import PROMPTS_TEST, PROMPTS_TRAIN, oracle
from reward_lora.demo import examine
from reward_lora.lora.adapter import LoraUse, applied
from reward_lora.lora.files import read_lora
from reward_lora.reward_models import load_reward
from reward_lora.training.prompts import read_prompts
from reward_lora.training.sweep import Sweep, SweepConfig, run_sweep
from reward_lora.video_models import load_video_model

from .test_readme import commands

SHIPPED = Path(files.__file__).parent / "assets" / "tiny_reward_lora.safetensors"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model():
    return load_video_model("builtin")


@pytest.fixture(scope="module")
def reward():
    return load_reward("tiny_clip")


@pytest.fixture(scope="module")
def unseen():
    test, train = read_prompts(PROMPTS_TEST), read_prompts(PROMPTS_TRAIN)
    assert len(test) >= 128
    assert not set(test) & set(train)
    return test[::2]


@dataclass(frozen=True)
class Truth:
    """What the oracle says of an attribute, as a reward that is only looked at."""

    name: str
    differentiable, needs = False, frozenset({"prompt"})

    def score(self, frames, prompts, *, reference=None):
        return oracle.judge(frames, list(prompts))[self.name].float()


@pytest.fixture(scope="module")
def swept(model, reward, unseen):
    """The shipped LoRA's strengths; the learned judge decides alone, the truth is only there to check it."""
    truths = [Truth(name) for name in ("all", "colour", "shape", "direction", "background", "motion")]
    config = SweepConfig((0.5, 1.0, 1.5), prompts=tuple(unseen), batch_size=36)
    points = run_sweep(model, LoraUse(read_lora(SHIPPED), 1.0), config, reward, truths)
    return Sweep(config, tuple(points), ("tiny_clip",))


def means(point):
    return {name: sum(scores) / len(scores) for name, scores in point.scores.items()}


def test_the_base_is_good_but_for_the_colour(swept):
    base = means(swept.base)
    assert base["background"] >= 0.97
    assert base["direction"] >= 0.95
    assert base["shape"] >= 0.80
    assert 0.3 <= base["colour"] <= 0.75


def check_repair(base, full):
    """The contract of a good reward LoRA: what it is for, and what it must not cost."""
    assert full["tiny_clip"] > base["tiny_clip"] + 0.03
    assert full["colour"] >= base["colour"] + 0.10
    for key in ("shape", "direction", "background"):
        assert full[key] >= base[key] - 0.03, key
    # Pixels travelled; the world's own clips travel 10.3 on average, the base a little more.
    assert full["motion"] >= 0.92 * base["motion"]


def test_the_shipped_lora_repairs_the_colour(swept):
    base, half, full, _ = map(means, swept.points)
    check_repair(base, full)
    for key in ("tiny_clip", "colour"):
        assert full[key] > half[key] > base[key]


def test_the_recommended_strength_is_within_two_points_of_the_best(swept):
    accuracy = {point.strength: 100 * means(point)["all"] for point in swept.points}
    assert accuracy[swept.best.strength] >= max(accuracy.values()) - 2, (swept.best.strength, accuracy)
    assert accuracy[swept.best.strength] > accuracy[0.0] + 10
    assert swept.motion_ratio(swept.best) > 0.75


@pytest.fixture(scope="module")
def readme(tmp_path_factory):
    """The README's commands, one after another: each with its exit status and what it said, and where they ran."""
    folder, ran = tmp_path_factory.mktemp("readme"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for arguments in commands():
            said = io.StringIO()
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                ran[arguments[0]] = cli.main(arguments), said.getvalue()
    return folder, ran


def test_every_command_of_the_readme_runs(readme):
    folder, ran = readme
    assert list(ran) == ["train", "generate", "score", "inspect", "selfcheck"]
    assert [status for status, _ in ran.values()] == [0] * 5, ran
    assert "modules matched" in ran["inspect"][1]
    assert "everything agrees" in ran["selfcheck"][1]
    assert (folder / "outputs" / "colours" / "reward.png").exists()


def test_the_readmes_training_repairs_the_colour(readme, model, reward, unseen):
    """With the built-in model's recipe, shortened."""
    run = readme[0] / "outputs" / "colours"
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    evaluations = [record["evaluation"] for record in records if record.get("evaluation") is not None]
    assert evaluations[-1] > evaluations[0] + 0.02
    found = []
    for strength in (0.0, 1.0):
        with applied(model, [LoraUse(read_lora(run / "colours.safetensors"), strength)]):
            report = examine(model, reward, unseen)
        found.append({key: float(values.mean()) for key, values in report.accuracy.items()})
        found[-1]["tiny_clip"] = float(report.reward.mean())
    check_repair(*found)


def test_generation_depends_on_seed_and_prompt_alone(model, reward, unseen):
    together = examine(model, reward, unseen[:6], batch=6).frames
    in_parts = examine(model, reward, unseen[:6], batch=4).frames
    torch.testing.assert_close(together, in_parts, rtol=0, atol=2e-3)
