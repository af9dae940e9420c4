"""What can be said of the shipped workflows without a ComfyUI."""

from __future__ import annotations

import dataclasses

import pytest
import yaml
from reward_lora.tests.comfyui.workflow_format import NOTES, WORKFLOWS, read
from reward_lora.training.config import TrainConfig
from reward_lora.training.judge import Objective
from reward_lora.training.schedule import BackpropSchedule

DRAWN = {path.stem: read(path) for path in sorted(WORKFLOWS.glob("*.json"))}
TRAININGS = [name for name, drawn in DRAWN.items() if "recipe" in drawn["extra"]["tests"]]
OWNERS = {
    "backprop": {field.name for field in dataclasses.fields(BackpropSchedule)},
    "objective": {field.name for field in dataclasses.fields(Objective)},
}
SETTINGS = {"BackpropSchedule": "backprop", "JudgeSettings": "objective"}
"""Settings nodes whose widgets belong to a group of the configuration."""
LISTS = {"lora_targets", "experts", "guidance_interval", "judged_weights", "step_list", "trackers"}


def settings(graph: dict) -> TrainConfig:
    """What the training of a graph is configured to do: its widgets, overruled by settings nodes, then by advanced."""
    (train,) = (node for node in graph.values() if node["class_type"] == "RewardLoraTrainRewardLora")
    known, data = TrainConfig().to_dict(), {}
    for name, value in train["inputs"].items():
        if not isinstance(value, list):
            group, _, rest = name.partition("_")
            _set(data, known, group if group in OWNERS else "", rest if group in OWNERS else name, value)
    for name in ("schedule", "sampling", "judge", "guard_settings", "memory", "optimizer"):
        if name in train["inputs"]:
            node = graph[train["inputs"][name][0]]
            group = SETTINGS.get(node["class_type"].removeprefix("RewardLora"), "")
            for key, value in node["inputs"].items():
                _set(data, known, group if key in OWNERS.get(group, ()) else "", key, value)
    return TrainConfig.from_dict(data | (yaml.safe_load(train["inputs"]["advanced"]) or {}))


def _set(data: dict, known: dict, group: str, name: str, value: object) -> None:
    default = known[group][name] if group else known.get(name)
    if name in LISTS:
        parts = [part for part in str(value).replace(",", " ").split() if part]
        value = [float(part) if part.replace(".", "").isdigit() else part for part in parts]
        value = [int(part) for part in value] if name == "step_list" else value
    elif name == "target":
        value = float(value) if value else None
    elif default is None and value in (-1, "preset"):
        value = None
    elif isinstance(default, tuple | list):
        raise AssertionError(f"{name} is a list too")
    if group:
        data.setdefault(group, {})[name] = value
    elif name in known:
        data[name] = value


@pytest.mark.parametrize("name", TRAININGS)
def test_training_workflow_has_the_settings_of_its_recipe(name):
    recipe = yaml.safe_load(
        (WORKFLOWS.parent / "recipes" / f"{DRAWN[name]['extra']['tests']['recipe']}.yaml").read_text(encoding="utf-8")
    )
    graph = read(WORKFLOWS / "api" / f"{name}.json")
    ours, published = settings(graph).decisive(), TrainConfig.from_dict(recipe["config"]).decisive()
    assert {key: (ours[key], value) for key, value in published.items() if ours[key] != value} == {}
    (model,) = (n["inputs"]["name"] for n in graph.values() if n["class_type"] == "RewardLoraLoadVideoModel")
    (train,) = (n["inputs"] for n in graph.values() if n["class_type"] == "RewardLoraTrainRewardLora")
    reward = graph[train["reward"][0]]["inputs"]
    option = "" if reward["preprocessing"] == "default" else f"[preprocessing={reward['preprocessing']}]"
    assert (model, reward["name"] + option) == (recipe["model"], recipe["reward"])


@pytest.mark.parametrize("name", DRAWN)
def test_workflow_is_explained_and_nothing_lies_on_anything_else(name):
    nodes = DRAWN[name]["nodes"]
    (note,) = (node for node in nodes if node["type"] in NOTES)
    assert note["widgets_values"][0].startswith("# ")
    boxes = [(*node["pos"], *node["size"]) for node in nodes]
    for i, (x, y, w, h) in enumerate(boxes):
        for u, v, s, t in boxes[:i]:
            assert x + w <= u or u + s <= x or y + h <= v - 30 or v + t <= y - 30, nodes[i]["type"]
    around = [group["bounding"] for group in DRAWN[name]["groups"]]
    for node, (x, y, w, h) in zip(nodes, boxes, strict=True):
        inside = [u <= x and v <= y - 30 and x + w <= u + s and y + h <= v + t for u, v, s, t in around]
        assert sum(inside) == (node["type"] not in NOTES), node["type"]
