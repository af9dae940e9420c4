"""Replay against one autograd graph: memory and time of a reward step, side by side.

    python -m reward_lora.benchmarks.replay [--quick] [--json FILE] [--device cuda]

The single graph is what the public trainers build; it is measured with and without block checkpointing. With every
step trained, it is also measured what the gradient through the prompt's branch of guidance alone costs in each way: the
other branch is then a constant, which the replay need not compute again. Peaks are taken in a process each, times in
turns in one.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from ..lora.adapter import inject_new, total_norm
from ..selfcheck.exactness import ToyReward, one_graph
from ..training.gradient import Walk, replay, rollout
from ..training.judge import Objective, judge
from ..training.memory import checkpointed_blocks
from ..training.schedule import BackpropSchedule
from ..video_models.protocol import ModelSpec
from ..video_models.wan import WanModel
from .allocated import peak_bytes
from .common import Peak, Result, Table, command, fresh, in_turns, mib, ratio, spread

STEPS = 10
GUIDANCE = 6.0
WAYS = ("replay", "graph", "graph, checkpointed")
ALL = 8
"""Solver steps, every one trained, of the comparison of gradients through both branches and through one."""
BRANCHES = ("both", "prompt")


def model_of_20m(device: str, size: int) -> tuple[WanModel, tuple[int, ...]]:
    """A random Wan of about 20 M parameters and a small VAE in float32, and the shape of its latents."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    torch.manual_seed(0)
    transformer = WanTransformer3DModel(num_attention_heads=4, attention_head_dim=96, in_channels=16, out_channels=16,
                                        text_dim=64, freq_dim=256, ffn_dim=1536, num_layers=6)  # fmt: skip
    vae = AutoencoderKLWan(base_dim=16, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True])
    spec = ModelSpec(
        "wan", "20 M", 16, 2, 2, 4, False, ("to_q", "to_k", "to_v", "to_out.0"), 0, 0, 1, STEPS, GUIDANCE, 8
    )
    model = WanModel(spec, transformer.to(device), vae.to(device))
    return model, (16, 3, size, size)


class PromptAlone(Walk):
    """A walk whose negative branch passes no gradient, for the single graph."""

    def predict(self, x: Tensor, sigma: Tensor) -> Tensor:
        (weight, unwanted), (scale, wanted) = self.branches(sigma)
        with torch.no_grad():
            constant = weight * self.model.predict(x, sigma, unwanted)
        return constant + scale * self.model.predict(x, sigma, wanted)


class Stage:
    """A model with a LoRA that has weights in it, and everything a step needs."""

    def __init__(self, device: str, size: int) -> None:
        self.model, shape = model_of_20m(device, size)
        adapter = inject_new(self.model.transformer, self.model.spec.lora_targets, rank=8, alpha=8.0, seed=0)
        with torch.no_grad():
            for key, parameter in adapter.parameters().items():
                if key.endswith(".up"):
                    parameter.normal_(std=0.02)
        text = torch.randn(1, 32, 64, generator=torch.Generator().manual_seed(1))
        self._walk = Walk(self.model, self.model.conditioning(list(text), list(text * 0), shape), GUIDANCE)
        self._noise = self.model.initial_latents(shape, [1])
        self._parameters = list(adapter.parameters().values())

    def step(self, way: str, trained: int, steps: int = STEPS, branch: str = "both") -> None:
        """One step in one of the ``WAYS``, the last ``trained`` solver steps trained, through one of ``BRANCHES``."""
        plan = BackpropSchedule("tail", trained).draw(self.model.sigmas(steps), 0)
        reward, objective = ToyReward(), Objective()
        for parameter in self._parameters:
            parameter.grad = None
        if way == "replay":
            final, kept = rollout(self._walk, self._noise, plan)
            verdict = judge(self._walk, final, reward, [""], objective)
            replay(self._walk, kept, plan, verdict.gradient, branch=branch)
        else:
            kind = Walk if branch == "both" else PromptAlone
            walk = kind(self.model, self._walk.conditioning, GUIDANCE)
            with checkpointed_blocks(self.model, "checkpointed" in way):
                one_graph(walk, self._noise, plan, reward, objective, 1.0, judged_latents=1)

    def gradient(self) -> Tensor:
        """Of all parameters, one after the other."""
        return torch.cat([p.grad.flatten() for p in self._parameters])

    def norm(self) -> float:
        """Of the gradient."""
        return total_norm([p.grad for p in self._parameters])


def peaks(device: str, size: int, *what: str | int) -> dict[str, float]:
    """Bytes of a step above those before it, as allocated and as resident, and its gradient's norm."""
    stage = Stage(device, size)
    with Peak(device) as resident:
        stage.step(*what)
    allocated = peak_bytes(lambda: stage.step(*what), device)
    return {"allocated": allocated, "resident": resident.bytes, "norm": stage.norm()}


def measure(options: argparse.Namespace) -> Result:
    size = options.size or (8 if options.quick else 12)
    counts = (1, 2) if options.quick else (1, 2, 4, 8, STEPS)
    cells = [(way, trained) for way in WAYS for trained in counts]
    found = {cell: fresh(peaks, options.device, size, *cell) for cell in cells}
    stage = Stage(options.device, size)

    def step(*what: str | int) -> Callable[[], None]:
        return lambda: stage.step(*what)

    times = in_turns({cell: step(*cell) for cell in cells}, 1 if options.quick else options.rounds, options.device)
    rows = [
        [way, k, mib(found[way, k]["allocated"]), mib(found[way, k]["resident"]), spread(times[way, k]),
         f"{found[way, k]['norm']:.5e}"]
        for way, k in cells
    ]  # fmt: skip
    ours = [found["replay", k]["allocated"] for k in counts]
    said = [
        f"Memory of replay over K = {', '.join(map(str, counts))}: largest to smallest {max(ours) / min(ours):.3f}."
    ]
    most = counts[-2]
    for way in WAYS[1:]:
        other, mine = found[way, most], found["replay", most]
        said.append(
            f"Replay to {way}, K = {most}: memory {mine['allocated'] / other['allocated']:.2f} (resident "
            f"{mine['resident'] / other['resident']:.2f}), time {ratio(times['replay', most], times[way, most])}, "
            f"gradient norm off by {abs(mine['norm'] / other['norm'] - 1):.0e}."
        )
    figures = [
        {"way": way, "k": k, **found[way, k], "seconds": times[way, k], "median": statistics.median(times[way, k])}
        for way, k in cells
    ]
    branches, said_of_them, figures_of_them = through_branches(stage, options, size)
    latents = f"latents 3x{size}x{size}"
    about = f"Wan, 20 M parameters, {latents}, {STEPS} solver steps, guidance {GUIDANCE:g}, float32, {options.device}"
    columns = ("way", "K", "allocated MiB", "resident MiB", "seconds", "gradient norm")
    figures = {"cells": figures, "branches": figures_of_them}
    return Result(about, [Table(columns, rows), branches], [*said, *said_of_them], figures)


def through_branches(
    stage: Stage, options: argparse.Namespace, size: int
) -> tuple[Table, list[str], list[dict[str, object]]]:
    """Every step trained, through both branches of guidance and through the prompt's alone: table, words, numbers."""
    steps = 2 if options.quick else ALL
    cells = [(way, steps, steps, branch) for branch in BRANCHES for way in WAYS]
    found = {cell: fresh(peaks, options.device, size, *cell) for cell in cells}
    calls = {cell: (lambda cell=cell: stage.step(*cell)) for cell in cells}
    times = in_turns(calls, 1 if options.quick else options.rounds, options.device)
    passes = {
        cell: steps * (2 if way == "replay" else 0 if branch == "both" else 1)  # without gradient
        + steps * (2 if branch == "both" else 1) * (4 if "checkpointed" in way else 3)
        for cell in cells for way, *_, branch in [cell]
    }  # fmt: skip
    rows = [
        [branch, way, passes[cell], mib(found[cell]["allocated"]), mib(found[cell]["resident"]), spread(times[cell]),
         f"{found[cell]['norm']:.5e}"]
        for cell in cells for way, *_, branch in [cell]
    ]  # fmt: skip
    gradients = []
    for branch in BRANCHES:
        stage.step(WAYS[0], steps, steps, branch)
        gradients.append(stage.gradient())
    cosine = float(torch.cosine_similarity(*gradients, dim=0))
    mine = (WAYS[0], steps, steps, "prompt")
    off = abs(found[mine]["norm"] / found[WAYS[1], steps, steps, "prompt"]["norm"] - 1)
    said = [
        f"Through the prompt's branch alone it is another gradient than through both: cosine {cosine:.2f}. Replay and "
        f"graph agree on it: gradient norm off by {off:.0e}."
    ]
    for branch, words in (("both", "both"), ("prompt", "the prompt's alone")):
        other = (WAYS[2], steps, steps, branch)
        said.append(
            f"Replay through the prompt's branch alone to graph, checkpointed, through {words}, K = {steps} of {steps} "
            f"steps: memory {found[mine]['allocated'] / found[other]['allocated']:.2f} (resident "
            f"{found[mine]['resident'] / found[other]['resident']:.2f}), time {ratio(times[mine], times[other])}, "
            f"passes {passes[mine] / passes[other]:.2f}."
        )
    figures = [{"way": way, "branch": branch, "k": k, "passes": passes[way, k, n, branch], **found[way, k, n, branch],
                "seconds": times[way, k, n, branch]} for way, k, n, branch in cells]  # fmt: skip
    title = f"Every one of {steps} steps trained; passes: of one branch forward, a backward counted as two"
    columns = ("gradient through", "way", "passes", "allocated MiB", "resident MiB", "seconds", "gradient norm")
    return Table(columns, rows, title), said, figures


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=int, default=0, help="latent height and width")
    parser.add_argument("--rounds", type=int, default=3)


if __name__ == "__main__":
    sys.exit(command("replay", __doc__, measure, options))
