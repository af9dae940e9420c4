"""Full-size models with random weights on a GPU: peak memory and seconds a step by memory plan.

    python -m reward_lora.benchmarks.gpu [--json FILE] [--models NAME ...] [--plans PLAN ...] [--cap GB]

Weights are made on the meta device and filled on the GPU, bfloat16, the VAE in float32 as its loader has it; nothing is
written or downloaded. A step is the trainer's: 256x256, 81 frames (49 where a model has no more), 30 solver steps,
guidance 6, the last 5 trained, a ViT-H judge with HPS' sizes in half precision. ``--cap 24`` forbids the allocator
more than a 24 GB card has. ``--tiny`` runs the same code on tiny networks, on a CPU too.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..reward_models.scoring import FrameReward
from ..training.config import TrainConfig
from ..training.memory import PLANS
from ..training.schedule import BackpropSchedule
from ..training.trainer import Trainer
from ..video_models.protocol import VideoModel
from .common import Result, Table, command, fresh, spread
from .scoring import judge_of

STEPS = 2
"""Measured after one that is not counted."""


@dataclass(frozen=True)
class Model:
    """A published model.

    Attributes:
        family: Builds it.
        network: Configuration of its denoiser, in diffusers' terms.
        tokens: Of a prompt.
        frames: Most that it paints, of 81.
    """

    family: str
    network: Mapping[str, Any]
    tokens: int
    frames: int = 81


def _wan(heads: int, layers: int, ffn: int, channels: int = 16, clip: bool = False) -> Model:
    network = {"num_attention_heads": heads, "attention_head_dim": 128, "in_channels": channels, "out_channels": 16,
               "text_dim": 4096, "freq_dim": 256, "ffn_dim": ffn, "num_layers": layers, "cross_attn_norm": True,
               "qk_norm": "rms_norm_across_heads", "patch_size": (1, 2, 2), "rope_max_seq_len": 1024}  # fmt: skip
    if clip:
        network |= {"image_dim": 1280, "added_kv_proj_dim": heads * 128}
    return Model("wan", network, 64)


def _cogvideox(heads: int, layers: int, channels: int) -> Model:
    network = {"num_attention_heads": heads, "attention_head_dim": 64, "in_channels": channels, "out_channels": 16,
               "num_layers": layers, "text_embed_dim": 4096, "time_embed_dim": 512, "sample_width": 90,
               "sample_height": 60, "sample_frames": 49, "max_text_seq_length": 226, "timestep_activation_fn": "silu",
               "use_rotary_positional_embeddings": heads == 48}  # fmt: skip
    return Model("cogvideox", network, 226, 49)


def _easyanimate(layers: int) -> Model:
    network = {"num_attention_heads": 48, "attention_head_dim": 64, "in_channels": 33, "out_channels": 16,
               "patch_size": 2, "num_layers": layers, "mmdit_layers": layers, "time_embed_dim": 512,
               "text_embed_dim": 3584, "text_embed_dim_t5": None, "add_norm_text_encoder": True,
               "add_noise_in_inpaint_model": True, "sample_width": 90, "sample_height": 60}  # fmt: skip
    return Model("easyanimate", network, 256, 49)


MODELS = {
    "Wan2.1-T2V-1.3B": _wan(12, 30, 8960),
    "Wan2.1-Fun-1.3B-InP": _wan(12, 30, 8960, 36, clip=True),
    "Wan2.1-T2V-14B": _wan(40, 40, 13824),
    "Wan2.1-Fun-14B-InP": _wan(40, 40, 13824, 36, clip=True),
    "CogVideoX-Fun-V1.1-2b-InP": _cogvideox(30, 30, 33),
    "CogVideoX-Fun-V1.1-5b-InP": _cogvideox(48, 42, 33),
    "EasyAnimateV5.1-12b-zh-InP": _easyanimate(48),
}
WAN_VAE: dict[str, Any] = {"base_dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2}
COGVIDEOX_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 256, 512), "latent_channels": 16, "layers_per_block": 3,
    "temporal_compression_ratio": 4, "down_block_types": ("CogVideoXDownBlock3D",) * 4,
    "up_block_types": ("CogVideoXUpBlock3D",) * 4,
}  # fmt: skip
EASYANIMATE_VAE: dict[str, Any] = {
    "block_out_channels": [128, 256, 512, 512], "latent_channels": 16, "layers_per_block": 2, "norm_num_groups": 32,
    "scaling_factor": 0.7125, "mid_block_use_attention": False,
    **{f"{way}_block_types": [f"Spatial{way.title()}Block3D"] + [f"SpatialTemporal{way.title()}Block3D"] * 3
       for way in ("down", "up")},
}  # fmt: skip
TINY = {"num_layers": 2, "mmdit_layers": 2, "num_attention_heads": 2, "ffn_dim": 64, "text_dim": 16,
        "text_embed_dim": 16, "image_dim": 16}  # fmt: skip
TINY_VAES = {
    "wan": WAN_VAE | {"base_dim": 4, "num_res_blocks": 1},
    "cogvideox": COGVIDEOX_VAE | {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1},
    "easyanimate": EASYANIMATE_VAE | {"block_out_channels": [8] * 4, "layers_per_block": 1, "norm_num_groups": 4},
}


def filled(build: Callable[[], nn.Module], device: str, dtype: torch.dtype) -> nn.Module:
    """A network made on the meta device, and filled where it shall work with numbers that keep activations sound."""
    with torch.device("meta"):
        network = build().to(dtype)
    computed = {name: buffer for name, buffer in network.named_buffers() if buffer.device.type != "meta"}
    network = network.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, tensor in network.state_dict(keep_vars=True).items():
        if name in computed:
            tensor.data.copy_(computed[name])
        elif tensor.is_floating_point():
            wide = math.prod(tensor.shape[1:]) if tensor.ndim > 1 else 0
            tensor.data.normal_(0, wide**-0.5 if wide else 0.02, generator=generator)
            if "norm" in name and name.endswith(("weight", "gamma")):
                tensor.data.add_(1)
    for name, buffer in computed.items():
        parent, _, last = name.rpartition(".")
        network.get_submodule(parent)._buffers[last] = buffer.to(device)
    return network.eval()


def build(name: str, device: str, tiny: bool) -> VideoModel:
    """The model, random, without its text encoder: its prompts' embeddings are random too."""
    from diffusers import AutoencoderKLWan

    from ..video_models import cogvideox, cogvideox_files, easyanimate, easyanimate_files, wan, wan_parts
    from ..video_models.loading import diffusers
    from ..video_models.solvers import Ddim, FlowMatch

    chosen, dtype = MODELS[name], torch.float32 if device == "cpu" else torch.bfloat16
    network = dict(chosen.network)
    if tiny:
        network |= {key: value for key, value in TINY.items() if key in network}
        if "added_kv_proj_dim" in network:
            network["added_kv_proj_dim"] = network["num_attention_heads"] * network["attention_head_dim"]
    vaes = {"wan": WAN_VAE, "cogvideox": COGVIDEOX_VAE, "easyanimate": EASYANIMATE_VAE}
    vae = (TINY_VAES if tiny else vaes)[chosen.family]
    if chosen.family == "wan":
        transformer = filled(lambda: wan_parts.build_transformer(network), device, dtype)
        decoder = filled(lambda: AutoencoderKLWan(**vae), device, torch.float32)
        model: Any = wan.WanModel(wan_parts.make_spec(name, transformer, decoder), transformer, decoder)
    elif chosen.family == "cogvideox":
        transformer = filled(lambda: cogvideox_files.build_transformer(network), device, dtype)
        cogvideox.resize_positions(transformer)
        decoder = filled(lambda: diffusers("AutoencoderKLCogVideoX")(vae), device, torch.float32)
        solver = Ddim.from_config({"prediction_type": "v_prediction", "timestep_spacing": "trailing"})
        spec = cogvideox_files.describe(name, transformer, decoder)
        model = cogvideox.CogVideoXModel(spec, transformer, decoder, solver)
    else:
        transformer = filled(lambda: diffusers("EasyAnimateTransformer3DModel")(network), device, dtype)
        decoder = filled(lambda: easyanimate_files.build_vae(vae), device, torch.float32)
        spec = easyanimate_files._spec(name, transformer, decoder, FlowMatch(5.0))
        tower = easyanimate.TextTower(chosen.tokens, lambda *_: None)
        model = easyanimate.EasyAnimateModel(spec, transformer, decoder, [tower], FlowMatch(5.0))
    width = network.get("text_dim") or network["text_embed_dim"]
    model.encode_text = lambda prompts: [torch.randn(chosen.tokens, width) for _ in prompts]
    return model


def cell(name: str, plan: str, all_frames: bool, tiny: bool, device: str, cap: float) -> dict[str, Any]:
    """Peak bytes and seconds of steps, or ``error`` if they do not fit."""
    if cap and device != "cpu":
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap * 1e9 / whole))
    pixels, frames, solver_steps, trained = (32, 9, 2, 1) if tiny else (256, MODELS[name].frames, 30, 5)
    model = build(name, "cpu", tiny) if tiny or plan == "offload" else build(name, device, tiny)
    judge = judge_of("hps", "tiny" if tiny else "vit-h", []).eval().requires_grad_(False)
    reward = FrameReward(judge.to(torch.float32 if device == "cpu" else torch.float16), "hps")
    config = TrainConfig(
        steps=2 if tiny else STEPS + 1, width=pixels, height=pixels, frames=frames, sampler_steps=solver_steps,
        guidance_scale=6.0,
        rank=4 if tiny else 128, network_alpha=4 if tiny else 64, judged_latents=0 if all_frames else 1,
        backprop=BackpropSchedule("tail", trained), memory=plan, sample_every=0, save_every=1000, guards="off",
    )  # fmt: skip
    seconds, peaks, said = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        try:
            run = Trainer(model, reward, ["a red circle"], config, Path(folder) / "run", device=device)
            with closing(iter(run)) as events:
                for event in events:
                    if event.step > 1:
                        seconds.append(event.seconds)
                        peaks.append(event.memory)
                        said.append(event.skipped)
        except torch.OutOfMemoryError:
            return {"error": "does not fit"}
    return {"bytes": max(peaks), "seconds": seconds, "skipped": next(filter(None, said), "")}


def measure(options: argparse.Namespace) -> Result:
    tiny, device = options.tiny or options.quick, "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not tiny:
        sys.exit("there is no GPU here, so nothing was measured; --tiny shows that the code runs")
    names = [name for name in options.models or MODELS if not options.quick or name in list(MODELS)[1::3]]
    plans = options.plans or (["fast"] if options.quick else [plan.name for plan in PLANS])
    rows, figures = [], []
    for name in names:
        for plan in plans:
            for all_frames in (False, True):
                found = fresh(cell, name, plan, all_frames, tiny, device, options.cap)
                figures.append({"model": name, "plan": plan, "all_frames": all_frames, "cap": options.cap, **found})
                row = [name, plan, "all" if all_frames else "first"]
                if "error" in found:
                    rows.append([*row, found["error"], ""])
                else:
                    rows.append([*row, f"{found['bytes'] / 1e9:.1f}", spread(found["seconds"], 1)])
                print(*rows[-1], sep="  ", file=sys.stderr, flush=True)
    cap = f", no more than {options.cap:g} GB of memory" if options.cap else ""
    size = "tiny networks, 32x32x9, 2 solver steps, K = 1" if tiny else "256x256x81 (49), 30 solver steps, K = 5"
    about = f"{size}, guidance 6, LoRA in every linear layer, HPS judge, {device}{cap}; random weights"
    columns = ("model", "memory", "frames judged", "peak GB" if device != "cpu" else "resident GB", "seconds a step")
    return Result(about, [Table(columns, rows)], [], {"cells": figures, "median": _medians(figures)})


def _medians(figures: list[dict[str, Any]]) -> dict[str, float]:
    names = ("all frames", "first frame")
    return {
        f"{f['model']}, {f['plan']}, {names[not f['all_frames']]}": statistics.median(f["seconds"])
        for f in figures
        if f.get("seconds")
    }


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", choices=list(MODELS), metavar="NAME", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--plans", nargs="+", choices=[plan.name for plan in PLANS])
    parser.add_argument("--cap", type=float, default=0.0, help="gigabytes that the GPU pretends to have; 0 is all")
    parser.add_argument("--tiny", action="store_true", help="tiny networks, on a CPU too: does the code run?")


if __name__ == "__main__":
    sys.exit(command("gpu", __doc__, measure, options))
