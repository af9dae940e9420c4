"""The training node's help page lists every setting as the code documents it."""

import dataclasses
import re
from pathlib import Path

from reward_lora.training.config import TrainConfig
from reward_lora.training.judge import Objective
from reward_lora.training.schedule import BackpropSchedule

PAGE = Path(__file__).parents[1] / "web" / "docs" / "RewardLoraTrainRewardLora.md"


def test_every_setting_has_a_row():
    rows = set(re.findall(r"^\| ([\w.]+) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    settings = {f.name for f in dataclasses.fields(TrainConfig)} - {"backprop", "objective"}
    settings |= {f"backprop.{f.name}" for f in dataclasses.fields(BackpropSchedule)}
    settings |= {f"objective.{f.name}" for f in dataclasses.fields(Objective)}
    assert settings - {name.replace("backprop_", "backprop.") for name in rows} == set()
    known = settings | {name.replace(".", "_") for name in settings}
    gone = {row for row in rows if row.startswith(("backprop", "objective", "judged", "sample_"))} - known
    assert gone - {"sample_prompts"} == set()
