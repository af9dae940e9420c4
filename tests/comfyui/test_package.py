"""What can be said of the pack without a ComfyUI."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_import_needs_no_comfyui_and_costs_nothing():
    code = "import sys, reward_lora; print(reward_lora.WEB_DIRECTORY, *{'torch', 'comfy_api'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "./web"


def training_inputs() -> dict:
    graph = json.loads((ROOT / "workflows" / "api" / "train_reward_lora.json").read_text(encoding="utf-8"))
    (inputs,) = (n["inputs"] for n in graph.values() if n["class_type"] == "RewardLoraTrainRewardLora")
    return inputs


def test_training_workflow_shows_prompts_it_does_not_train_on():
    unseen = (ROOT / "assets" / "prompts_test.txt").read_text(encoding="utf-8").splitlines()
    inputs = training_inputs()
    assert inputs["prompt_file"] == "builtin"
    assert set(inputs["sample_prompts"].splitlines()) <= set(unseen)
