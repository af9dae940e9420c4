"""Training on what core's own loaders loaded: the same LoRA as through our loader, and core's sampler takes it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from reward_lora.tests.families import wan
from reward_lora.tests.families.wan_shapes import TINY_SINGLE, TINY_VAE, fill, transformer_shapes, vae_shapes
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import graphs

pytestmark = pytest.mark.comfyui

NATIVE = TINY_SINGLE | {"text_dim": 4096, "freq_dim": 256}
"""Core knows these two sizes by heart."""
UMT5 = {"vocab_size": 40, "d_model": 4096, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}
SHIFT, SEED = 3.0, 7
SIZE = {"width": 32, "height": 32, "frames": 5}
PROMPTS = "a red circle moves right\na blue square on the left"


@dataclass
class Files:
    """A tiny Wan as single files in ComfyUI's folders, and the nodes that load it."""

    base: Path

    def core(self, model: str = "native_t2v", shift: float = SHIFT, **changes) -> dict:
        """Nodes m (MODEL), s (its shift), c (CLIP), v (VAE) and 1 (ours from them)."""
        sizes = {key: TINY_VAE[key] for key in ("dim", "z_dim", "dim_mult", "num_res_blocks")}
        unet = {"unet_name": f"{model}.safetensors", "weight_dtype": "default"}
        parts = {"model": ["s", 0], "clip": ["c", 0], "vae": ["v", 0], "dtype": "float32"}
        return {
            "m": {"class_type": "UNETLoader", "inputs": unet},
            "s": {"class_type": "ModelSamplingSD3", "inputs": {"model": ["m", 0], "shift": shift}},
            "c": {
                "class_type": "TestTinyClip",
                "inputs": {"path": str(self.base / "text_encoders/native.safetensors"), "config": json.dumps(UMT5)},
            },
            "v": {
                "class_type": "TestTinyVae",
                "inputs": {"path": str(self.base / "vae/native.safetensors"), "sizes": json.dumps(sizes)},
            },
            "1": graphs.node("VideoModelFromParts", **parts | changes),
        }

    def ours(self, model: str = "native_t2v") -> dict:
        """Node 1, our loader of the same files."""
        files = {"diffusion": f"{model}.safetensors", "text_encoder": "native.safetensors", "vae": "native.safetensors"}
        return {"1": graphs.node("LoadVideoModelFiles", dtype="float32", **files)}


@pytest.fixture(scope="module")
def files(comfyui) -> Files:
    base = comfyui.base / "models"
    for folder in ("diffusion_models", "text_encoders", "vae", "clip_vision"):
        (base / folder).mkdir(exist_ok=True)
    tensors = fill(transformer_shapes(**NATIVE), 1, 0.05)
    save_file(tensors, base / "diffusion_models" / "native_t2v.safetensors")
    save_file(fill(vae_shapes(**TINY_VAE), 2), base / "vae" / "native.safetensors")
    save_file(wan._half(text_encoder()), base / "text_encoders" / "native.safetensors")
    return Files(base)


def text_encoder() -> dict[str, Tensor]:
    """UMT5 in transformers' names with a tokenizer inside, as wide as Wan's."""
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(3)
    tensors = UMT5EncoderModel(UMT5Config(**UMT5, feed_forward_proj="gated-gelu")).state_dict()
    del tensors["encoder.embed_tokens.weight"]
    return tensors | {"spiece_model": wan._umt5_of_transformers()["spiece_model"]}


def trained(comfyui, load: dict, prefix: str, **changes) -> dict[str, Tensor]:
    """What three steps teach a model that node 1 loads."""
    settings = {"steps": 3, "batch_size": 2, "sampler_steps": 3, "guidance_scale": 2.0, "learning_rate": 1e-3}
    settings |= {"prompts": PROMPTS, "prompt_file": "", "sample_prompts": "a red circle", "sample_count": 1, **SIZE}
    graph = graphs.train(prefix=prefix, video_model=["1", 0], **settings | changes)
    graph = {key: node for key, node in graph.items() if node["class_type"] != "RewardLoraLoadVideoModel"} | load
    outcome = comfyui.run(graph)
    assert outcome.status == "success", outcome.message
    (run,) = comfyui.output.glob(f"{prefix}_*")
    return load_file(run / f"{run.name}.safetensors")


def test_the_lora_is_the_one_of_our_own_loader(comfyui, files):
    native = trained(comfyui, files.core(shift=5.0), "tests/native")
    own = trained(comfyui, files.ours(), "tests/own")
    assert native.keys() == own.keys()
    change = max(float(own[name].abs().max()) for name in own if "lora_B" in name)
    assert change > 1e-3, "nothing was learned"
    for name, tensor in own.items():
        torch.testing.assert_close(native[name], tensor, rtol=0, atol=1e-3 * change)
