"""The quick start: a reward LoRA on the built-in model, judged on prompts it never saw."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .assets import PROMPTS_TEST, PROMPTS_TRAIN, oracle
from .lora.adapter import LoraUse, applied
from .lora.files import read_lora
from .reward_models import load_reward
from .reward_models.protocol import Reward
from .training.config import TrainConfig
from .training.media import contact_sheet, write_png
from .training.prompts import read_prompts
from .training.sample import sample
from .training.seeds import seed_for
from .training.trainer import Trainer
from .video_models import BUILTIN, load_video_model
from .video_models.protocol import VideoModel

ATTRIBUTES = ("colour", "shape", "direction", "background")


@dataclass(frozen=True)
class Report:
    """What unseen prompts got.

    Attributes:
        reward: ``[N]``.
        accuracy: What the oracle says of every attribute, ``[N]`` of 0 and 1, and ``motion`` in pixels.
        frames: ``[N, 3, T, H, W]``.
    """

    reward: Tensor
    accuracy: dict[str, Tensor]
    frames: Tensor


@torch.no_grad()
def examine(model: VideoModel, reward: Reward, prompts: Sequence[str], batch: int = 32) -> Report:
    """Sample every prompt at a seed of its own, score it, and ask the oracle what it shows."""
    spec, clips, scores = model.spec, [], []
    shape = spec.latent_shape(spec.width, spec.height, spec.frames)
    for start in range(0, len(prompts), batch):
        part = list(prompts[start : start + batch])
        negative = model.encode_text([""]) * len(part) if spec.guidance_scale != 1 else None
        conditioning = model.conditioning(model.encode_text(part), negative, shape)
        seeds = [seed_for("unseen", start + i) for i in range(len(part))]
        frames = sample(model, conditioning, seeds, shape, spec.steps, spec.guidance_scale)
        clips.append(frames.cpu())
        scores.append(reward.score(frames, part).cpu())
    frames = torch.cat(clips)
    return Report(torch.cat(scores), oracle.judge(frames, list(prompts)), frames)


def table(reports: dict[str, Report]) -> str:
    """Reward and oracle accuracies of several reports, side by side."""
    lines = [f"{'':16}" + "".join(f"{name:>14}" for name in reports)]
    lines.append(f"{'reward':16}" + "".join(f"{float(r.reward.mean()):14.3f}" for r in reports.values()))
    for key in ATTRIBUTES:
        cells = "".join(f"{100 * float(r.accuracy[key].float().mean()):13.1f}%" for r in reports.values())
        lines.append(f"{key + ' right':16}{cells}")
    lines.append(
        f"{'motion, pixels':16}" + "".join(f"{float(r.accuracy['motion'].mean()):14.1f}" for r in reports.values())
    )
    return "\n".join(lines)


def run(config: TrainConfig, folder: Path, device: str, unseen: int) -> int:
    """Train, then compare base and LoRA on prompts never trained on. Returns the exit status."""
    began = time.monotonic()
    model, reward = load_video_model(BUILTIN, device=device), load_reward("tiny_clip", device=device)
    prompts = read_prompts(PROMPTS_TEST)[:unseen]
    reports = {"base model": examine(model, reward, prompts)}
    print(f"{len(prompts)} unseen prompts, {time.monotonic() - began:.0f} s\n{table(reports)}\n", flush=True)
    # Watched during training: a few of the training prompts; the unseen ones stay unseen.
    trainer = Trainer(model, reward, read_prompts(PROMPTS_TRAIN), config, folder)
    try:
        with closing(iter(trainer)) as events:
            for event in events:
                if event.evaluation:
                    print(
                        f"step {event.step:3d} of {event.steps}: reward {event.evaluation.reward:.3f} on fixed "
                        f"prompts, {time.monotonic() - began:.0f} s",
                        flush=True,
                    )
    except KeyboardInterrupt:
        print("\nstopped; the same command with --resume goes on")
        return 130
    lora = read_lora(trainer.lora_path)
    for strength in (0.5, 1.0):
        with applied(model, [LoraUse(lora, strength)]):
            reports[f"LoRA at {strength:g}"] = examine(model, reward, prompts)
    print(f"\n{len(prompts)} unseen prompts\n{table(reports)}\n")
    before, after = reports["base model"], reports["LoRA at 1"]
    mended = (after.accuracy["colour"].float() - before.accuracy["colour"].float()).argsort(
        descending=True, stable=True
    )
    shown = [*mended[:3].tolist(), *mended[len(mended) // 2 :][:1].tolist()]
    rows = [report.frames[shown] for report in reports.values()]
    sheet = contact_sheet(rows, list(reports), [prompts[i] for i in shown])
    write_png(folder / "before_after.png", sheet)
    print(f"LoRA:         {trainer.lora_path}\nreward curve: {folder.resolve() / 'reward.png'}")
    print(f"before/after: {folder.resolve() / 'before_after.png'}  (three that changed most, one typical)")
    print(f"{time.monotonic() - began:.0f} s in all")
    return 0
