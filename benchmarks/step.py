"""A training step against its floor: the forwards and backwards that the mathematics needs, called bare.

    python -m reward_lora.benchmarks.step [--quick] [--json FILE]

The floor is, on the same shapes: every solver step forward (both guidance branches); every trained step's branches
forward and backward, the LoRA put in by peft alone; the VAE and the judge forward and backward. Its rollout is counted
twice: with the LoRA in the network, and without it, as if it were merged. Steps come from the trainer, log and
optimizer included, and take turns with the floor.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..reward_models.scoring import FrameReward
from ..training.config import TrainConfig
from ..training.schedule import BackpropSchedule
from ..training.trainer import Trainer
from ..video_models.protocol import ModelSpec
from ..video_models.wan import WanModel
from .common import Result, Table, command, ratio, spread
from .scoring import judge_of

GUIDANCE, FRAMES, RANK, TEXT_WIDTH = 6.0, 9, 32, 64
PHASES = {"rollout": "rollout", "decode": "judge", "reward": "judge", "replay": "replay", "optimizer": "optimizer"}
KINDS = {
    "matrix products": ("addmm", "::mm", "bmm", "baddbmm"),
    "attention": ("scaled_dot_product",),
    "convolutions": ("conv",),
}


class Stage:
    """A mid-size random Wan in training, and its bare networks beside it."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        from diffusers import AutoencoderKLWan, WanTransformer3DModel
        from peft import LoraConfig, inject_adapter_in_model

        small = options.quick
        width, layers, pixels, base = (64, 2, 32, 8) if small else (512, 8, 160, 32)
        self.solver_steps, self.trained = (3, 1) if small else (8, 2)
        torch.manual_seed(0)
        network = WanTransformer3DModel(
            num_attention_heads=4, attention_head_dim=width // 4, in_channels=16, out_channels=16, ffn_dim=4 * width,
            text_dim=TEXT_WIDTH, freq_dim=256, num_layers=layers,
        )  # fmt: skip
        self.vae = AutoencoderKLWan(base_dim=base, dim_mult=[1, 2, 4, 4], num_res_blocks=1,
                                    temperal_downsample=[False, True, True])  # fmt: skip
        self.bare, self.tuned = (copy.deepcopy(network).eval().requires_grad_(False) for _ in range(2))
        linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
        inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=linear), self.tuned)
        spec = ModelSpec("wan", f"Wan {width}x{layers}", 16, 4, 8, 16, False, ("all-linear",), pixels, pixels, FRAMES,
                         self.solver_steps, GUIDANCE, 8)  # fmt: skip
        model = WanModel(spec, network, self.vae)
        model.encode_text = lambda prompts: [torch.randn(32, TEXT_WIDTH) for _ in prompts]
        self.reward = FrameReward(judge_of("hps", "tiny", []).eval().requires_grad_(False), "hps")
        config = TrainConfig(
            steps=10_000, rank=RANK, network_alpha=RANK, sample_every=0, save_every=10_000, guards="off",
            memory=options.memory, judged_latents=options.judged_latents,
            backprop=BackpropSchedule("tail", self.trained),
        )  # fmt: skip
        self._marks: list[tuple[float, str]] = []
        self.trainer = Trainer(model, self.reward, ["a", "b"], config, folder / "run",
                               tick=lambda phase: self._mark(phase))  # fmt: skip
        self.judged = options.judged_latents or spec.latent_frames(FRAMES)
        self.latents = torch.randn(1, *spec.latent_shape(pixels, pixels, FRAMES))
        self.text = torch.randn(1, 512, TEXT_WIDTH)
        parameters = sum(p.numel() for p in self.bare.parameters())
        self.about = (
            f"Wan, {parameters / 1e6:.0f} M parameters, {width} wide, {FRAMES} frames of {pixels}x{pixels}, "
            f"{self.solver_steps} solver steps, guidance {GUIDANCE:g}, K = {self.trained}, LoRA of rank {RANK} in "
            f"every linear layer, memory {options.memory}, {self.judged} latent frame(s) judged, float32, cpu"
        )

    def _mark(self, phase: str) -> None:
        self._marks.append((time.perf_counter(), PHASES.get(phase, phase)))

    def step(self, events: Iterator) -> dict[str, float]:
        """Seconds by phase of the next step."""
        self._marks = [(time.perf_counter(), "between")]
        hook = register_optimizer_step_pre_hook(lambda *_: self._mark("optimizer"))
        next(events)
        hook.remove()
        self._mark("end")
        found: dict[str, float] = defaultdict(float)
        for (began, phase), (ended, _) in zip(self._marks, self._marks[1:], strict=False):
            found[phase] += ended - began
        return dict(found)

    def floor(self) -> dict[str, float]:
        """Seconds of the necessary calls, by phase; the rollout once with and once without the LoRA."""
        found = {
            "rollout": timed(lambda: self._rollout(self.tuned)),
            "bare rollout": timed(lambda: self._rollout(self.bare)),
        }
        return found | {"judge": timed(self._judge), "replay": timed(self._replay)}

    def _forward(self, network: nn.Module, latents: Tensor) -> Tensor:
        batch = latents.shape[0]
        return network(hidden_states=latents, timestep=torch.full((batch,), 500.0), return_dict=False,
                       encoder_hidden_states=self.text.expand(batch, -1, -1))[0]  # fmt: skip

    @torch.no_grad()
    def _rollout(self, network: nn.Module) -> None:
        for _ in range(self.solver_steps):
            self._forward(network, self.latents.repeat(2, 1, 1, 1, 1))

    def _judge(self) -> None:
        latents = self.latents[:, :, : self.judged].clone().requires_grad_()
        frames = (self.vae.decode(latents, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)
        self.reward.score(frames, ["a"]).sum().backward()

    def _replay(self) -> None:
        for index in range(self.trained):
            for _ in range(2):
                prediction = self._forward(self.tuned, self.latents.clone().requires_grad_(index > 0))
                prediction.backward(torch.ones_like(prediction))
        self.tuned.zero_grad(set_to_none=True)


def timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def flame(stage: Stage, events: Iterator) -> tuple[Table, dict[str, dict[str, float]]]:
    """Where one profiled step spends itself: the phases, and within each the kinds of operations."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ranges: list[tuple[str, torch.profiler.record_function]] = []

        def mark(phase: str) -> None:
            if ranges:
                ranges.pop()[1].__exit__(None, None, None)
            opened = torch.profiler.record_function(f"phase {PHASES.get(phase, phase)}")
            opened.__enter__()
            ranges.append((phase, opened))

        before, stage._mark = stage._mark, mark
        try:
            stage.step(events)
        finally:
            stage._mark = before
            ranges.pop()[1].__exit__(None, None, None)
    found: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    spans = [
        (e.time_range.start, e.time_range.end, e.name[6:]) for e in profile.events() if e.name.startswith("phase ")
    ]
    for began, ended, phase in spans:
        found[phase]["whole"] += (ended - began) / 1e6
    spans.sort()
    index = 0
    for event in sorted(profile.events(), key=lambda e: e.time_range.start):
        while index + 1 < len(spans) and event.time_range.start >= spans[index + 1][0]:
            index += 1
        if not event.name.startswith("phase "):
            kind = next((k for k, parts in KINDS.items() if any(p in event.name for p in parts)), "element by element")
            found[spans[index][2]][kind] += event.self_cpu_time_total / 1e6
    found = {p: dict(kinds) for p, kinds in found.items() if p in PHASES.values()}
    total = sum(kinds["whole"] for kinds in found.values())
    rows = []
    for phase, kinds in found.items():
        rows.append([phase, f"{kinds['whole'] / total:.0%}", "█" * round(40 * kinds["whole"] / total)])
        kinds["Python, dispatch"] = max(0.0, 2 * kinds["whole"] - sum(kinds.values()))
        for kind, seconds in sorted(kinds.items(), key=lambda item: -item[1]):
            if kind != "whole" and seconds / total >= 0.005:
                rows.append([f"· {kind}", f"{seconds / total:.0%}", "▒" * round(40 * seconds / total)])
    return Table(("one step, profiled", "share", ""), rows), found


def measure(options: argparse.Namespace) -> Result:
    rounds = 1 if options.quick else options.rounds
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage(options, Path(folder))
        with closing(iter(stage.trainer)) as events:
            next(events)
            stage.step(events), stage.floor()  # what is made only once
            steps, floors = [], []
            for _ in range(rounds):
                steps.append(stage.step(events))
                floors.append(stage.floor())
            where, kinds = flame(stage, events)
    ours = {phase: [step.get(phase, 0.0) for step in steps] for phase in ("rollout", "judge", "replay")}
    least = {phase: [floor[phase] for floor in floors] for phase in floors[0]}
    ours["rest"] = [sum(step.values()) - sum(step.get(p, 0.0) for p in ours) for step in steps]
    whole, floor, merged = (
        [sum(parts) for parts in zip(*(table[p] for p in names), strict=True)]
        for table, names in (
            (ours, ours),
            (least, ("rollout", "judge", "replay")),
            (least, ("bare rollout", "judge", "replay")),
        )
    )
    compared = {
        "rollout": (ours["rollout"], least["rollout"]),
        "rollout, floor without the LoRA": (ours["rollout"], least["bare rollout"]),
        "judge": (ours["judge"], least["judge"]),
        "replay": (ours["replay"], least["replay"]),
        "step": (whole, floor),
        "step, floor without the LoRA in the rollout": (whole, merged),
    }
    rows = [[name, spread(mine), spread(bare), ratio(mine, bare)] for name, (mine, bare) in compared.items()]
    rows.insert(4, ["optimizer, log, and all else", spread(ours["rest"]), "0", ""])
    said = [f"A step takes {ratio(whole, floor)} of its floor; {ratio(whole, merged)} if the rollout's has no LoRA."]
    table = Table(("phase", "seconds", "floor, seconds", "ratio"), rows)
    return Result(stage.about, [table, where], said, {"steps": steps, "floors": floors, "kinds": kinds})


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--memory", default="fast", help="the memory plan of the step")
    parser.add_argument("--judged-latents", type=int, default=1, help="latent frames judged; 0 is all")


if __name__ == "__main__":
    sys.exit(command("step", __doc__, measure, options))
