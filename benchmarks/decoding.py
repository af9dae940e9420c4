"""The gradient of a whole clip through Wan's VAE: chunk by chunk against one autograd graph, side by side.

    python -m reward_lora.benchmarks.decoding [--quick] [--json FILE] [--device cuda]

Memory is what PyTorch allocates above the start, what waits between the chunks included; on a GPU that is in main
memory. Times are taken in turns in one process. The gradients are compared in float64.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from ..training.decoding import Decoder, sparse
from ..training.gradient import silent
from ..video_models.protocol import ModelSpec
from ..video_models.wan import WanModel
from .allocated import peak_bytes
from .common import Result, Table, command, in_turns, mib, ratio, spread

WAYS = ("one graph", "chunks", "chunks, small")
"""``small`` is the memory plan: the decoder's blocks checkpointed, what is carried kept at every n-th boundary."""


def model_of(device: str, width: int) -> WanModel:
    """Wan's VAE with its own depth and a base width of 96 cut to ``width``, random weights; no denoiser to speak of."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    torch.manual_seed(0)
    nobody = WanTransformer3DModel(num_attention_heads=1, attention_head_dim=12, num_layers=1, ffn_dim=8, text_dim=8)
    spec = ModelSpec("wan", "VAE", 16, 4, 8, 16, False, ("all-linear",), 0, 0, 1, 1, 1.0, 16)
    return WanModel(spec, nobody, AutoencoderKLWan(base_dim=width).to(device))


def gradient(model: WanModel, latents: Tensor, way: str) -> Tensor:
    """Of the sum of squares of all frames, in one of the ``WAYS``."""
    small, keep_on = way.endswith("small"), torch.device("cpu") if latents.device.type != "cpu" else None
    chunks = latents.shape[2]
    decoder = Decoder(model, silent, small, keep_on, sparse(chunks) if small else 1)
    if way == "one graph":
        leaf = latents.detach().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(decoder.with_graph(leaf).square().sum(), leaf)[0]
    clips, given = decoder.forward(latents)
    upstream = [clip.mul_(2) for clip in clips]
    return decoder.backward(latents, given, upstream)


def measure(options: argparse.Namespace) -> Result:
    counts = (2, 3) if options.quick else (2, 5, 11, 21)
    width, size = (8, 4) if options.quick else (options.width, options.size)
    model, rows, said, figures = model_of(options.device, width), [], [], []
    allocated: dict[tuple[str, int], int] = {}
    for count in counts:
        latents = model.initial_latents((16, count, size, size), [0]).to(options.device)

        def run(way: str, latents: Tensor = latents) -> Callable[[], Tensor]:
            return lambda: gradient(model, latents, way)

        times = in_turns({way: run(way) for way in WAYS}, 1 if options.quick else options.rounds, options.device)
        for way in WAYS:
            size_of, whole = peak_bytes(run(way), options.device), allocated.get((WAYS[0], count))
            allocated[way, count] = size_of
            rows.append([count, 4 * count - 3, way, mib(size_of), f"{size_of / (whole or size_of):.2f}",
                         spread(times[way]), ratio(times[way], times[WAYS[0]])])  # fmt: skip
            figures.append({"latents": count, "way": way, "allocated": size_of, "seconds": times[way]})
    few, many = counts[0], counts[-1]
    for way in WAYS:
        said.append(f"{many} latents to {few}, {way}: memory {allocated[way, many] / allocated[way, few]:.1f}.")
    model.vae.double()
    latents = model.initial_latents((16, 3, 2, 2), [1]).double().to(options.device)
    exact = gradient(model, latents, WAYS[0])
    errors = {way: float((gradient(model, latents, way) - exact).norm() / exact.norm()) for way in WAYS[1:]}
    said.append("Error of the gradient in float64: " + ", ".join(f"{way} {e:.0e}" for way, e in errors.items()) + ".")
    columns = ("latents", "frames", "way", "allocated MiB", "of one graph", "seconds", "of one graph")
    about = f"Wan's VAE, base width {width}, {8 * size}x{8 * size} pixels, float32, {options.device}"
    return Result(about, [Table(columns, rows)], said, {"cells": figures, "errors": errors})


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--width", type=int, default=16, help="base width of the VAE; the published one's is 96")
    parser.add_argument("--size", type=int, default=8, help="latent height and width")
    parser.add_argument("--rounds", type=int, default=3)


if __name__ == "__main__":
    sys.exit(command("decoding", __doc__, measure, options))
