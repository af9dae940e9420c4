"""Rewards in a real ComfyUI: loaded, combined, asked, ranking and comparing; their pictures and tables."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from PIL import Image

from . import graphs

pytestmark = pytest.mark.comfyui

OTHER = "a green square moves left on a white background"


def run(comfyui, graph) -> dict:
    """What each node showed."""
    outcome = comfyui.run(graph)
    assert outcome.status == "success", outcome.message
    return outcome.outputs


def picture(comfyui, shown) -> np.ndarray:
    (entry,) = shown["images"]
    assert entry["type"] == "temp"
    return np.asarray(Image.open(comfyui.base / "temp" / entry["subfolder"] / entry["filename"]).convert("RGB"))


def column(text: str, name: str) -> list[float]:
    """A column of the table in a text."""
    lines = [line.strip("| ").split("|") for line in text.splitlines() if line.startswith("|") and "---" not in line]
    cells = [[cell.strip() for cell in line] for line in lines]
    place = cells[0].index(name)
    return [float(row[place]) for row in cells[1:]]


def clips(count: int) -> dict:
    """Nodes 1 (model), 2 (reward) and ``s1`` to ``sN``: the same prompt at the seeds 1 to N."""
    graph = {"1": graphs.generate()["1"], "2": graphs.node("LoadReward", name="tiny_clip")}
    for seed in range(1, count + 1):
        graph[f"s{seed}"] = graphs.generate(seed=seed)["3"]
    return graph


def batched(graph: dict, keys: list[str]) -> list:
    """All clips in one batch, by core nodes; the link to it."""
    link = [keys[0], 0]
    for key in keys[1:]:
        name = f"b{key}{link[0]}"
        graph[name] = {"class_type": "ImageBatch", "inputs": {"image1": link, "image2": [key, 0]}}
        link = [name, 0]
    return link


def test_score_gives_mean_plot_and_table(comfyui):
    graph = graphs.score()
    graph["6"]["inputs"]["every_frame"] = True
    shown = run(comfyui, graph)["6"]
    (text,), (score,) = shown["text"], shown["score"]
    whole, *frames = column(text, "tiny_clip")
    assert len(frames) == 9
    assert whole == pytest.approx(score, abs=1e-4)
    assert whole == pytest.approx(np.mean(frames), abs=2e-4)
    plot = picture(comfyui, shown)
    assert plot.shape[1] > 600
    assert plot.std() > 10, "the plot is empty"


def test_a_mixture_is_scored_with_its_terms(comfyui):
    graph = graphs.score()
    graph["7"] = graphs.node("LoadReward", name="motion", device="cpu")
    graph["8"] = graphs.node(
        "CombineRewards",
        reward_1=["5", 0],
        reward_2=["7", 0],
        combine="sum",
        temperature=0.5,
        normalised=False,
        balanced=False,
        **{f"weight_{n}": w for n, w in enumerate((2.0, -10.0, 1.0, 1.0), 1)},
    )
    graph["6"]["inputs"] |= {"reward": ["8", 0], "every_frame": False}
    graph["9"] = graphs.node("LoadReward", name="tiny_clip", mixture="tiny_clip*2 + motion*-10")
    graph["10"] = {**graph["6"], "inputs": graph["6"]["inputs"] | {"reward": ["9", 0]}}
    outputs = run(comfyui, graph)
    text = outputs["6"]["text"][0]
    (total,), (clip,), (motion,) = (column(text, name) for name in ("tiny_clip*2+motion*-10", "tiny_clip", "motion"))
    assert motion > 0.001
    assert total == pytest.approx(2 * clip - 10 * motion, abs=1e-3)
    assert outputs["10"]["text"] == outputs["6"]["text"], "written as text it is the same mixture"


def test_pick_best_ranks_slots_batches_and_lists_alike(comfyui):
    graph = clips(3)
    common = {"reward": ["2", 0], "prompt": graphs.PROMPT}
    slots = {f"images_{n}": [f"s{n}", 0] for n in (1, 2, 3)}
    batch = batched(graph, ["s1", "s2", "s3"])
    graph["slots"] = graphs.node("PickBest", frames_per_clip=0, **slots, **common)
    graph["batch"] = graphs.node("PickBest", frames_per_clip=9, images_1=batch, **common)
    graph["rebatch"] = {"class_type": "RebatchImages", "inputs": {"images": batch, "batch_size": 9}}
    graph["list"] = graphs.node("PickBest", frames_per_clip=0, images_1=["rebatch", 0], **common)
    graph["pictures"] = graphs.node("PickBest", frames_per_clip=1, images_1=["s1", 0], **common)
    graph["score"] = graphs.node("ScoreFrames", reward=["2", 0], images=["slots", 0], prompt=graphs.PROMPT,
                                 every_frame=False)  # fmt: skip
    outputs = run(comfyui, graph)
    (text,) = outputs["slots"]["text"]
    scores, order = column(text, "tiny_clip"), column(text, "clip")
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == 3
    assert sorted(order) == [1, 2, 3]
    assert text.startswith(f"clip {int(order[0])} of 3 is best")
    assert outputs["score"]["score"][0] == pytest.approx(scores[0], abs=1e-4), "the best clip is not what came out"
    assert outputs["batch"]["text"] == outputs["list"]["text"] == outputs["slots"]["text"]
    assert len(column(outputs["pictures"]["text"][0], "clip")) == 9
    assert picture(comfyui, outputs["slots"]).std() > 10


def test_compare_tells_better_from_worse(comfyui):
    graph = clips(3)
    a = batched(graph, ["s1", "s2", "s3"])
    graph["white"] = {"class_type": "EmptyImage", "inputs": {"width": 32, "height": 32, "batch_size": 27,
                                                            "color": 0xFFFFFF}}  # fmt: skip
    common = {"reward": ["2", 0], "frames_per_clip": 9}
    graph["6"] = graphs.node("Compare", images_a=["white", 0], images_b=a, prompts=graphs.PROMPT, reward=["2", 0],
                             frames_per_clip=3)  # fmt: skip
    three = "\n".join([graphs.PROMPT, OTHER, graphs.PROMPT])
    graph["7"] = graphs.node("Compare", images_a=a, images_b=a, prompts=three, **common)
    outputs = run(comfyui, graph)
    (text,) = outputs["6"]["text"]
    assert re.match(r"tiny_clip: B is better; .* B ahead in 9 of 9 pairs", text)
    assert all(value > 0 for value in column(text, "B - A"))
    (text,) = outputs["7"]["text"]
    assert text.startswith("tiny_clip: 3 pairs are too few to tell; A ")
    first, second, third = column(text, "A")
    assert second < first, "the prompts were not given one by one"
    assert third != second
    assert picture(comfyui, outputs["6"]).std() > 10


def test_reward_that_stays_on_its_device_scores_the_same(comfyui):
    graph = graphs.score()
    graph["7"] = graphs.node("LoadReward", name="tiny_clip", device="cpu")
    graph["8"] = {**graph["6"], "inputs": graph["6"]["inputs"] | {"reward": ["7", 0]}}
    outputs = run(comfyui, graph)
    assert outputs["8"]["score"] == outputs["6"]["score"]


def test_what_a_mixture_learns_while_training_stays_in_the_run(comfyui):
    graph = graphs.train(prefix="tests/mixture", steps=3, batch_size=4)
    reward = next(k for k, n in graph.items() if n["class_type"] == "RewardLoraLoadReward")
    graph[reward]["inputs"]["mixture"] = "sum(tiny_clip+motion*10, normalised, balanced)"
    outcome = comfyui.run(graph)
    assert outcome.status == "success", outcome.message
    (file,) = (file for file in comfyui.files(outcome) if file.suffix == ".safetensors")
    steps = [json.loads(line) for line in (file.parent / "log.jsonl").read_text().splitlines()]
    assert steps[1]["reward"] == pytest.approx(steps[1]["terms"]["tiny_clip"] + 10 * steps[1]["terms"]["motion"])
    assert steps[3]["reward"] != pytest.approx(steps[3]["terms"]["tiny_clip"] + 10 * steps[3]["terms"]["motion"])

    graph["clip"] = {"class_type": "EmptyImage", "inputs": {"width": 32, "height": 32, "batch_size": 2, "color": 255}}
    graph["score"] = graphs.node("ScoreFrames", reward=[reward, 0], images=["clip", 0], prompt=graphs.PROMPT,
                                 every_frame=False)  # fmt: skip
    outcome = comfyui.run(graph)
    assert outcome.status == "success", outcome.message
    assert reward in outcome.cached
    text = outcome.outputs["score"]["text"][0]
    (total,) = column(text, "sum(tiny_clip+motion*10, normalised, balanced)")
    assert [total] == pytest.approx(column(text, "tiny_clip"), abs=1e-4), "the clip does not move"


def broken(kind: str, **changes) -> dict:
    graph = clips(1)
    inputs = {
        "PickBest": {"reward": ["2", 0], "images_1": ["s1", 0], "prompt": graphs.PROMPT, "frames_per_clip": 0},
        "Compare": {"reward": ["2", 0], "images_a": ["s1", 0], "images_b": ["s1", 0], "prompts": graphs.PROMPT,
                    "frames_per_clip": 0},
    }[kind]  # fmt: skip
    graph["6"] = graphs.node(kind, **inputs | changes)
    return graph


def loaded(**inputs) -> dict:
    graph = graphs.score()
    graph["5"]["inputs"] |= inputs
    return graph


BAD = {
    "cut": (broken("PickBest", frames_per_clip=4), "a batch of 9 pictures cannot be cut into clips of 4"),
    "no prompt": (broken("PickBest", prompt=" "), "tiny_clip needs a prompt"),
    "one pair": (broken("Compare"), "at least 2 pairs, and A holds 1 clip, B 1; connect lists"),
    "prompts": (broken("Compare", frames_per_clip=3, prompts="a\nb"), "each of the 3 pairs; got 2"),
    "mixture": (loaded(mixture="max(tiny_clip)"), "'max' in the reward .* known are sum, mean, min, softmin"),
    "term": (loaded(mixture="tiny_clip+beauty"), "unknown reward 'beauty'"),
    "no files": (loaded(mixture="pickscore*2+motion"), "pickscore lacks PickScore_v1.*: allow the download, or put"),
    "path": (loaded(name="pickscore", path="/none/such"), "/none/such does not exist"),
    "device": (loaded(device="cuda:99"), "there is no device 'cuda:99' here; choose one of default, cpu"),
    "option of another": (loaded(action="dancing"), "tiny_clip has no option 'action'"),
    "option twice": (loaded(mixture="tiny_clip*2", action="x"), "write the option action into the mixture"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_answered_in_a_sentence(comfyui, case):
    graph, expected = BAD[case]
    outcome = comfyui.run(graph)
    assert outcome.status in ("error", "refused")
    assert re.search(expected, outcome.message), outcome.message
    assert "Traceback" not in outcome.message


def test_every_reward_is_offered(comfyui):
    from reward_lora.reward_models import REWARDS

    offered = str(comfyui.ask("/object_info")[1]["RewardLoraLoadReward"]["input"]["required"]["name"])
    assert all(repr(name) in offered for name in REWARDS)
