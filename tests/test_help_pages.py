"""Help pages list every setting and every reward as the code documents them."""

import dataclasses
import re
from pathlib import Path

from reward_lora.reward_models import REWARDS
from reward_lora.training.config import TrainConfig
from reward_lora.training.judge import Objective
from reward_lora.training.schedule import BackpropSchedule

DOCS = Path(__file__).parents[1] / "web" / "docs"


def test_every_setting_has_a_row():
    page = (DOCS / "RewardLoraTrainRewardLora.md").read_text(encoding="utf-8")
    rows = set(re.findall(r"^\| ([\w.]+) \|", page, re.MULTILINE))
    settings = {f.name for f in dataclasses.fields(TrainConfig)} - {"backprop", "objective"}
    settings |= {f"backprop.{f.name}" for f in dataclasses.fields(BackpropSchedule)}
    settings |= {f"objective.{f.name}" for f in dataclasses.fields(Objective)}
    assert settings - {name.replace("backprop_", "backprop.") for name in rows} == set()
    known = settings | {name.replace(".", "_") for name in settings}
    gone = {row for row in rows if row.startswith(("backprop", "objective", "judged", "sample_"))} - known
    assert gone - {"sample_prompts"} == set()


def test_every_reward_has_a_row_with_the_licence_of_its_weights():
    page = (DOCS / "RewardLoraLoadReward.md").read_text(encoding="utf-8")
    for name, entry in REWARDS.items():
        row = next((line for line in page.splitlines() if line.startswith(f"| {name} | {entry.summary} |")), None)
        assert row, f"{name} is missing, or its summary has changed"
        assert entry.licence in row.rpartition(" | ")[2]
        for option, values in entry.options.items():
            (line,) = re.findall(rf"^\| {option} \|.* Option of .*", page, re.MULTILINE)
            assert name in line
            assert all(value in line for value in values)
