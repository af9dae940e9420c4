"""What guards are for: a long run on the built-in model with and without them, and what the truth says of both.

    python -m reward_lora.benchmarks.guards --output benchmarks/guards [--seeds 1 2 3] [--steps 300]

The recipe of the built-in model is trained for longer than is good, at a constant learning rate. The oracle of the
world reads off the evaluation clips what they really show. The run with the preset ``standard`` ends itself; it is
then continued without guards, which gives the run that never had any, for ``standard`` changes no step. Last, the
presets' cost is measured, in seconds of the processor so that other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..assets import PROMPTS_TEST, PROMPTS_TRAIN, oracle
from ..cli.shared import read_recipe
from ..files import write_text
from ..reward_models import load_reward
from ..training.config import TrainConfig
from ..training.media import figure_pixels, write_png
from ..training.prompts import read_prompts
from ..training.trainer import Trainer
from ..video_models import load_video_model

CLIPS = 64
COST_STEPS = 20


def trainer(folder: Path, model: Any, **settings: Any) -> Trainer:
    """The built-in recipe with other settings."""
    config = TrainConfig.from_dict(read_recipe("builtin")["config"] | settings)
    prompts, unseen = read_prompts(PROMPTS_TRAIN), read_prompts(PROMPTS_TEST)
    return Trainer(model, load_reward("tiny_clip"), prompts, config, folder, sample_prompts=unseen)


def follow(run: Trainer) -> tuple[list[dict[str, Any]], str]:
    """Every evaluation of a run: step, reward, what the guards measured, what is true; and why it stopped."""
    found, stop = [], ""
    with closing(iter(run)) as events:
        for event in events:
            seen, stop = event.evaluation, event.stop
            if seen:
                truth = oracle.mean_scores(oracle.judge(seen.frames, list(seen.prompts)))
                said = {key: seen.findings[key] for key in ("motion", "sharpness", "best")}
                found.append({"step": event.step, "reward": seen.reward, **said, "truth": truth})
                print(f"  step {event.step:3} reward {seen.reward:.3f} motion {said['motion']:.2f} "
                      f"true accuracy {truth['all']:.3f} true motion {truth['motion']:.2f} px", flush=True)  # fmt: skip
    return found, stop


def one_seed(seed: int, steps: int, model: Any, folder: Path) -> dict[str, Any]:
    """A guarded run, then the same run continued without guards."""
    settings = {"seed": seed, "steps": steps, "lr_schedule": "constant", "sample_count": CLIPS}
    print(f"seed {seed}, guards: standard", flush=True)
    guarded, stop = follow(trainer(folder, model, **settings))
    print(f"  {stop or 'went to the end'}\nseed {seed}, continued with guards: off", flush=True)
    rest, _ = follow(trainer(folder, model, **settings, guards="off"))
    base, last = guarded[0], (guarded + rest)[-1]
    kept = next(e for e in reversed(guarded) if e["best"] or e is base)
    return {
        "seed": seed,
        "stop": stop,
        "evaluations": guarded + rest,
        "stopped_at": guarded[-1]["step"],
        "standard": _told(kept, base, guarded),
        "unguarded": _told(last, base, guarded + rest),
    }


def _told(chosen: dict, base: dict, run: list[dict]) -> dict[str, float]:
    best = max(e["truth"]["all"] for e in run)
    moving = max(e["truth"]["all"] for e in run if e["truth"]["motion"] >= 0.9 * base["truth"]["motion"])
    return {
        "step": chosen["step"],
        "reward_gain": chosen["reward"] - base["reward"],
        "accuracy": chosen["truth"]["all"],
        "accuracy_of_base": base["truth"]["all"],
        "best_accuracy_of_the_run": best,
        "best_accuracy_while_moving": moving,
        "motion": chosen["truth"]["motion"] / base["truth"]["motion"],
    }


def cost(preset: str, model: Any) -> dict[str, float]:
    """Processor seconds a step, evaluations included, of the built-in recipe under a preset."""
    with tempfile.TemporaryDirectory() as folder:
        run = trainer(Path(folder) / "run", model, steps=COST_STEPS, guards=preset)
        inside, parts = 0.0, (run.files.draw, run.files.write_samples)

        def timed(call):
            def measured(*arguments):
                nonlocal inside
                began = time.process_time()
                call(*arguments)
                inside += time.process_time() - began

            return measured

        run.files.draw, run.files.write_samples = map(timed, parts)
        with closing(iter(run)) as events:
            next(events)  # the evaluation before the first step
            inside, began = 0.0, time.process_time()
            for _ in events:
                pass
            total = time.process_time() - began
    return {"seconds_a_step": total / COST_STEPS, "of_which_files_and_report": inside / COST_STEPS}


def draw(seeds: list[dict[str, Any]]) -> np.ndarray:
    """Reward, true accuracy and true motion over the steps; dots are what ``standard`` keeps, bars where it stops."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), dpi=120)
    panels = figure.subplots(1, 3)
    measures = {
        "trained reward (tiny CLIP)": lambda e, base: e["reward"],
        "true: all four attributes right": lambda e, base: e["truth"]["all"],
        "true motion / base": lambda e, base: e["truth"]["motion"] / base["truth"]["motion"],
    }
    for axes, (title, measure) in zip(panels, measures.items(), strict=True):
        for index, run in enumerate(seeds):
            base, kept = run["evaluations"][0], run["standard"]["step"]
            values = {e["step"]: measure(e, base) for e in run["evaluations"]}
            axes.plot(values.keys(), values.values(), color=f"C{index}", label=f"seed {run['seed']}")
            axes.plot([kept], [values[kept]], "o", color=f"C{index}", markersize=9)
            if run["stop"]:
                axes.plot([run["stopped_at"]], [values[run["stopped_at"]]], "|", color=f"C{index}", markersize=18)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
    panels[2].axhline(0.9, color="black", linewidth=0.8, linestyle="--")
    panels[0].legend(fontsize=8)
    figure.suptitle("built-in model, constant learning rate; dots: the step that standard keeps, bars: where it stops",
                    fontsize=9)  # fmt: skip
    figure.tight_layout()
    return figure_pixels(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="OUTPUT.json and OUTPUT.png are written")
    parser.add_argument("--runs", type=Path, help="where the runs go and are kept; else they are thrown away")
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    model = load_video_model("builtin")
    about = {"torch": torch.__version__, "threads": torch.get_num_threads(), "processors": os.cpu_count()}
    result: dict[str, Any] = {"steps": options.steps, "clips": CLIPS, **about, "seeds": []}
    with tempfile.TemporaryDirectory() as temporary:
        for seed in options.seeds:
            folder = (options.runs or Path(temporary)) / f"seed-{seed}"
            result["seeds"].append(one_seed(seed, options.steps, model, folder))
            write_text(options.output.with_suffix(".json"), json.dumps(result, indent=1) + "\n")
            write_png(options.output.with_suffix(".png"), draw(result["seeds"]))
    cost("off", model)  # what is loaded only once is not a preset's cost
    times = {preset: [cost(preset, model) for _ in range(2)] for preset in ("off", "standard", "careful")}
    result["cost"] = {preset: min(both, key=lambda c: c["seconds_a_step"]) for preset, both in times.items()}
    write_text(options.output.with_suffix(".json"), json.dumps(result, indent=1) + "\n")
    for run in result["seeds"]:
        print(json.dumps({key: run[key] for key in ("seed", "standard", "unguarded")}))
    print(json.dumps(result["cost"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
