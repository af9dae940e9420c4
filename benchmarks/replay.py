"""Replay against one autograd graph: memory and time of a reward step, side by side in one run.

    python -m reward_lora.benchmarks.replay [--device cuda]

Each cell runs in a process of its own, so that its peak is its own. The single graph is what the public
trainers build; it is measured with and without block checkpointing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time

import torch

from ..lora.adapter import inject_new, total_norm
from ..selfcheck.exactness import ToyReward, one_graph
from ..training.gradient import Walk, replay, rollout
from ..training.judge import Objective, judge
from ..training.schedule import BackpropSchedule
from ..video_models.protocol import ModelSpec
from ..video_models.wan import WanModel

STEPS = 10
GUIDANCE = 6.0


def model_of_20m(device: str, size: int) -> tuple[WanModel, tuple[int, ...]]:
    """A random Wan of about 20 M parameters and a small VAE, float32 on a CPU, bfloat16 on a GPU."""
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


class Peak:
    """Highest memory above the start: allocated bytes on a GPU, resident bytes (sampled) on a CPU."""

    def __init__(self, device: str) -> None:
        self._cuda = device.startswith("cuda")

    def _resident(self) -> int:
        import psutil

        return psutil.Process().memory_info().rss

    def __enter__(self) -> Peak:
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated()
        else:
            self._start = self._highest = self._resident()
            self._stop = threading.Event()
            self._thread = threading.Thread(target=self._watch)
            self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self._highest = max(self._highest, self._resident())

    def __exit__(self, *exc) -> None:
        if self._cuda:
            self.bytes = torch.cuda.max_memory_allocated() - self._start
        else:
            self._stop.set()
            self._thread.join()
            self.bytes = self._highest - self._start


def measure(way: str, trained: int, device: str, size: int, repeats: int) -> dict:
    """One cell: ``replay``, ``graph`` or ``graph+checkpointing`` at K trained steps."""
    model, shape = model_of_20m(device, size)
    if way == "graph+checkpointing":
        model.transformer.enable_gradient_checkpointing()
    adapter = inject_new(model.transformer, model.spec.lora_targets, rank=8, alpha=8.0, seed=0)
    with torch.no_grad():
        for key, parameter in adapter.parameters().items():
            if key.endswith(".up"):
                parameter.normal_(std=0.02)
    text = torch.randn(1, 32, 64, generator=torch.Generator().manual_seed(1))
    walk = Walk(model, model.conditioning(list(text), list(text * 0), shape), GUIDANCE)
    noise, reward, objective = model.initial_latents(shape, [1]), ToyReward(), Objective()
    plan = BackpropSchedule("tail", trained).draw(model.sigmas(STEPS), 0)
    parameters = adapter.parameters().values()

    def step() -> None:
        for parameter in parameters:
            parameter.grad = None
        if way == "replay":
            final, kept = rollout(walk, noise, plan)
            verdict = judge(walk, final, reward, [""], objective)
            replay(walk, kept, plan, verdict.gradient)
        else:
            one_graph(walk, noise, plan, reward, objective, 1.0, judged_latents=1)
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    times = []
    with Peak(device) as peak:
        step()
    for _ in range(repeats):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    norm = total_norm([p.grad for p in parameters])
    return {"mib": peak.bytes / 2**20, "seconds": statistics.median(times), "norm": norm}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=int, default=24, help="latent height and width")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        way, trained = options.cell.split(":")
        print(json.dumps(measure(way, int(trained), options.device, options.size, options.repeats)))
        return 0
    print(f"Wan, 20 M parameters, {STEPS} solver steps, guidance {GUIDANCE:g}, {options.device}")
    print(f"{'way':22}{'K':>3}{'extra MiB':>11}{'seconds':>9}{'gradient norm':>16}")
    cells = {}
    for way in ("replay", "graph", "graph+checkpointing"):
        for trained in (2, 8):
            command = [sys.executable, "-m", __spec__.name, "--cell", f"{way}:{trained}", "--device", options.device,
                       "--size", str(options.size), "--repeats", str(options.repeats)]  # fmt: skip
            answer = subprocess.run(command, capture_output=True, text=True, check=False)
            if answer.returncode:
                print(answer.stderr, file=sys.stderr)
                return 1
            cell = cells[way, trained] = json.loads(answer.stdout.splitlines()[-1])
            print(f"{way:22}{trained:3}{cell['mib']:11.0f}{cell['seconds']:9.2f}{cell['norm']:16.6e}", flush=True)
    ours = cells["replay", 8]
    print(f"\nreplay, K = 8 against K = 2: memory {ours['mib'] / cells['replay', 2]['mib']:.2f}")
    for way in ("graph", "graph+checkpointing"):
        other = cells[way, 8]
        print(f"replay against {way}, K = 8: memory {ours['mib'] / other['mib']:.2f}, "
              f"time {ours['seconds'] / other['seconds']:.2f}, "
              f"gradient norm off by {abs(ours['norm'] / other['norm'] - 1):.1e}")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
