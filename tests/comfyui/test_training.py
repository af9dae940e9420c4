"""Training in a real ComfyUI: settings nodes, prompts, going on, starting from a LoRA, and what is seen meanwhile."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from reward_lora.lora.files import read_lora
from safetensors.torch import load_file

from . import graphs

pytestmark = pytest.mark.comfyui

SETTINGS = {
    "schedule": ("BackpropSchedule", {"strategy": "list", "num_steps": 5, "coupling": 0.5, "step_list": "0, 4, 7",
                                      "start": 0, "end": -1, "judge": "final", "branch": "both"}),
    "sampling": ("SamplingSettings", {"negative_prompt": "gray", "guidance_interval": "0, 0.9", "reuse": 1}),
    "judge": ("JudgeSettings", {"judged_latents": 0, "judged_from": "first", "judged_frames": 2,
                                "judged_choice": "even", "judged_weights": "", "target": "1.5", "hinge": True,
                                "loss_scale": 2.0}),
    "guard_settings": ("Guards", {"guards": "careful", "keep_best": "off", "patience": -1, "motion_floor": 0.5,
                                  "sweep": "off", "motion_guard": -1.0, "augment": 0, "anchor": -1.0,
                                  "anchor_target": -1.0, "anchor_by_sigma": False}),
    "memory": ("MemorySettings", {"memory": "small", "float8": True, "shard": False, "compile": False}),
    "optimizer": ("OptimizerSettings", {"warmup_steps": 2, "weight_decay": 0.25, "beta1": 0.9, "beta2": 0.99,
                                        "epsilon": 1e-8, "max_grad_norm": 0.5, "ema": 0.0,
                                        "lora_targets": "attn1.to_q, attn1.to_v", "experts": "",
                                        "keep_checkpoints": 1, "max_skipped": 3, "trackers": ""}),
}  # fmt: skip


def with_settings(graph: dict, **changes: dict) -> dict:
    """A training graph with every settings node connected, some with other values."""
    key = graphs.train_key(graph)
    for name, (kind, values) in SETTINGS.items():
        graph[name] = graphs.node(kind, **values | changes.get(name, {}))
        graph[key]["inputs"][name] = [name, 0]
    return graph


def run(comfyui, graph: dict) -> tuple[dict, Path]:
    """What the training node shows, and the run's folder."""
    outcome = comfyui.run(graph)
    assert outcome.status == "success", outcome.message
    shown = outcome.outputs[graphs.train_key(graph)]
    return shown, comfyui.output / shown["images"][0]["subfolder"]


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def steps_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_settings_nodes_overrule_widgets_and_advanced_overrules_both(comfyui):
    graph = graphs.train(prefix="tests/settings", steps=2, sample_every=0, advanced="weight_decay: 0.125", guards="off")
    _, folder = run(comfyui, with_settings(graph))
    c = config_of(folder)
    assert c["backprop"] == {"strategy": "list", "num_steps": 5, "coupling": 0.5, "step_list": [0, 4, 7], "start": 0,
                             "end": -1, "judge": "final", "branch": "both"}  # fmt: skip
    assert (c["negative_prompt"], c["guidance_interval"]) == ("gray", [0.0, 0.9])
    assert (c["judged_frames"], c["objective"]) == (2, {"target": 1.5, "loss_scale": 2.0, "hinge": True})
    assert (c["guards"], c["keep_best"], c["motion_floor"], c["augment"]) == ("careful", False, 0.5, 0)
    assert c["motion_guard"] == 1.0, "what is left at -1 is the preset's"
    assert (c["memory"], c["float8"]) == ("small", True)
    assert (c["weight_decay"], c["max_grad_norm"], c["warmup_steps"]) == (0.125, 0.5, 2)
    assert c["lora_targets"] == ["attn1.to_q", "attn1.to_v"]
    assert (c["steps"], c["rank"]) == (2, 8), "what no node sets is the widget's"


def test_settings_nodes_as_they_come_change_nothing(comfyui):
    """Their defaults are those of the engine, so an untouched node gives the run that leaves it out."""
    changes = {"prefix": "tests/untouched", "steps": 1, "sample_every": 0, "advanced": "", "lr_schedule": "constant"}
    changes |= {"backprop_strategy": "tail", "backprop_num_steps": 5, "backprop_coupling": 1.0, "judged_latents": 1}
    _, alone = run(comfyui, graphs.train(**changes))
    graph, info = graphs.train(**changes), comfyui.ask("/object_info")[1]
    for name, (kind, _) in SETTINGS.items():
        defaults = {}
        for widget, (type_, about) in info[f"RewardLora{kind}"]["input"]["optional"].items():
            defaults[widget] = about["default"] if "default" in about else type_[0]
        graph[name] = graphs.node(kind, **defaults)
        graph[graphs.train_key(graph)]["inputs"][name] = [name, 0]
    _, connected = run(comfyui, graph)
    assert connected == alone


def test_every_setting_has_a_widget(comfyui):
    from reward_lora.training.config import TrainConfig

    info = comfyui.ask("/object_info")[1]
    kinds = ["TrainRewardLora", *(kind for kind, _ in SETTINGS.values())]
    widgets = {name for kind in kinds for part in info[f"RewardLora{kind}"]["input"].values() for name in part}
    settings = TrainConfig().to_dict()
    nested = settings.pop("backprop") | settings.pop("objective")
    assert settings.keys() | nested.keys() <= widgets
    for name, (kind, values) in SETTINGS.items():
        assert list(values) == list(info[f"RewardLora{kind}"]["input"]["optional"]), name


def prompts(**inputs) -> dict:
    given = {"text": "one\ntwo\nthree", "file": "", "order": "sequential", "count": 0, "seed": 0} | inputs
    return {"1": graphs.node("Prompts", **given)}


def drawn(comfyui, **inputs) -> list[str]:
    graph = prompts(**inputs) | {"2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}}}
    outcome = comfyui.run(graph)
    assert outcome.status == "success", outcome.message
    return outcome.outputs["2"]["text"][0].splitlines()


def test_prompts_from_text_file_and_wildcards(comfyui):
    folder = comfyui.base / "input" / "wildcards"
    folder.mkdir(exist_ok=True)
    (folder / "colour.txt").write_text("red\n")
    (comfyui.base / "input" / "more.txt").write_text("a __colour__ {circle|circle}\n")
    assert drawn(comfyui) == ["one", "two", "three"]
    assert drawn(comfyui, seed=2, count=2) == ["three", "one"]
    assert drawn(comfyui, file="more.txt", seed=3, count=1) == ["a red circle"]
    assert sorted(drawn(comfyui, order="random", seed=7)) == ["one", "three", "two"]
    (folder / "colour.txt").write_text("blue\n")
    assert drawn(comfyui, file="more.txt", seed=3, count=1) == ["a blue circle"], "an edited file was not read again"


def test_prompts_feed_generate_score_and_training(comfyui):
    graph = prompts(text="", file="builtin_test", order="random", count=3, seed=1)
    graph |= {
        "2": graphs.node("LoadVideoModel", name="builtin", dtype="auto"),
        "3": graphs.node("LoadReward", name="tiny_clip"),
        "4": graphs.generate(video_model=["2", 0], prompt=["1", 1], steps=2)["3"],
        "5": graphs.node("ScoreFrames", reward=["3", 0], images=["4", 0], prompt=["1", 1], every_frame=False),
    }
    outcome = comfyui.run(graph)
    assert outcome.status == "success", outcome.message
    scored = outcome.outputs["5"]["text"]
    assert len(scored) == len(set(scored)) == 3
    assert all(any(repr(p) in text for text in scored) for p in outcome.outputs["1"]["text"][0].splitlines())

    graph = graphs.train(prefix="tests/prompted", steps=1, sample_every=1, sample_prompts="", prompt_file="")
    graph |= prompts(text="a {red|blue} circle moves right", count=4)
    graph[graphs.train_key(graph)]["inputs"]["prompts"] = ["1", 0]
    shown, _ = run(comfyui, graph)
    assert "1 steps on 4 prompts" in shown["text"][0]


def test_a_run_is_gone_on_with_from_the_list(comfyui):
    changes = {"sample_every": 0, "save_every": 1, "lr_schedule": "constant", "batch_size": 1}
    _, folder = run(comfyui, graphs.train(prefix="tests/first", steps=2, **changes))
    name = folder.relative_to(comfyui.output).as_posix()
    listed = comfyui.ask("/object_info/RewardLoraTrainRewardLora")[1]["RewardLoraTrainRewardLora"]
    assert name in str(listed["input"]["optional"]["resume_from"])
    _, again = run(comfyui, graphs.train(prefix="tests/other", steps=4, resume_from=name, **changes))
    assert again == folder
    assert [r["step"] for r in steps_of(folder)] == [0, 1, 2, 3, 4]
    _, straight = run(comfyui, graphs.train(prefix="tests/straight", steps=4, **changes))
    here, there = (load_file(f / f"{f.name}.safetensors") for f in (folder, straight))
    assert all(np.array_equal(here[key], there[key]) for key in here), "not the steps of a run that never stopped"

    for bad, message in (
        ({"resume_from": name, "steps": 3}, "has made 4 steps already; set steps above that"),
        ({"resume_from": name, "steps": 9, "learning_rate": 0.5}, r"other settings \(learning_rate: 0.008 -> 0.5"),
        ({"resume_from": "tests/none"}, "there is no training in output/tests/none"),
        ({"resume_from": "../x"}, "leads out of the output folder"),
    ):
        outcome = comfyui.run(graphs.train(prefix="tests/other", **{"steps": 9} | changes | bad))
        assert re.search(message, outcome.message), outcome.message


def test_loras_of_a_run_are_loaded_tried_and_gone_on_from(comfyui):
    changes = {"steps": 3, "sample_every": 1, "save_every": 1, "sample_count": 2, "batch_size": 1,
               "lr_schedule": "constant"}  # fmt: skip
    graph = graphs.train(prefix="tests/loaded", **changes)
    key = graphs.train_key(graph)
    model = graph[key]["inputs"]["video_model"]
    linked = {"run": "the connected run", "connected_run": [key, 6]}
    graph["c"] = graphs.node("LoadTrainedLora", which="checkpoint", step=2, **linked)
    graph["l"] = graphs.node("LoadTrainedLora", which="last", step=0, **linked)
    graph["r"] = graphs.node("TrainingReport", **linked)
    for name in "cl":
        graph[f"a{name}"] = graphs.node("ApplyRewardLora", video_model=model, lora_file="the connected LoRA",
                                        strength=1.0, lora=[name, 0])  # fmt: skip
        graph[f"s{name}"] = graphs.node("SaveRewardLora", lora=[name, 0], prefix=f"tests/saved_{name}",
                                        copy_to_models_loras=False)  # fmt: skip
    outcome = comfyui.run(graph)
    assert outcome.status == "success", outcome.message
    assert "after 2 steps" in outcome.outputs["c"]["text"][0]
    assert "after 3 steps" in outcome.outputs["l"]["text"][0]
    folder = comfyui.output / outcome.outputs[key]["images"][0]["subfolder"]
    files = {name: read_lora(next((comfyui.output / "tests").glob(f"saved_{name}_*"))) for name in "cl"}
    last = read_lora(folder / f"{folder.name}.safetensors")
    assert set(files["c"].names) == set(files["l"].names) == set(last.names), "the checkpoint is spelled otherwise"
    newest, older = files["l"].modules, files["c"].modules
    assert all(np.array_equal(newest[n].delta(), last.modules[n].delta()) for n in newest)
    assert not all(np.allclose(newest[n].delta(), older[n].delta()) for n in newest)
    assert re.search(r"3 of 3 steps; on fixed prompts .* -> ", outcome.outputs["r"]["text"][0])
    assert {"report.html", f"{folder.name}.safetensors"} <= {f["filename"] for f in outcome.outputs["r"]["files"]}

    again = graphs.train(prefix="tests/begun", **changes | {"steps": 1})
    again["c"] = graphs.node("LoadTrainedLora", which="checkpoint", step=3,
                             run=folder.relative_to(comfyui.output).as_posix())  # fmt: skip
    again[graphs.train_key(again)]["inputs"]["start_lora"] = ["c", 0]
    _, begun = run(comfyui, again)
    assert steps_of(begun)[0]["evaluation"] == pytest.approx(steps_of(folder)[-1]["evaluation"], abs=1e-5)
    again[graphs.train_key(again)]["inputs"] |= {"rank": 2, "network_alpha": 2}
    assert "has rank 8 and this run 2; set rank to 8 or more" in comfyui.run(again).message
    again["c"]["inputs"] |= {"step": 77}
    assert "has no checkpoint of step 77; there are 2, 3" in comfyui.run(again).message
    again["c"]["inputs"] |= {"run": "the connected run"}
    assert "no run is connected" in comfyui.run(again).message


def test_what_is_seen_while_it_trains(comfyui):
    """Phases and solver steps, rewards, the time left; and the last preview is the picture that stays."""
    changes = {"steps": 4, "batch_size": 12, "sample_every": 2, "sample_count": 2, "save_every": 100}
    outcome, listener = comfyui.watch(graphs.train(prefix="tests/seen", **changes))
    assert outcome.status == "success", outcome.message
    texts = [each.data for each in listener.of("text")]
    for wanted in (
        r"step \d+ of 4, rollout \d+ of 8",
        r"step \d+ of 4, replay \d of \d",
        r"evaluation after step (0|2|4), (rollout \d+ of 8|decoding|judging)",
        r"reward \d\.\d+, \d\.\d+ on fixed prompts .*, \d+\.\d s a step, about \d+ (s|min) left",
        r"step 4 of 4, .*on fixed prompts \(at first \d\.\d+\)",
    ):
        assert any(re.search(wanted, text) for text in texts), (wanted, texts)
    done = [each.data["value"] / each.data["max"] for each in listener.of("progress")]
    assert done == sorted(done)
    assert done[-1] == 1
    whole = {each.data["value"] % (each.data["max"] // 4) for each in listener.of("progress")}
    assert len(whole) > 3, "the bar moves by whole steps only"
    moments = [each.when for each in listener.heard]
    assert max(np.diff(moments)) < 120
    last = Image.open(io.BytesIO(listener.of("preview")[-1].data)).convert("RGB")
    final = Image.open(comfyui.files(outcome)[0]).convert("RGB")
    assert last.size == final.size
    assert np.abs(np.asarray(last, float) - np.asarray(final, float)).mean() < 4


def test_several_trainings_in_one_queue_do_not_touch_each_other(comfyui):
    changes = {"steps": 2, "sample_every": 0, "batch_size": 1}
    _, alone = run(comfyui, graphs.train(prefix="tests/alone", seed=2, **changes))
    together = graphs.train(prefix="tests/queue", seed=2, **changes)  # two in one graph, with one model
    key = graphs.train_key(together)
    together["twin"] = {**together[key], "inputs": together[key]["inputs"] | {"seed": 3}}
    queued = [comfyui.queue(graphs.train(prefix="tests/queue", seed=seed, **changes)) for seed in (1, 4)]
    queued.insert(1, comfyui.queue(together))
    assert all(comfyui.wait(answer["prompt_id"]).status == "success" for _, answer in queued)
    folders = {config_of(f)["seed"]: f for f in comfyui.output.glob("tests/queue_*")}
    assert sorted(folders) == [1, 2, 3, 4]
    here, there = (load_file(f / f"{f.name}.safetensors") for f in (alone, folders[2]))
    assert all(np.array_equal(here[key], there[key]) for key in here)


BAD = {
    "no wildcard": (prompts(text="a __size__ thing"), r"there is no wildcard file size.txt in .*wildcards"),
    "brace": (prompts(text="a {red|blue thing"), "a brace without its other"),
    "no prompts": (prompts(text=" "), "there is no prompt to draw"),
    "no file": (prompts(file="none.txt"), "there is no such prompt file"),
    "list without steps": (with_settings(graphs.train(), schedule={"step_list": ""}), "step_list goes with strategy"),
    "steps as words": (
        with_settings(graphs.train(), schedule={"step_list": "0, last"}),
        "step_list: it must be step numbers such as 0, 4, 9, got '0, last'",
    ),
    "target": (with_settings(graphs.train(), judge={"target": "high"}), "target: it must be a number; .* got 'high'"),
    "interval": (with_settings(graphs.train(), sampling={"guidance_interval": "1"}), "must be a list of 2"),
    "targets": (with_settings(graphs.train(advanced=""), optimizer={"lora_targets": "nose"}), "nose"),
    "step beyond the solver": (with_settings(graphs.train(), schedule={"step_list": "0, 99"}), "step_list must be"),
    "no run": ({"1": graphs.node("TrainingReport", run="tests/none")}, "there is no training in output/tests/none"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_answered_in_a_sentence(comfyui, case):
    graph, expected = BAD[case]
    if "1" in graph and graph["1"]["class_type"] == "RewardLoraPrompts":
        graph["2"] = {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}}
    outcome = comfyui.run(graph)
    assert outcome.status in ("error", "refused")
    assert re.search(expected, outcome.message), outcome.message
    assert "Traceback" not in outcome.message
