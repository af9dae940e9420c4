"""Training on what core's own loaders loaded: the same LoRA as through our loader, and core's sampler takes it."""

from __future__ import annotations

import json
import re
import shutil
import time
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import graphs, native_files

pytestmark = pytest.mark.comfyui

SHIFT, STEPS, SEED, GUIDANCE = 3.0, 4, 7, 2.0
NUMBERS = count()
PROMPT = "a red circle moves right"
LEVEL = 1.5 / 255
"""Of a saved picture, where rounding may go either way."""
SIZE = {"width": 32, "height": 32, "frames": 5}


@dataclass
class Files:
    """A tiny Wan as single files in ComfyUI's folders, and the nodes that load it."""

    base: Path

    def core(self, file: str = "t2v", shift: float = SHIFT, vae: str = "vae", **changes) -> dict:
        """Nodes m (MODEL), s (its shift), c (CLIP), v (VAE) and 1 (ours from them)."""
        unet = {"unet_name": f"native_{file}.safetensors", "weight_dtype": "default"}
        parts = {"model": ["s", 0], "clip": ["c", 0], "vae": ["v", 0], "dtype": "float32"}
        text = {"clip_name": "native.safetensors", "type": "wan"}
        pictures = self.base / "clip_vision"
        return {
            "m": {"class_type": "UNETLoader", "inputs": unet},
            "s": {"class_type": "ModelSamplingSD3", "inputs": {"model": ["m", 0], "shift": shift}},
            "c": {"class_type": "CLIPLoader", "inputs": text},
            "v": {"class_type": "VAELoader", "inputs": {"vae_name": f"native_{vae}.safetensors"}},
            "p": {"class_type": "TestTinyClipVision",
                  "inputs": {"path": str(pictures / "native.safetensors"), "config": str(pictures / "config.json")}},
            "1": graphs.node("VideoModelFromParts", **parts | changes),
        }  # fmt: skip

    def ours(self, model: str = "t2v", vae: str = "vae", **changes) -> dict:
        """Node 1, our loader of the same files."""
        files = {"diffusion": f"native_{model}.safetensors", "text_encoder": "native.safetensors"}
        files |= {"vae": f"native_{vae}.safetensors", "dtype": "float32"}
        return {"1": graphs.node("LoadVideoModelFiles", **files | changes)}


@pytest.fixture(scope="module")
def files(comfyui) -> Files:
    base = comfyui.base / "models"
    for folder in ("diffusion_models", "text_encoders", "vae", "clip_vision"):
        (base / folder).mkdir(exist_ok=True)
    for seed, kind in enumerate(native_files.DIFFUSION):
        save_file(native_files.diffusion(kind, seed), base / f"diffusion_models/native_{kind}.safetensors")
    save_file(native_files.diffusion_in_float8(), base / "diffusion_models/native_float8.safetensors")
    for kind in native_files.VAE:
        save_file(native_files.vae(kind), base / f"vae/native_{kind}.safetensors")
    save_file(native_files.text_encoder(), base / "text_encoders/native.safetensors")
    save_file(native_files.clip_vision(), base / "clip_vision/native.safetensors")
    native_files.write_config(base / "clip_vision/config.json")
    return Files(base)


def run(comfyui, graph: dict):
    for node in graph.values():
        if node["class_type"] == "SaveImage":  # what has been saved before would not be listed
            node["inputs"]["filename_prefix"] = f"frames/{next(NUMBERS)}"
    outcome = comfyui.run(graph)
    assert outcome.status == "success", outcome.message
    return outcome


def pictures(comfyui, outcome) -> np.ndarray:
    """The frames a graph saved, ``[T, H, W, 3]`` in 0..1."""
    frames = [np.asarray(Image.open(file)) for file in comfyui.files(outcome) if file.suffix == ".png"]
    return np.stack(frames).astype(float) / 255


def painted(comfyui, load: dict, **changes) -> np.ndarray:
    """What our Generate Video makes of node 1."""
    graph = graphs.generate(prompt=PROMPT, seed=SEED, steps=STEPS, guidance_scale=GUIDANCE, **SIZE, **changes)
    return pictures(comfyui, run(comfyui, graph | load))


def sampled(files: Files, model: list, cfg: float = GUIDANCE, negative: str = "") -> dict:
    """Nodes of core's own sampler, up to frames in node i."""
    text = [("pos", PROMPT), ("neg", negative)]
    sampler = {"model": model, "positive": ["pos", 0], "negative": ["neg", 0], "latent_image": ["e", 0], "cfg": cfg}
    sampler |= {"seed": SEED, "steps": STEPS, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    return files.core() | {
        name: {"class_type": "CLIPTextEncode", "inputs": {"clip": ["c", 0], "text": words}} for name, words in text
    } | {
        "e": {"class_type": "EmptyHunyuanLatentVideo",
              "inputs": {"width": 32, "height": 32, "length": 5, "batch_size": 1}},
        "k": {"class_type": "KSampler", "inputs": sampler},
        "i": {"class_type": "VAEDecode", "inputs": {"samples": ["k", 0], "vae": ["v", 0]}},
        "o": {"class_type": "SaveImage", "inputs": {"images": ["i", 0], "filename_prefix": "frames/core"}},
    }  # fmt: skip


def training(load: dict, prefix: str, **changes) -> dict:
    """Two steps on the model that node 1 loads."""
    settings = {"steps": 2, "batch_size": 2, "sampler_steps": STEPS, "guidance_scale": GUIDANCE, "learning_rate": 0.01}
    settings |= {"prompts": PROMPT, "prompt_file": "", "sample_prompts": PROMPT, "sample_count": 1, **SIZE}
    graph = graphs.train(prefix=prefix, video_model=["1", 0], **settings | changes)
    return {key: node for key, node in graph.items() if node["class_type"] != "RewardLoraLoadVideoModel"} | load


def learned(comfyui, graph: dict) -> dict[str, Tensor]:
    run(comfyui, graph)
    prefix = graph[graphs.train_key(graph)]["inputs"]["prefix"]
    (folder,) = comfyui.output.glob(f"{prefix}_*")
    return load_file(folder / f"{folder.name}.safetensors")


def assert_same_lora(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert max(float(tensor.abs().max()) for name, tensor in one.items() if "lora_B" in name) > 1e-2
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=1e-6)


def weights_of(comfyui, files: Files, model: str = "t2v") -> str:
    graph = files.core(model)
    graph["w"] = {"class_type": "TestModelWeights", "inputs": {"model": ["m", 0]}}
    return run(comfyui, graph).outputs["w"]["text"][0]


@pytest.fixture(scope="module")
def trained(comfyui, files) -> tuple[dict[str, Tensor], str, str]:
    """The LoRA learned on core's MODEL, and the hash of the MODEL's weights before and after."""
    before = weights_of(comfyui, files)
    lora = learned(comfyui, training(files.core(model=["m", 0]), "tests/native"))
    return lora, before, weights_of(comfyui, files)


def test_the_lora_is_the_one_of_our_own_loader(comfyui, files, trained):
    assert_same_lora(trained[0], learned(comfyui, training(files.ours(), "tests/own")))


def test_the_model_itself_stays_as_it_was(trained):
    _, before, after = trained
    assert before == after


def test_a_base_in_scaled_float8(comfyui, files):
    """As our loader unpacks it, and as core's own sampler does, before we have had the model and after."""
    core = pictures(comfyui, run(comfyui, sampled(files, ["s", 0]) | files.core("float8")))
    native = painted(comfyui, files.core("float8"))
    again = pictures(comfyui, run(comfyui, sampled(files, ["s", 0], negative=" ") | files.core("float8")))
    assert np.array_equal(
        painted(comfyui, files.core("float8", model=["m", 0])), painted(comfyui, files.ours("float8"))
    )
    assert np.abs(native - core).max() < LEVEL
    assert np.array_equal(again, core)
    assert np.abs(native - painted(comfyui, files.core())).max() > 2 * LEVEL, "another model"


def test_cores_sampler_takes_the_lora_as_we_do(comfyui, files, trained):
    save_file(trained[0], files.base / "loras" / "native.safetensors")
    native = files.core()
    native["2"] = graphs.node("ApplyRewardLora", video_model=["1", 0], lora_file="native.safetensors", strength=1.0)
    loader = {"class_type": "LoraLoaderModelOnly",
              "inputs": {"model": ["s", 0], "lora_name": "native.safetensors", "strength_model": 1.0}}  # fmt: skip
    ours = painted(comfyui, native), painted(comfyui, native, video_model=["2", 0])
    core = [pictures(comfyui, run(comfyui, sampled(files, [name, 0]) | {"l": loader})) for name in ("s", "l")]
    baked = painted(comfyui, files.core(model=["l", 0]) | {"l": loader})
    assert np.abs(core[1] - core[0]).max() > 0.1, "the LoRA changes nothing that could be seen"
    for one, other in ((core[0], ours[0]), (core[1], ours[1]), (core[1], baked)):
        assert np.abs(one - other).max() < LEVEL


def test_another_lora_is_trained_on_top_of_the_models(comfyui, files, trained):
    """What lies on the MODEL is part of the base: its run has a folder of its own, and the report says it."""
    save_file(trained[0], files.base / "loras" / "native.safetensors")
    graph = training(files.core(model=["l", 0]), "tests/native", steps=1)
    graph["l"] = {"class_type": "LoraLoaderModelOnly",
                  "inputs": {"model": ["m", 0], "lora_name": "native.safetensors", "strength_model": 1.0}}  # fmt: skip
    before = set(comfyui.output.glob("tests/native_*"))
    outcome = run(comfyui, graph)
    (folder,) = set(comfyui.output.glob("tests/native_*")) - before
    assert "weights with LoRAs or other patches taken over" in outcome.outputs["1"]["text"][0]
    first = json.loads((folder / "log.jsonl").read_text().splitlines()[0])["evaluation"]
    (plain,) = before
    last = json.loads((plain / "log.jsonl").read_text().splitlines()[-1])["evaluation"]
    assert first == pytest.approx(last, abs=1e-4), "it should begin where the first LoRA ended"


def test_running_again_goes_on_in_the_same_folder(comfyui, files):
    """Even if everything is loaded again, as after a restart: weights are known by what they are."""
    one = files.base / "diffusion_models/native_t2v.safetensors"
    shutil.copy(one, one.with_name("native_copy.safetensors"))
    run(comfyui, training(files.core(), "tests/resumed", steps=1, lr_schedule="constant"))
    outcome = run(comfyui, training(files.core("copy"), "tests/resumed", steps=2, lr_schedule="constant"))
    assert "1" not in outcome.cached
    (folder,) = comfyui.output.glob("tests/resumed_*")
    steps = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2]


def test_a_cancelled_training_leaves_the_model_usable(comfyui, files):
    def frames(negative: str) -> np.ndarray:  # at guidance 1 the negative is unused, but avoids the cache
        return pictures(comfyui, run(comfyui, sampled(files, ["s", 0], 1.0, negative)))

    before, weights = frames(""), weights_of(comfyui, files)
    status, answer = comfyui.queue(training(files.core(), "tests/cancelled", steps=10_000, lr_schedule="constant"))
    assert status == 200, answer
    deadline = time.monotonic() + 60
    while not any(p.read_text().count("\n") >= 2 for p in comfyui.output.glob("tests/cancelled_*/log.jsonl")):
        assert time.monotonic() < deadline, comfyui.log.read_text()[-2000:]
        time.sleep(0.1)
    comfyui.ask("/interrupt", {})
    assert comfyui.wait(answer["prompt_id"]).interrupted
    assert list(comfyui.output.glob("tests/cancelled_*/checkpoint-*.safetensors"))
    assert np.array_equal(frames("again"), before)
    assert weights_of(comfyui, files) == weights


def test_from_a_picture_of_core_to_a_video_of_core(comfyui, files):
    folder = comfyui.base / "input"
    Image.new("RGB", (40, 24), (250, 20, 20)).save(folder / "red.png")
    results = []
    for load in (files.core("i2v", 5.0, clip_vision=["p", 0]), files.ours("i2v", clip_vision="native.safetensors")):
        graph = graphs.generate(prompt=PROMPT, steps=2, guidance_scale=GUIDANCE, start_image=["2", 0], **SIZE) | load
        graph["2"] = {"class_type": "LoadImage", "inputs": {"image": "red.png"}}
        graph["5"] = {"class_type": "CreateVideo", "inputs": {"images": ["3", 0], "fps": ["3", 1]}}
        saved = {"video": ["5", 0], "filename_prefix": "v", "format": "auto", "codec": "auto"}
        graph["6"] = {"class_type": "SaveVideo", "inputs": saved}
        outcome = run(comfyui, graph)
        assert any(file.suffix == ".mp4" for file in comfyui.files(outcome))
        results.append(pictures(comfyui, outcome))
    assert np.array_equal(*results)


def test_two_experts(comfyui, files):
    native = files.core(model_low=["m2", 0], shift=12.0)
    native["m2"] = {"class_type": "UNETLoader",
                    "inputs": {"unet_name": "native_low.safetensors", "weight_dtype": "default"}}  # fmt: skip
    own = painted(comfyui, files.ours(diffusion_low="native_low.safetensors"))
    assert np.array_equal(painted(comfyui, native), own)
    assert not np.array_equal(own, painted(comfyui, files.core(shift=12.0)))
    native["s2"] = {"class_type": "ModelSamplingSD3", "inputs": {"model": ["m2", 0], "shift": 5.0}}
    native["1"]["inputs"]["model_low"] = ["s2", 0]
    assert "have the shifts 5.0 and 12.0; give both the same" in refusal(comfyui, native)


def test_the_model_of_48_channels(comfyui, files):
    native = painted(comfyui, files.core("ti2v", 5.0, "vae_22"))
    assert np.array_equal(native, painted(comfyui, files.ours("ti2v", "vae_22")))


def test_scores_frames_that_core_decoded(comfyui, files):
    graph = sampled(files, ["s", 0])
    graph["r"] = graphs.node("LoadReward", name="tiny_clip", path="")
    graph["x"] = graphs.node("ScoreFrames", reward=["r", 0], images=["i", 0], prompt=PROMPT, every_frame=False)
    outcome = run(comfyui, graph)
    assert re.search(r"\d\.\d", str(outcome.outputs["x"]["text"]))


def refusal(comfyui, load: dict) -> str:
    outcome = comfyui.run(graphs.generate(prompt=PROMPT, steps=1, **SIZE) | load)
    assert outcome.status == "error"
    assert "Traceback" not in outcome.message
    return outcome.message


def test_what_cannot_be_taken_over_is_said(comfyui, files):
    assert "the MODEL cannot be used: it takes 52 input channels" in refusal(comfyui, files.core("control"))
    assert "belong to different models" in refusal(comfyui, files.core(vae="vae_22"))
    graph = files.core()
    other = {"model": ["m", 0], "sampling": "v_prediction", "sigma_max": 120.0, "sigma_min": 0.002}
    graph["s"] = {"class_type": "ModelSamplingContinuousEDM", "inputs": other}
    assert "only ModelSamplingSD3 is supported" in refusal(comfyui, graph)
    graph["s"] = {"class_type": "RescaleCFG", "inputs": {"model": ["m", 0], "multiplier": 0.7}}
    outcome = run(comfyui, graphs.generate(prompt=PROMPT, steps=1, **SIZE) | graph)
    assert "model: not taken over, for it acts in ComfyUI's sampler alone: sampler_cfg_function" in str(outcome.outputs)
