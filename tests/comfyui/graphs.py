"""Graphs in ComfyUI's API format, small enough for a test."""

from __future__ import annotations

import copy
import json
from pathlib import Path

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"
PROMPT = "a red circle moves right on a blue background"


def workflow(name: str) -> dict:
    """A shipped workflow; a training or a sweep is cut to a few steps."""
    graph = json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8"))
    for node in graph.values():
        if node["class_type"] == "RewardLoraTrainRewardLora":
            node["inputs"] |= {"steps": 3, "batch_size": 2, "backprop_num_steps": 2}
            node["inputs"] |= {"sample_every": 3, "sample_count": 2, "save_every": 2}
        if node["class_type"] == "RewardLoraSweepLoraStrength":
            node["inputs"] |= {"strengths": "0.5 1", "max_prompts": 3, "batch_size": 3, "steps": 2}
    return graph


def node(kind: str, **inputs) -> dict:
    return {"class_type": f"RewardLora{kind}", "inputs": inputs}


def generate(**changes) -> dict:
    """Nodes 1 (model), 3 (video), 4 (preview)."""
    inputs = {"video_model": ["1", 0], "prompt": PROMPT, "negative": "", "seed": 5, "width": 0, "height": 0}
    inputs |= {"frames": 0, "steps": 0, "guidance_scale": 1.0}
    return {
        "1": node("LoadVideoModel", name="builtin", dtype="auto", path=""),
        "3": node("GenerateVideo", **inputs | changes),
        "4": {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "frames/f"}},
    }


def apply(file: str, strength: float, **changes) -> dict:
    """Like :func:`generate`, through node 2 (the LoRA)."""
    graph = generate(**{"video_model": ["2", 0]} | changes)
    graph["2"] = node("ApplyRewardLora", video_model=["1", 0], lora_file=file, strength=strength)
    return graph


def score(reward: str = "tiny_clip", prompt: str = PROMPT) -> dict:
    """Nodes 1 to 4, 5 (reward) and 6 (score)."""
    graph = generate()
    del graph["4"]
    graph["5"] = node("LoadReward", name=reward, path="")
    graph["6"] = node("ScoreFrames", reward=["5", 0], images=["3", 0], prompt=prompt, every_frame=False)
    return graph


def train(**changes) -> dict:
    """Nodes of the training workflow without its previews and without the strengths at its end."""
    graph = copy.deepcopy(workflow("train_reward_lora"))
    kept = {k: n for k, n in graph.items() if n["class_type"].startswith("RewardLora")}
    kept = {k: n for k, n in kept.items() if "Save" not in n["class_type"]}
    for each in kept.values():
        if each["class_type"] == "RewardLoraTrainRewardLora":
            each["inputs"]["advanced"] += "\nsweep: false"
            each["inputs"] |= {"prefix": "tests/run"} | changes
    return kept


def train_key(graph: dict) -> str:
    return next(k for k, n in graph.items() if n["class_type"] == "RewardLoraTrainRewardLora")
