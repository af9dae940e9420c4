"""Cancelled at any moment, a graph leaves every weight as it was and takes no memory with it; unloading gives it back.

``REWARD_LORA_CANCELS=50`` cancels that often instead of the few times of a quick test.
"""

from __future__ import annotations

import os
import random
import time

import pytest
import torch
from diffusers import WanTransformer3DModel
from reward_lora.tests.families import Case

from . import graphs

pytestmark = pytest.mark.comfyui

CANCELS = int(os.environ.get("REWARD_LORA_CANCELS", "6"))
WIDE = {"ffn_dim": 250_000}
LIMIT = 1.1
"""Resident memory afterwards, relative to before."""


def weights(comfyui, graph: dict, salt: int) -> str:
    """Digest of all weights of the model that node 1 loads, from the server's own memory."""
    graph = {"1": graph["1"], "9": {"class_type": "TestWeights", "inputs": {"video_model": ["1", 0], "salt": salt}}}
    outcome = comfyui.run(graph)
    assert outcome.status == "success", outcome.message
    (text,) = outcome.outputs["9"]["text"]
    assert int(text.split()[0]) > 100
    return text


def work(kind: str, number: int) -> dict:
    """A graph that takes a while, on the model of node 1; another one at every number."""
    if kind == "train":
        graph = graphs.train(prefix="tests/cancelled", steps=10_000, seed=number, save_every=10_000, sample_every=5)
        return renamed(graph)
    if kind == "score":
        graph = graphs.score(prompt=f"{graphs.PROMPT} {number}")
        graph["6"]["inputs"]["every_frame"] = True
    else:
        graph = graphs.apply("builtin: colour fix", 0.5)
    graph["3"]["inputs"] |= {"seed": number, "steps": 200}
    return graph


def renamed(graph: dict) -> dict:
    """The training graph with its model as node 1, so that all graphs share one."""
    (old,) = (key for key, node in graph.items() if node["class_type"] == "RewardLoraLoadVideoModel")
    graph["1"] = graphs.generate()["1"]
    del graph[old]
    for node in graph.values():
        node["inputs"] = {k: ["1", v[1]] if v == [old, 0] else v for k, v in node["inputs"].items()}
    return graph


def cancel(comfyui, graph: dict, after: float) -> bool:
    """Run a graph and cancel it after some seconds. Says whether it was cancelled or had ended by itself."""
    status, answer = comfyui.queue(graph)
    assert status == 200, answer
    time.sleep(after)
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        comfyui.ask("/interrupt", {})  # again and again: one that comes before the graph has begun is forgotten
        time.sleep(0.3)
        if answer["prompt_id"] in comfyui.ask(f"/history/{answer['prompt_id']}")[1]:
            outcome = comfyui.wait(answer["prompt_id"])
            assert outcome.interrupted or outcome.status == "success", outcome.message
            return outcome.interrupted
    raise TimeoutError("the graph went on although it was cancelled")


def test_cancels_at_random_moments_change_no_weight_and_keep_no_memory(comfyui, record_property):
    rng = random.Random(0)
    kinds = ("train", "generate", "score")
    for number, kind in enumerate(kinds):  # what is loaded once and stays
        cancel(comfyui, work(kind, 1000 + number), 4.0)
    before, memory = weights(comfyui, graphs.generate(), 0), comfyui.memory()
    cancelled = 0
    for number in range(CANCELS):
        cancelled += cancel(comfyui, work(kinds[number % 3], number), rng.uniform(0.0, 2.0))
    after, now = weights(comfyui, graphs.generate(), 1), comfyui.memory()
    record_property("cancels", f"{cancelled} of {CANCELS}; resident {memory >> 20} -> {now >> 20} MiB")
    assert cancelled > CANCELS / 2
    assert after == before
    assert now < LIMIT * memory


def test_unloading_gives_the_memory_back(comfyui, record_property):
    """A model of 190 MB comes, generates, trains, and goes with the button "Free model and node cache"."""
    folder = comfyui.base.parent / "elsewhere" / "large"
    Case("wan", "2.1 diffusers t2v").write(folder)
    with torch.device("meta"):
        network = WanTransformer3DModel.from_config(WanTransformer3DModel.load_config(folder / "transformer") | WIDE)
    network = network.to_empty(device="cpu")
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    network.save_pretrained(folder / "transformer")
    size = sum(p.nbytes for p in network.parameters())
    assert size > 180e6

    def work(name: str) -> None:
        sizes = {"width": 32, "height": 32, "frames": 5}
        load = graphs.node("LoadVideoModel", name=name, dtype="float32", path="")
        graph = graphs.generate(steps=2, **sizes) | {"1": load}
        assert comfyui.run(graph).status == "success"
        graph = renamed(graphs.train(prefix=f"tests/{name}", steps=1, sampler_steps=2, sample_every=0, **sizes))
        outcome = comfyui.run(graph | {"1": load})
        assert outcome.status == "success", outcome.message

    work("my_wan")
    before = comfyui.free()
    work("large")
    full = comfyui.memory()
    after = comfyui.free(LIMIT * before)
    record_property("resident", f"{before >> 20} -> {full >> 20} -> {after >> 20} MiB, model {size >> 20} MiB")
    assert full > before + 0.8 * size
    assert after < LIMIT * before
