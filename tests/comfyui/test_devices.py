"""Training on several devices from a real ComfyUI: followed, cancelled and gone on with like any other."""

from __future__ import annotations

import json
import time

import psutil
import pytest

from . import graphs

pytestmark = pytest.mark.comfyui
PATIENCE = 900.0


def workers(folder) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if str(folder / "workers") in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:  # it ends just now
            continue
    return found


def test_two_processes_are_followed_cancelled_and_gone_on_with(comfyui):
    settings = {"prefix": "tests/devices", "sample_every": 0, "lr_schedule": "constant", "batch_size": 1}
    status, answer = comfyui.queue(graphs.train(steps=10_000, save_every=10_000, devices=2, **settings))
    assert status == 200, answer
    deadline = time.monotonic() + PATIENCE
    while not any(p.read_text().count("\n") >= 2 for p in comfyui.output.glob("tests/devices_*/log.jsonl")):
        assert time.monotonic() < deadline, comfyui.log.read_text()[-2000:]
        time.sleep(0.1)
    (folder,) = comfyui.output.glob("tests/devices_*")
    assert len(workers(folder)) == 2
    comfyui.ask("/interrupt", {})
    assert comfyui.wait(answer["prompt_id"]).interrupted
    assert not workers(folder)
    (checkpoint,) = folder.glob("checkpoint-*.safetensors")
    reached = int(checkpoint.stem.partition("-")[2])

    # With other evaluations, and shards: settings that do not change what is learned.
    settings |= {"sample_every": reached + 1, "sample_count": 1, "save_every": 10_000}
    graph = graphs.train(steps=reached + 1, devices=2, **settings)
    graph["memory"] = graphs.node("MemorySettings", memory="auto", float8=False, shard=True)
    graph[graphs.train_key(graph)]["inputs"]["memory"] = ["memory", 0]
    outcome = comfyui.run(graph)
    assert outcome.status == "success", outcome.message
    assert list(comfyui.output.glob("tests/devices_*")) == [folder], "another folder: it did not resume"
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(reached + 2))
    assert records[-1]["evaluation"] is not None
    shown = outcome.outputs[graphs.train_key(graph)]
    assert {"report.html", f"{folder.name}.safetensors"} <= {file["filename"] for file in shown["files"]}
    assert not workers(folder)


def test_what_no_other_process_can_load_is_refused(comfyui):
    graph = graphs.train(prefix="tests/refused", devices=2)
    (key,) = [key for key, node in graph.items() if node["class_type"] == "RewardLoraLoadReward"]
    graph[key]["inputs"]["device"] = "cpu"
    outcome = comfyui.run(graph)
    assert outcome.status == "error"
    assert "several devices train in processes that load model and rewards themselves" in outcome.message
