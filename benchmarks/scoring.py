"""Frames of a clip scored in chunks against a loop over the frames with the text towers inside, as public code runs it.

    python -m reward_lora.benchmarks.scoring [--quick] [--json FILE] [--size vit-h] [--frames 81] [--device cuda]

Each cell runs in a process of its own, so that its peak is its own, and the cells take turns. Networks are random, of
the published size or tiny.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch

from ..reward_models.hps import ARCHITECTURE, HpsJudge, build_hps
from ..reward_models.mps import MpsJudge, MpsNetwork
from ..reward_models.networks import without_start
from ..reward_models.scoring import FrameReward
from .common import Peak, Result, Table, command, fresh, mib, ratio, spread

REWARDS = ("hps", "mps")
WAYS = ("loop", "chunks", "chunks, gradient")
PROMPT = "a red circle moves left"
TINY = {"hidden_size": 96, "intermediate_size": 384, "num_attention_heads": 4, "num_hidden_layers": 4}
VIT_H_TEXT = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24}
VIT_H_VISION = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 16, "num_hidden_layers": 32}


def judge_of(reward: str, size: str, passes: list[str]) -> torch.nn.Module:
    """A random judge that notes every text its text tower sees."""
    from open_clip import CLIP, get_model_config
    from transformers import CLIPConfig, CLIPModel

    def tokenize(text: str) -> torch.Tensor:
        passes.append(text)
        return torch.randint(1, 49407, (1, 77), generator=torch.Generator().manual_seed(len(text)))

    if reward == "hps":
        config = get_model_config(ARCHITECTURE)
        if size == "tiny":
            config["vision_cfg"] |= {"width": 96, "layers": 4, "head_width": 24}
            config["text_cfg"] |= {"width": 96, "layers": 4, "heads": 4}
        with without_start():
            start = CLIP(**config)
        return HpsJudge(build_hps(fill(start).state_dict(), config, "benchmark", torch.float32), tokenize)
    text, vision = (TINY, TINY) if size == "tiny" else (VIT_H_TEXT, VIT_H_VISION)
    width = 96 if size == "tiny" else 1024
    settings = CLIPConfig(
        text_config={**text, "hidden_act": "gelu"},
        vision_config={**vision, "hidden_act": "gelu", "patch_size": 14},
        projection_dim=width,
    )
    with without_start():
        clip, cross = CLIPModel(settings), MpsNetwork((width, max(1, width // 64), 64, 4 * width), 4)
    return MpsJudge(fill(clip), fill(cross), tokenize)


def fill(network: torch.nn.Module) -> torch.nn.Module:
    """Small random weights: what is computed costs the same."""
    for parameter in network.parameters():
        parameter.data.uniform_(-0.02, 0.02)
    return network


def cell(reward: str, way: str, size: str, frames: int, device: str) -> dict[str, float]:
    """One cell."""
    torch.manual_seed(0)
    passes: list[str] = []
    dtype = torch.float16 if device.startswith("cuda") else torch.float32
    judge = judge_of(reward, size, passes).to(device, dtype).eval().requires_grad_(False)
    pixels = (120, 208) if size == "tiny" else (480, 832)
    clip = torch.rand(1, 3, frames, *pixels)

    def wait() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    run = _loop if way == "loop" else _chunks
    with torch.no_grad():
        warm = forgetful(judge)
        warm(clip[:, :, 0].to(device), [warm.encode_text("warm")])
    passes.clear()
    clip.requires_grad_("gradient" in way)
    with Peak(device) as peak:
        wait()
        started, worked = time.perf_counter(), time.process_time()
        score = run(judge, clip, device)
        if score.requires_grad:
            score.sum().backward()
        wait()
        seconds, work = time.perf_counter() - started, time.process_time() - worked
    return {
        "seconds": seconds,
        "work": work,
        "bytes": peak.bytes,
        "texts": len(passes),
        "score": float(score.detach()),
    }


def forgetful(judge: torch.nn.Module) -> torch.nn.Module:
    """The same networks, no text remembered."""
    return MpsJudge(judge.clip, judge.cross, judge.tokenize) if isinstance(judge, MpsJudge) else judge


class _AllTokens(MpsNetwork):
    """Every token of the last layer, as public code computes it."""

    def forward(self, x: torch.Tensor, context: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        for read, mix in self.layers:
            x = x + read(x, context, keep)
            x = x + mix(x)
        return x[:, 0]


@torch.no_grad()
def _loop(judge: torch.nn.Module, clip: torch.Tensor, device: str) -> torch.Tensor:
    """As public code: every frame alone, its texts with it, every token of every layer."""
    if isinstance(judge, MpsJudge):
        judge.cross.__class__ = _AllTokens
    else:
        blocks = judge.clip.visual.transformer.resblocks
        blocks[-1] = getattr(blocks[-1], "block", blocks[-1])
    scores = []
    for t in range(clip.shape[2]):
        frame_judge = forgetful(judge)
        scores.append(frame_judge(clip[:, :, t].to(device), [frame_judge.encode_text(PROMPT)]))
    return torch.stack(scores).mean(0).float()


def _chunks(judge: torch.nn.Module, clip: torch.Tensor, device: str) -> torch.Tensor:
    return FrameReward(judge, "benchmark").score(clip, [PROMPT])


def measure(options: argparse.Namespace) -> Result:
    frames, rounds = (4, 1) if options.quick else (options.frames, options.rounds)
    cells = [(reward, way) for reward in REWARDS for way in options.ways]
    found = {key: [] for key in cells}
    for _ in range(rounds):
        for key in cells:
            found[key].append(fresh(cell, *key, options.size, frames, options.device))
    rows, said = [], []
    for (reward, way), runs in found.items():
        seconds, work = ([run[name] for run in runs] for name in ("seconds", "work"))
        size = mib(min(run["bytes"] for run in runs))
        rows.append([reward, way, spread(seconds), spread(work), size, runs[0]["texts"], f"{runs[0]['score']:.5f}"])
    for reward in REWARDS if {"loop", "chunks"} <= set(options.ways) else ():
        ours, theirs = ({n: [run[n] for run in found[reward, way]] for n in ("seconds", "work")} for way in WAYS[1::-1])
        said.append(
            f"{reward}, chunks to the loop: time {ratio(ours['seconds'], theirs['seconds'])}, "
            f"processor time {ratio(ours['work'], theirs['work'])}."
        )
    columns = ("reward", "way", "seconds", "processor seconds", "extra MiB", "text passes", "score")
    figures = {"cells": [{"reward": r, "way": w, "runs": runs} for (r, w), runs in found.items()]}
    return Result(f"{frames} frames, {options.size}, {options.device}", [Table(columns, rows)], said, figures)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=("tiny", "vit-h"), default="tiny")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--rounds", type=int, default=3)


if __name__ == "__main__":
    sys.exit(command("scoring", __doc__, measure, options))
