"""Models of every family in a real ComfyUI: listed, loaded, and their frames in the hands of core nodes."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from PIL import Image
from reward_lora.tests.families import Case, cases
from reward_lora.tests.mirror import mirror
from reward_lora.video_models import BASE_MODELS

from . import graphs

pytestmark = pytest.mark.comfyui

CASES = cases()
FOLDERS = [case for case in CASES if " files" not in case.layout]
FILES = [case for case in CASES if " files" in case.layout]


def name_of(case: Case) -> str:
    return re.sub(r"\W+", "-", str(case))


@pytest.fixture(scope="module")
def checkpoints(comfyui):
    """A folder that extra_model_paths.yaml names, with a tiny model of every family in every layout."""
    for case in FOLDERS:
        case.write(comfyui.base.parent / "elsewhere" / name_of(case))
    return comfyui.base.parent / "elsewhere"


def through_core(case: Case, load: dict) -> dict:
    """From a core IMAGE (where the model takes one) through Generate Video into a core VIDEO and out of it again."""
    width, height, frames = case.size
    start = {"start_image": ["2", 0]} if re.search("i2v|inp", case.layout) else {}
    sizes = {"width": width, "height": height, "frames": frames}
    graph = graphs.generate(prompt="a red circle moves right", steps=2, guidance_scale=2.0, **sizes, **start)
    graph["1"] = load
    graph["2"] = {"class_type": "EmptyImage", "inputs": {"width": 40, "height": 24, "batch_size": 1, "color": 255}}
    graph["5"] = {"class_type": "CreateVideo", "inputs": {"images": ["3", 0], "fps": ["3", 1]}}
    graph["6"] = {"class_type": "GetVideoComponents", "inputs": {"video": ["5", 0]}}
    graph["7"] = {"class_type": "SaveVideo", "inputs": {"video": ["5", 0], "filename_prefix": "video/v"}}
    graph["7"]["inputs"] |= {"format": "auto", "codec": "auto"}
    graph["4"]["inputs"]["images"] = ["6", 0]
    return graph


def check(comfyui, case: Case, graph: dict) -> None:
    outcome = comfyui.run(graph)
    assert outcome.status == "success", outcome.message
    width, height, frames = case.size
    files = comfyui.files(outcome)
    pictures = [np.asarray(Image.open(file)) for file in files if file.suffix == ".png"]
    assert len(pictures) == frames
    assert {picture.shape for picture in pictures} == {(height, width, 3)}
    assert np.stack(pictures).std() > 0
    assert any(file.suffix == ".mp4" for file in files)


@pytest.mark.parametrize("case", FOLDERS, ids=str)
def test_a_model_of_any_family_paints_for_core_nodes(comfyui, checkpoints, case):
    load = graphs.node("LoadVideoModel", name=name_of(case), dtype="float32", path="")
    check(comfyui, case, through_core(case, load))


@pytest.mark.parametrize("case", FILES, ids=str)
def test_single_files_in_comfyuis_folders_paint_for_core_nodes(comfyui, tmp_path, case):
    case.write(tmp_path)
    chosen = {}
    for name, folder in (("diffusion", "diffusion_models"), ("text_encoder", "text_encoders"), ("vae", "vae"),
                         ("clip_vision", "clip_vision")):  # fmt: skip
        target = comfyui.base / "models" / folder
        target.mkdir(parents=True, exist_ok=True)
        files = sorted((tmp_path / folder).glob("*.safetensors"))
        for file in files:
            file.replace(target / f"{name_of(case)}-{file.name}")
        chosen |= {key: f"{name_of(case)}-{file.name}" for key, file in zip((name, f"{name}_low"), files, strict=False)}
    load = graphs.node("LoadVideoModelFiles", dtype="float32", **chosen)
    check(comfyui, case, through_core(case, load))


def test_the_list_is_grouped_and_says_size_and_memory(comfyui, checkpoints):
    options, about = comfyui.ask("/object_info/RewardLoraLoadVideoModel")[1]["RewardLoraLoadVideoModel"]["input"][
        "required"
    ]["name"]
    options = options if isinstance(options, list) else about["options"]
    here = [name_of(case) for case in FOLDERS]
    assert options[0] == "builtin"
    assert set(here) | set(BASE_MODELS) <= set(options)
    families = [next(case.family for case in FOLDERS if name_of(case) == name) for name in options if name in here]
    assert families == sorted(families)
    absent = [name for name in options if name in BASE_MODELS and re.search(rf"{name} \([^,]+, to d", about["tooltip"])]
    assert len(absent) > 20  # other tests bring a few
    published = [BASE_MODELS[name].family for name in absent]
    assert published == sorted(published)
    assert "OpenSora-STDiT-v3 (Open-Sora, to download: 26 GB, memory from 10 GB, Apache-2.0)" in about["tooltip"]
    assert re.search(rf"{here[0]} \({FOLDERS[0].family}, \d+\.\d GB\)", about["tooltip"])


def test_a_published_model_is_downloaded_on_request(comfyui, tmp_path):
    name = "Wan2.1-T2V-14B"
    case = next(case for case in FOLDERS if str(case) == "wan-2.1 original t2v")
    case.write(tmp_path)
    (tmp_path / "model.onnx").write_text("not read")
    load = graphs.node("LoadVideoModel", name=name, dtype="auto", path="", download=True)
    with mirror(tmp_path, BASE_MODELS[name].repository, comfyui.hub):
        check(comfyui, case, through_core(case, load))
    (folder,) = comfyui.base.parent.rglob(name)
    assert (folder / "config.json").is_file()
    assert not (folder / "model.onnx").exists()


def test_a_published_model_that_is_absent_says_where_it_belongs(comfyui):
    graph = graphs.generate()
    graph["1"]["inputs"]["name"] = "Wan2.2-TI2V-5B"
    outcome = comfyui.run(graph)
    assert outcome.status == "error"
    assert "allow the download of about 34 GB" in outcome.message
    assert "https://huggingface.co/Wan-AI/Wan2.2-TI2V-5B" in outcome.message
    assert "Traceback" not in outcome.message


def test_an_image_to_video_model_trains_from_a_connected_image_and_from_a_folder(comfyui, checkpoints):
    case = Case("wan", "2.1 original inp")
    width, height, frames = case.size
    folder = comfyui.base / "input" / "circles"
    folder.mkdir()
    Image.new("RGB", (40, 24), (250, 20, 20)).save(folder / "a.png")
    (folder / "a.txt").write_text("a red circle")
    sizes = {"steps": 1, "batch_size": 1, "width": width, "height": height, "frames": frames, "sampler_steps": 2}
    sizes |= {"backprop_strategy": "last", "sample_count": 1, "sample_prompts": "", "lr_schedule": "constant"}
    runs = []
    for number, given in enumerate(
        (
            {"prompts": "a red circle", "prompt_file": "", "start_image": ["90", 0]},
            {"prompts": "", "prompt_file": "circles"},
        )
    ):
        graph = graphs.train(prefix=f"tests/images{number}", **sizes, **given)
        graph["90"] = {"class_type": "LoadImage", "inputs": {"image": "circles/a.png"}}
        for each in graph.values():
            if each["class_type"] == "RewardLoraLoadVideoModel":
                each["inputs"] |= {"name": name_of(case), "dtype": "float32"}
        outcome = comfyui.run(graph)
        assert outcome.status == "success", outcome.message
        (run,) = comfyui.output.glob(f"tests/images{number}_*")
        runs.append([json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()])
    (before, after), (again, other) = runs
    assert before["evaluation"] == pytest.approx(again["evaluation"], abs=1e-6)  # the same picture by either way
    assert after["reward"] == pytest.approx(other["reward"], abs=1e-6)
    assert not after["skipped"]
