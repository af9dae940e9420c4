"""Every shipped workflow: drawn for the nodes as they are, equal to its API twin, and as its ``tests`` key expects.

``extra.tests`` of a workflow holds

- ``runs``: whether it runs as it is, without any download;
- ``small``: inputs to change in a test, by node, to save time; ``null`` leaves out an input, or a node;
- ``checkpoint``: the tiny model of :mod:`..families` that a Load Video Model is given instead of the published one;
- ``outputs``: how many files of the output folder it lists at least, by their ending;
- ``files``: what its user has to have, by the folder in ``models``, or ``input``; in a test, tiny ones
  (:mod:`.native_files`);
- ``recipe``: the published settings that it trains with.
"""

from __future__ import annotations

import shutil
from collections import Counter

import pytest
from reward_lora.tests.families import Case
from safetensors import safe_open

from . import native_files
from .workflow_format import WORKFLOWS, read, refreshed, to_api, wrong_values

pytestmark = pytest.mark.comfyui

NAMES = sorted(path.stem for path in WORKFLOWS.glob("*.json"))
DRAWN = {name: read(WORKFLOWS / f"{name}.json") for name in NAMES}
TESTS = {name: drawn["extra"]["tests"] for name, drawn in DRAWN.items()}
REFRESH = "python -m reward_lora.tests.comfyui.workflow_format URL brings the workflows up to date"


def twin(name: str) -> dict:
    return read(WORKFLOWS / "api" / f"{name}.json")


@pytest.fixture(scope="module")
def info(comfyui):
    return comfyui.ask("/object_info")[1]


@pytest.mark.parametrize("name", NAMES)
def test_workflow_is_drawn_for_the_nodes_as_they_are(info, name):
    assert wrong_values(twin(name), info, TESTS[name].get("files", {})) == []
    assert refreshed(DRAWN[name], info) == DRAWN[name], REFRESH
    assert to_api(DRAWN[name], info) == twin(name), REFRESH


def test_template_browser_lists_them_with_pictures(comfyui):
    listed = comfyui.ask("/workflow_templates")[1]["reward-lora"]
    assert sorted(listed) == NAMES
    for name in NAMES:
        assert comfyui.ask(f"/api/workflow_templates/reward-lora/{name}.json")[0] == 200
        assert comfyui.ask(f"/api/workflow_templates/reward-lora/{name}.jpg")[0] == 200
        assert (WORKFLOWS / f"{name}.jpg").stat().st_size < 40_000


def made_small(name: str) -> dict:
    graph = twin(name)
    for key, changes in TESTS[name].get("small", {}).items():
        if changes is None:
            del graph[key]
            continue
        inputs = graph[key]["inputs"] | changes
        graph[key]["inputs"] = {name: value for name, value in inputs.items() if value is not None}
    return graph


@pytest.mark.parametrize("name", NAMES)
def test_workflow_runs(comfyui, name):
    graph = made_small(name)
    for folder, files in TESTS[name].get("files", {}).items():
        for file in files:
            native_files.write(comfyui.base, folder, file)
    for key, case in TESTS[name].get("checkpoint", {}).items():
        folder = comfyui.base.parent / f"checkpoint of {name}"
        Case(*case).write(folder)
        graph[key]["inputs"] |= {"path": str(folder), "dtype": "float32"}
    outcome = comfyui.run(graph)
    if "needs the Python package" in outcome.message:
        pytest.skip(f"{name} is NOT tested: {outcome.message}")
    assert outcome.status == "success", outcome.message
    files = comfyui.files(outcome)
    assert all(file.is_file() for file in files)
    found, expected = Counter(file.suffix for file in files), TESTS[name]["outputs"]
    assert {kind: min(found[kind], count) for kind, count in expected.items()} == expected
    for file in files:
        if file.parent.name == "loras":
            with safe_open(file, "pt") as lora:
                assert "RewardLora" in lora.metadata()["prompt"], "the file should tell the workflow that made it"
    shutil.rmtree(comfyui.output / "reward_lora", ignore_errors=True)
