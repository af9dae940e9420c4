"""The pack in a real ComfyUI: registered, running, cancelled, cached, and polite about bad input."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from . import graphs
from .conftest import ROOT, find_comfyui

pytestmark = pytest.mark.comfyui

NODES = {
    "RewardLoraLoadVideoModel": "Load Video Model",
    "RewardLoraLoadVideoModelFiles": "Load Video Model (files)",
    "RewardLoraVideoModelFromParts": "Video Model from MODEL, CLIP, VAE",
    "RewardLoraPrompts": "Prompts",
    "RewardLoraGenerateVideo": "Generate Video",
    "RewardLoraLoadReward": "Load Reward",
    "RewardLoraCombineRewards": "Combine Rewards",
    "RewardLoraScoreFrames": "Score Frames",
    "RewardLoraPickBest": "Pick Best of N",
    "RewardLoraCompare": "Compare",
    "RewardLoraTrainRewardLora": "Train Reward LoRA",
    "RewardLoraTrainingReport": "Training Report",
    "RewardLoraBackpropSchedule": "Backprop Schedule",
    "RewardLoraSamplingSettings": "Sampling Settings",
    "RewardLoraJudgeSettings": "Judge Settings",
    "RewardLoraGuards": "Guards",
    "RewardLoraMemorySettings": "Memory Settings",
    "RewardLoraOptimizerSettings": "Optimizer Settings",
    "RewardLoraApplyRewardLora": "Apply Reward LoRA",
    "RewardLoraApplyRewardLoraToModel": "Apply Reward LoRA to MODEL",
    "RewardLoraMergeLoras": "Merge LoRAs",
    "RewardLoraFetchPublishedLora": "Fetch Published LoRA",
    "RewardLoraLoadTrainedLora": "Load Trained LoRA",
    "RewardLoraSweepLoraStrength": "Sweep LoRA Strength",
    "RewardLoraSaveRewardLora": "Save Reward LoRA",
}


@pytest.fixture(scope="module")
def info(comfyui):
    return comfyui.ask("/object_info")[1]


def test_nodes_are_registered_without_an_import_error(comfyui, info):
    assert {key: info[key]["display_name"] for key in NODES if key in info} == NODES
    log = comfyui.log.read_text()
    assert "IMPORT FAILED" not in log
    assert "Cannot import" not in log


IMPORT = """
import asyncio, importlib.util, sys, time
folder, pack = sys.argv[1:]
sys.argv, sys.path[0] = ["main.py", "--cpu"], folder
import comfy.options
comfy.options.enable_args_parsing()
import utils.install_util, nodes, server, comfy_api.latest  # what is there before any pack
began = time.process_time()
spec = importlib.util.spec_from_file_location("pack", pack + "/__init__.py", submodule_search_locations=[pack])
sys.modules["pack"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
found = asyncio.run(module.comfy_entrypoint().get_node_list())
print(len(found), time.process_time() - began)
"""


def test_import_costs_little():
    """In processor seconds, for ComfyUI's own figure counts what else the machine does."""
    folder, python = find_comfyui()
    answer = subprocess.run([python, "-c", IMPORT, folder, ROOT], capture_output=True, text=True, cwd=folder,
                            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"})  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    count, seconds = answer.stdout.split()[-2:]
    assert int(count) == len(NODES)
    assert float(seconds) < 0.3


@pytest.mark.parametrize("key", NODES)
def test_node_explains_itself(comfyui, info, key):
    node = info[key]
    assert node["category"].startswith("Reward LoRA/")
    assert len(node["description"]) > 40
    named = [(name, spec) for group in ("required", "optional") for name, spec in node["input"].get(group, {}).items()]
    page = (graphs.WORKFLOWS.parent / "web" / "docs" / f"{key}.md").read_text(encoding="utf-8")
    for name, spec in named:
        assert spec[1].get("tooltip"), name
        assert f"| {name} |" in page, f"{name} is missing from {key}.md"
        if spec[0] in ("INT", "FLOAT"):
            assert re.search(r"\d", spec[1]["tooltip"]), f"the tooltip of {name} has no range"
        if name in ("strength", "coupling", "backprop_coupling", "guidance_scale"):
            assert spec[1]["display"] == "slider", name
    for name, tooltip in zip(node["output_name"], node.get("output_tooltips") or (), strict=True):
        assert tooltip, name
        assert f"| {name} |" in page, f"the output {name} is missing from {key}.md"
    assert comfyui.ask(f"/extensions/reward-lora/docs/{key}.md")[0] == 200


def test_models_of_extra_model_paths_are_listed_and_load(comfyui, info):
    assert "my_wan" in str(info["RewardLoraLoadVideoModel"]["input"]["required"]["name"])
    graph = graphs.generate(steps=1)
    graph["1"]["inputs"]["name"] = "my_wan"
    outcome = comfyui.run(graph)
    assert outcome.status == "success", outcome.message


def frames(comfyui, graph) -> np.ndarray:
    outcome = comfyui.run(graph)
    assert outcome.status == "success", outcome.message
    return np.stack([np.asarray(Image.open(file)) for file in comfyui.files(outcome)])


def trained_lora(comfyui) -> str:
    outcome = comfyui.run(graphs.train(prefix="tests/seed", seed=1))
    assert outcome.status == "success", outcome.message
    if not outcome.outputs:  # answered from the cache
        return next(p for p in (comfyui.output / "tests").glob("seed_*/seed_*.safetensors")).as_posix()
    file = next(file for file in comfyui.files(outcome) if file.suffix == ".safetensors")
    return "output/" + file.relative_to(comfyui.output).as_posix()


def test_strength_zero_is_the_model_itself(comfyui):
    lora = trained_lora(comfyui)
    base = frames(comfyui, graphs.generate())
    assert np.array_equal(base, frames(comfyui, graphs.apply(lora, 0.0)))
    assert not np.array_equal(base, frames(comfyui, graphs.apply(lora, 2.0)))
    # The model is shared: what a LoRA did to it must be gone. The negative prompt, unused here, avoids the cache.
    assert np.array_equal(base, frames(comfyui, graphs.generate(negative="again")))


def test_cancel_keeps_a_checkpoint_and_running_again_goes_on(comfyui):
    before = frames(comfyui, graphs.generate())
    settings = {"prefix": "tests/cancel", "sample_every": 0, "save_every": 10_000, "lr_schedule": "constant"}
    endless = graphs.train(steps=10_000, **settings)
    status, answer = comfyui.queue(endless)
    assert status == 200, answer
    deadline = time.monotonic() + 600
    while not any(p.read_text().count("\n") >= 3 for p in comfyui.output.glob("tests/cancel_*/log.jsonl")):
        assert time.monotonic() < deadline, comfyui.log.read_text()[-2000:]
        time.sleep(0.1)
    comfyui.ask("/interrupt", {})
    assert comfyui.wait(answer["prompt_id"]).interrupted
    (folder,) = comfyui.output.glob("tests/cancel_*")
    (checkpoint,) = folder.glob("checkpoint-*.safetensors")
    reached = int(checkpoint.stem.partition("-")[2])
    assert reached >= 2
    assert (folder / f"{folder.name}.safetensors").is_file()
    assert np.array_equal(before, frames(comfyui, graphs.generate(negative="later")))

    outcome = comfyui.run(graphs.train(steps=reached + 2, **settings))
    assert outcome.status == "success", outcome.message
    assert list(comfyui.output.glob("tests/cancel_*")) == [folder], "another folder: it did not resume"
    steps = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(reached + 3))


def test_the_guards_end_a_run_and_say_so(comfyui):
    """With a floor of all the base model's motion, the first evaluation that moves less is the last."""
    advanced = "{patience: 1, motion_floor: 1.0, lora_targets: [all-linear]}"
    changes = {"steps": 12, "sample_every": 1, "sample_count": 2, "batch_size": 2, "advanced": advanced}
    graph = graphs.train(prefix="tests/guarded", **changes)
    outcome = comfyui.run(graph)
    assert outcome.status == "success", outcome.message
    (folder,) = comfyui.output.glob("tests/guarded_*")
    last = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    assert last["step"] < 12
    assert "while motion fell" in last["stop"]
    assert last["stop"] in json.dumps(outcome.outputs[graphs.train_key(graph)])
    assert "report.html" in {file.name for file in comfyui.files(outcome)}


def test_same_inputs_come_from_the_cache_and_another_seed_trains_again(comfyui):
    def run(seed: int):
        graph = graphs.train(prefix="tests/seed", seed=seed)
        outcome = comfyui.run(graph)
        assert outcome.status == "success", outcome.message
        return graphs.train_key(graph) in outcome.cached, len(list(comfyui.output.glob("tests/seed_*")))

    assert run(1) == (False, 1)
    assert run(1) == (True, 1)
    assert run(2) == (False, 2)


class Trap:
    """Writes a file if unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture(scope="module")
def bad_files(comfyui):
    """LoRA files that cannot be used, in models/loras; gives the trap's file."""
    loras, trap = comfyui.base / "models" / "loras", comfyui.base / "sprung"
    (loras / "pickle.safetensors").write_bytes(pickle.dumps(Trap(trap)))
    key = "diffusion_model.blocks.0.self_attn.q"
    pair = {f"{key}.lora_A.weight": torch.zeros(4, 5120), f"{key}.lora_B.weight": torch.zeros(5120, 4)}
    save_file(pair, loras / "other.safetensors", {"base_model": "Wan2.1-T2V-14B"})
    whole = (loras / "other.safetensors").read_bytes()
    (loras / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (comfyui.base / "input" / "empty.txt").write_text("\n")
    (comfyui.base / "input" / "latin.txt").write_bytes("ein gr\u00fcner Kreis".encode("latin-1"))
    return trap


def untouched(comfyui) -> set[Path]:
    """Everything that lies beside the output folder, where nothing may appear."""
    skip = [comfyui.base / name for name in ("output", "temp", "user", "custom_nodes")]
    return {
        path
        for path in comfyui.base.parent.parent.rglob("*")
        if not any(path == folder or folder in path.parents for folder in skip)
    }


BAD = {
    "strength": (graphs.apply("builtin: colour fix", 7.0), "7.0 bigger than max of 2"),
    "unknown reward": (graphs.score("beauty"), "unknown reward 'beauty'; known are tiny_clip"),
    "reward without files": (graphs.score("pickscore"), "pickscore"),
    "score without a prompt": (graphs.score(prompt=" "), "needs a prompt"),
    "frames": (graphs.generate(frames=82), "must be 4n.1 .*got 82; the nearest is 81"),
    "height": (graphs.generate(height=250), "multiples of .*250; the nearest is"),
    "train frames": (graphs.train(frames=82), "the nearest is 81"),
    "prefix": (graphs.train(prefix="../../x"), "leads out of the output folder"),
    "empty prefix": (graphs.train(prefix=""), "the prefix must be a name"),
    "no prompts": (graphs.train(prompts=" ", prompt_file=""), "at least one prompt"),
    "empty prompt file": (graphs.train(prompt_file="empty.txt"), "empty.txt holds no prompt"),
    "prompt file not UTF-8": (graphs.train(prompt_file="latin.txt"), "not UTF-8"),
    "image for a text-to-video model": (
        graphs.train(start_image=["90", 0])
        | {"90": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 255}}},
        r"text-to-video model, and (\d+) of \1 training prompts have a start image",
    ),
    "unknown setting": (graphs.train(advanced="speed: 3"), "unknown setting 'speed'"),
    "broken setting": (graphs.train(advanced="a: ["), "advanced is not valid YAML"),
    "too many steps trained": (graphs.train(backprop_num_steps=99), "num_steps must be at most"),
    "another model's LoRA": (graphs.apply("other.safetensors", 1.0), "was made for another model"),
    "truncated LoRA": (graphs.apply("cut.safetensors", 1.0), "truncated|cut short"),
    "pickle": (graphs.apply("pickle.safetensors", 1.0), "pickle.*run code"),
    "LoRA outside": (graphs.apply("output/../../../x.safetensors", 1.0), "leads out|not in list"),
    "no such LoRA": (graphs.apply("none.safetensors", 1.0), "there is no LoRA|not in list"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_answered_in_a_sentence(comfyui, bad_files, case):
    graph, expected = BAD[case]
    before = untouched(comfyui)
    outcome = comfyui.run(graph)
    assert outcome.status in ("error", "refused")
    assert re.search(expected, outcome.message), outcome.message
    assert "Traceback" not in outcome.message
    assert untouched(comfyui) == before
    assert not bad_files.exists(), "code from a pickle was executed"


def test_save_refuses_to_leave_the_output_folder(comfyui, bad_files):
    graph = graphs.workflow("train_reward_lora")
    key = next(k for k, n in graph.items() if n["class_type"] == "RewardLoraSaveRewardLora")
    graph[key]["inputs"]["prefix"] = "../../x"
    before = untouched(comfyui)
    status, answer = comfyui.queue(graph)
    assert "leads out of the output folder" in str(answer["node_errors"][key]["errors"])
    if status == 200:  # the other outputs of the graph run
        comfyui.wait(answer["prompt_id"])
    assert untouched(comfyui) == before


def test_training_widgets_are_the_settings_with_their_defaults(info):
    from reward_lora.training.config import TrainConfig

    settings = TrainConfig().to_dict()
    settings |= {f"backprop_{name}": value for name, value in settings["backprop"].items()}
    node = info["RewardLoraTrainRewardLora"]["input"]
    own = {"video_model", "reward", "prompts", "prefix", "prompt_file", "sample_prompts", "advanced"}
    own |= {"heldout_reward", "start_image", "end_image", "reference", "resume_from", "start_lora", "devices"}
    own |= {"start_second_lora", "schedule", "sampling", "judge", "guard_settings", "memory", "optimizer"}
    widgets = {name: spec for group in ("required", "optional") for name, spec in node[group].items()}
    assert len(widgets) > 20
    for name in widgets.keys() - own:
        assert widgets[name][1]["default"] == settings[name], name
