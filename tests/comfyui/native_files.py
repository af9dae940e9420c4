"""A tiny Wan as the single files that ComfyUI's own loaders take."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from reward_lora.tests.families import wan
from reward_lora.tests.families.wan_shapes import (
    TINY,
    TINY_SINGLE,
    TINY_VAE,
    TINY_VAE_22,
    fill,
    transformer_shapes,
    vae_22_shapes,
    vae_shapes,
)
from safetensors.torch import save_file
from torch import Tensor

NATIVE = TINY_SINGLE | {"text_dim": 4096, "freq_dim": 256}
"""Core knows these two sizes by heart, and the width of CLIP."""
DIFFUSION = {
    "t2v": NATIVE,
    "low": NATIVE,
    "i2v": NATIVE | {"in_dim": 36, "image_dim": 1280},
    "ti2v": NATIVE | {"in_dim": 48, "out_dim": 48},
    "control": NATIVE | {"in_dim": 52},
}
UMT5 = {"vocab_size": 40, "d_model": 4096, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}
VAE = {"vae": TINY_VAE | {"dim_mult": (1, 2, 4, 4), "num_res_blocks": 2}}
VAE["vae_22"] = TINY_VAE_22 | {"dim_mult": (1, 2, 4, 4), "num_res_blocks": 2, "temporal": (False, True, True)}
CLIP = {"hidden_size": 1280, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 16}
CLIP |= {"patch_size": 14, "image_size": 224, "hidden_act": "gelu", "num_channels": 3}
FACE = ((20, 12), (44, 52))
"""Corners of what the tests' detector takes for a face: it is bright."""


def diffusion(kind: str, seed: int = 0) -> dict[str, Tensor]:
    """A transformer's tensors in the publisher's names."""
    return fill(transformer_shapes(**DIFFUSION[kind]), seed, 0.05)


def diffusion_in_float8() -> dict[str, Tensor]:
    """Matrices in scaled float8; the rest loses nothing in float8, for some versions of core keep biases so too."""
    prefix = "model.diffusion_model."
    tensors = wan._float8({prefix + name: tensor for name, tensor in diffusion("t2v").items()}, prefix)
    rounded = {name: tensor.to(torch.float8_e4m3fn).to(tensor.dtype) for name, tensor in tensors.items()}
    return tensors | {name: tensor for name, tensor in rounded.items() if tensor.dtype == torch.float16}


def vae(kind: str = "vae") -> dict[str, Tensor]:
    return fill((vae_22_shapes if kind == "vae_22" else vae_shapes)(**VAE[kind]), 2)


def text_encoder(*, float8: bool = False) -> dict[str, Tensor]:
    """UMT5 in transformers' names with a tokenizer inside, in 16 bits or with its linear layers in scaled float8."""
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(3)
    tensors = UMT5EncoderModel(UMT5Config(**UMT5, feed_forward_proj="gated-gelu")).state_dict()
    del tensors["encoder.embed_tokens.weight"]
    tensors["spiece_model"] = wan._umt5_of_transformers()["spiece_model"]
    if not float8:
        return wan._half(tensors)
    linear = {name for name in tensors if name.startswith("encoder.block") and "_bias" not in name}
    packed = wan._float8({name: tensors[name] for name in linear})
    packed["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)  # the mark is empty in this file
    return packed | wan._half({name: tensor for name, tensor in tensors.items() if name not in linear})


def clip_vision() -> dict[str, Tensor]:
    """CLIP's image encoder in the names of transformers 4, as wide as Wan's."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(4)
    tensors = CLIPVisionModel(CLIPVisionConfig(**CLIP)).state_dict()
    return wan._half({f"vision_model.{name.removeprefix('vision_model.')}": t for name, t in tensors.items()})


def lora(sizes: Mapping[str, int], *, prefix: str = "diffusion_model.", seed: int = 5) -> dict[str, Tensor]:
    """For every linear layer of the blocks of a tiny Wan, with halves called down and up and an alpha."""
    tensors, generator = {}, torch.Generator().manual_seed(seed)
    for name, (out, *inside) in transformer_shapes(**sizes).items():
        if name.startswith("blocks.") and name.endswith(".weight") and len(inside) == 1:
            module = name.removesuffix(".weight")
            module = prefix + (module if prefix.endswith(".") else module.replace(".", "_"))
            tensors[f"{module}.lora_down.weight"] = torch.randn(4, *inside, generator=generator) * 0.1
            tensors[f"{module}.lora_up.weight"] = torch.randn(out, 4, generator=generator) * 0.1
            tensors[f"{module}.alpha"] = torch.tensor(4.0)
    return tensors


def write(base: Path, folder: str, name: str) -> None:
    """A tiny file, or a folder of them, in place of what a workflow asks its user for.

    Args:
        base: ComfyUI's base directory.
        folder: In ``models``, or ``input``.
        name: What is published.
    """
    path = base / "input" / name if folder == "input" else base / "models" / folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if folder == "input":
        picture = Image.new("RGB", (64, 64))
        ImageDraw.Draw(picture).rectangle(FACE, (255, 240, 250))
        picture.save(path)
    elif folder == "reward_models":
        write_face_networks(path)
    elif folder == "loras":
        fun = name.startswith("Wan2.1-Fun")
        save_file(lora(DIFFUSION["i2v"], prefix="lora_unet__") if fun else lora(TINY | {"in_dim": 36}), path)
    else:
        make = {
            "diffusion_models": lambda: wan._half(diffusion("i2v" if "fun_inp" in name else "t2v")),
            "text_encoders": lambda: text_encoder(float8="fp8" in name),
            "vae": lambda: wan._half(vae()),
        }
        save_file(make[folder](), path)


def write_face_networks(folder: Path) -> None:
    """An insightface pack of tiny networks. Skips where the packages of the extra ``face`` are missing."""
    from reward_lora.tests.test_face import IResNet, Scrfd, export

    torch.manual_seed(0)
    folder.mkdir(exist_ok=True)
    export(IResNet(), folder / "glintr100.onnx", 112, {0: "None"})
    export(Scrfd(), folder / "scrfd_10g_bnkps.onnx", 640, {2: "?", 3: "?"})


def write_config(path: Path) -> None:
    """Of :func:`clip_vision`, which core cannot tell from its tensors."""
    path.write_text(json.dumps(CLIP | {"model_type": "clip_vision_model"}))
