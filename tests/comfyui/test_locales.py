"""The Chinese names and tooltips cover every node, and say the same numbers as the English ones."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from .workflow_format import fields

pytestmark = pytest.mark.comfyui

LOCALES = Path(__file__).resolve().parents[2] / "locales"
LISTED = {("RewardLoraLoadVideoModel", "name"), ("RewardLoraLoadReward", "name")}
"""Their English tooltips are lists of what is there."""


@pytest.fixture(scope="module")
def nodes(comfyui):
    info = comfyui.ask("/object_info")[1]
    return {key: node for key, node in info.items() if node["python_module"] == "custom_nodes.reward-lora"}


@pytest.fixture(scope="module")
def chinese():
    return json.loads((LOCALES / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))


def numbers(text: str) -> set[float]:
    """Those that stand alone, so not the digits of a name."""
    return {float(found) for found in re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?:e[+-]?\d+)?(?![\w.]*[A-Za-z])", text)}


def test_every_node_input_and_output_has_a_chinese_name_and_tooltip(nodes, chinese):
    assert set(chinese) == set(nodes)
    for key, node in nodes.items():
        there = chinese[key]
        assert set(there["inputs"]) == {name for name, *_ in fields(node)}, key
        assert set(there["outputs"]) == {str(index) for index in range(len(node["output"]))}, key
        texts = [there["display_name"], there["description"]]
        texts += [entry["tooltip"] for part in ("inputs", "outputs") for entry in there[part].values()]
        for text in texts:
            assert re.search(r"[\u4e00-\u9fff]", text), (key, text)
        assert all(entry["name"] for part in ("inputs", "outputs") for entry in there[part].values()), key


def test_chinese_tooltips_say_the_same_numbers(nodes, chinese):
    for key, node in nodes.items():
        for name, _, options, _ in fields(node):
            if (key, name) not in LISTED:
                told, ours = numbers(options["tooltip"]), numbers(chinese[key]["inputs"][name]["tooltip"])
                assert told - {0} <= ours, (key, name, told, ours)  # below 0 is said without a number


def test_no_text_holds_what_the_browser_takes_for_a_placeholder():
    """vue-i18n compiles texts: a brace that is not closed keeps ComfyUI's page from opening, a bar means a plural."""
    for path in LOCALES.rglob("*.json"):
        texts = path.read_text(encoding="utf-8")
        for text in re.findall(r'"((?:[^"\\]|\\.)*)"', texts):
            assert not set(text) & set("{}|@"), (path.name, text)


def test_comfyui_serves_them(comfyui, chinese):
    served = comfyui.ask("/i18n")[1]["zh"]
    assert served["nodeDefs"] == chinese
    assert served["nodeCategories"]["Reward LoRA"] == "奖励 LoRA"
