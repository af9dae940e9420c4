"""What guards are for: long runs on the built-in model, what the truth says of them, and what the guards would keep.

    python -m reward_lora.benchmarks.guards --output benchmarks/guards [--runs RUNS] [--only seeds careful heldout cost]

The recipe of the built-in model is trained for longer than is good: half its learning rate, constant, until the
oracle of the world, which reads off the evaluation clips what they really show, has found harm three times in a row.
The preset ``standard`` changes no step (``tests/test_guards.py``), so it is put before the evaluations of that run:
where it stops and what it keeps is what it would have stopped at and kept.

One of these runs is made again from a checkpoint on with ``careful``, which changes steps. ``heldout`` trains towards
motion, which is easily overdone, with the tiny CLIP as a judge that is not trained on; there ``standard`` is in
force, its report is quoted, and the run is then continued without guards. ``cost`` times the presets, step by step in
turn, in seconds of the processor, so that other work on the machine does not count. Every part is kept in the JSON as
it ends, and a run that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..assets import PROMPTS_TEST, PROMPTS_TRAIN, oracle
from ..cli.shared import read_recipe
from ..files import canonical_json, read_safetensors, write_safetensors, write_text
from ..reward_models import load_reward
from ..training.checkpoint import PATTERN
from ..training.config import TrainConfig
from ..training.guards import PRESETS, Guards, Reading
from ..training.media import figure_pixels, write_png
from ..training.prompts import read_prompts
from ..training.run_log import RunLog, advice
from ..training.trainer import Trainer
from ..video_models import load_video_model

CLIPS = 64
EVERY = 20
LONG = {"learning_rate": 4e-3, "lr_schedule": "constant", "sample_count": CLIPS, "sample_every": EVERY,
        "save_every": EVERY, "keep_checkpoints": 1000}  # fmt: skip
HARMED = 3
"""Evaluations with harm in a row, after which a run need not be made worse."""
FLOOR, LOSS = 0.9, 0.1
"""Harm: true motion under this share of the base model's, or true accuracy this much under its best."""
FORKED, FORK, FORK_END = 2, 200, 300
"""Seed of the run that is made again with ``careful``, from which step on, to which."""
OVERDONE = {"reward": "dynamic_degree", "heldout": ["tiny_clip"], "judged_frames": 0, "lr_schedule": "constant",
            "steps": 60, "sample_count": 24, "sample_every": 10, "save_every": 10, "keep_checkpoints": 1000,
            "seed": 1}  # fmt: skip
"""The run with a held-out judge: towards motion, at the recipe's learning rate."""
COST_STEPS = 40
PARTS = ("seeds", "careful", "heldout", "cost")


def trainer(
    folder: Path, model: Any, reward: str = "tiny_clip", heldout: Sequence[str] = (), **settings: Any
) -> Trainer:
    """The built-in recipe with other settings."""
    config = TrainConfig.from_dict(read_recipe("builtin")["config"] | settings)
    prompts, unseen = read_prompts(PROMPTS_TRAIN), read_prompts(PROMPTS_TEST)
    judges = [load_reward(name) for name in heldout]
    return Trainer(model, load_reward(reward), prompts, config, folder, sample_prompts=unseen, heldout=judges)


def evaluations(run: Trainer, until_harm: bool = True) -> list[dict[str, Any]]:
    """Every evaluation of a run, until it has done harm or to its end, also those that an earlier call made."""
    path = run.folder / "evaluations.json"
    found = json.loads(path.read_text()) if path.exists() else []
    if found and (found[-1]["step"] >= run.config.steps or (until_harm and harmed(found))):
        return found
    with closing(iter(run)) as events:
        for event in events:
            if seen := event.evaluation:
                truth = oracle.mean_scores(oracle.judge(seen.frames, list(seen.prompts)))
                reading = asdict(Reading.of(event.step, seen))
                found.append({"step": event.step, "reward": seen.reward, "truth": truth, "reading": reading})
                write_text(path, json.dumps(found))
                print(f"  step {event.step:3} reward {seen.reward:.3f} motion {seen.findings['motion']:.2f} "
                      f"true accuracy {truth['all']:.3f} true motion {truth['motion']:.2f} px", flush=True)  # fmt: skip
                if until_harm and harmed(found):
                    break
    return found


def harmed(found: list[dict[str, Any]]) -> bool:
    """Whether a run has gone on for long enough: its last evaluations show harm, all of them."""
    count, best = 0, 0.0
    for e in found:
        best = max(best, e["truth"]["all"])
        moves = e["truth"]["motion"] / found[0]["truth"]["motion"]
        count = count + 1 if moves < FLOOR or e["truth"]["all"] < best - LOSS else 0
    return count >= HARMED


def guarded(found: list[dict[str, Any]], preset: str, reward: str, clips: int = CLIPS) -> dict[str, Any]:
    """Where a preset's guards stop and what they keep, by the first so many clips of every evaluation."""
    guards = Guards(PRESETS[preset]["patience"], PRESETS[preset]["motion_floor"], reward, [])
    for e in found:
        r = e["reading"]
        cut = {name: values[:clips] for name, values in r["heldout"].items()}
        now = Reading(e["step"], r["reward"][:clips], cut, r["motion"][:clips], r["sharpness"][:clips])
        if guards.observe(now).stop:
            break
    return {"kept": guards.best.step, "stopped_at": guards.last if guards.stopped else None, "stop": guards.stopped}


def told(found: list[dict[str, Any]], steps: Sequence[int]) -> dict[str, float]:
    """The mean over evaluations: gain of the reward, true accuracy, true motion relative to the base model's."""
    base, chosen = found[0], [e for e in found if e["step"] in steps]
    return {
        "reward_gain": float(np.mean([e["reward"] for e in chosen])) - base["reward"],
        "accuracy": float(np.mean([e["truth"]["all"] for e in chosen])),
        "motion": float(np.mean([e["truth"]["motion"] for e in chosen])) / base["truth"]["motion"],
    }


def records(folder: Path) -> list[dict[str, Any]]:
    """A run's log."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def said(folder: Path) -> list[str]:
    """What the report of a run advises."""
    return advice(RunLog.of(records(folder)), folder.name)[1]


def summed_up(found: list[dict[str, Any]], reward: str, clips: int) -> dict[str, Any]:
    """What ``standard`` makes of an unguarded run, and what the run itself came to."""
    standard = guarded(found, "standard", reward, clips)
    until = [e for e in found if standard["stopped_at"] is None or e["step"] <= standard["stopped_at"]]
    best = max(until, key=lambda e: (e["truth"]["all"], e["truth"]["motion"]))["step"]
    last = [e["step"] for e in found[-HARMED:]]
    result = {
        "standard": standard | told(found, [standard["kept"]]),
        "standard_by_16_clips": guarded(found, "standard", reward, 16),
        "best_until_the_stop": {"step": best} | told(found, [best]),
        "unguarded": {"steps": last} | told(found, last),
        "evaluations": [{k: v for k, v in e.items() if k != "reading"} for e in found],
    }
    print(json.dumps({k: v for k, v in result.items() if k != "evaluations"}, indent=1), flush=True)
    return result


def forked(folder: Path, step: int, new: Path, config: TrainConfig) -> Path:
    """A new run that goes on from a checkpoint of another one with other settings, which a run itself refuses."""
    if not new.exists():
        new.mkdir(parents=True)
        tensors, metadata = read_safetensors(folder / PATTERN.format(step))
        identity = json.loads(metadata["identity"]) | config.decisive()
        write_safetensors(new / PATTERN.format(step), tensors, metadata | {"identity": canonical_json(identity)})
        shutil.copy(folder / "log.jsonl", new)
        shutil.copytree(folder / "samples", new / "samples")
        found = json.loads((folder / "evaluations.json").read_text())
        write_text(new / "evaluations.json", json.dumps([e for e in found if e["step"] <= step]))
    return new


def careful_run(model: Any, folder: Path) -> dict[str, Any]:
    """An unguarded run from :data:`FORK` on with ``careful`` instead, beside what it was without."""
    settings = {"steps": FORK_END, "guards": "careful", "seed": FORKED, "patience": 0, **LONG}
    config = TrainConfig.from_dict(read_recipe("builtin")["config"] | settings).for_model(model.spec)
    new = forked(folder, FORK, folder.with_name(f"{folder.name}-careful"), config)
    found = evaluations(trainer(new, model, **settings), until_harm=False)
    plain = [e for e in json.loads((folder / "evaluations.json").read_text()) if e["step"] <= FORK_END]
    last, later = [e["step"] for e in found[-HARMED:]], [e["step"] for e in found if e["step"] > FORK]
    kept = guarded(found, "careful", "tiny_clip")
    return {
        "seed": FORKED,
        "from_step": FORK,
        "later_steps": later,
        "careful": {"all": told(found, later), "last": told(found, last), "kept": kept | told(found, [kept["kept"]])},
        "off": {"all": told(plain, later), "last": told(plain, last)},
        "evaluations": [{k: v for k, v in e.items() if k != "reading"} for e in found if e["step"] >= FORK],
    }


class Clock:
    """Processor seconds inside of methods, by what they are for."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}

    def watch(self, owner: Any, method: str, name: str) -> None:
        """Count what a method of an object takes from now on."""
        call = getattr(owner, method)

        def timed(*arguments: Any, **named: Any) -> Any:
            began = time.process_time()
            try:
                return call(*arguments, **named)
            finally:
                self.spent[name] = self.spent.get(name, 0.0) + time.process_time() - began

        setattr(owner, method, timed)


def cost(folder: Path, steps: int) -> dict[str, Any]:
    """Processor seconds a step of the built-in recipe, evaluations included; the presets take turns step by step.

    ``nothing`` is ``off`` without evaluations, so what guards look at counts as their cost in full; ``off`` looks at
    the same but for a held-out judge, and only reports. The sweep at the end of a run is timed for itself.
    """
    variants: dict[str, dict[str, Any]] = {
        "nothing": {"guards": "off", "sample_every": 0},
        "off": {"guards": "off"},
        "standard": {"guards": "standard", "heldout": ["dynamic_degree"]},
        "careful": {"guards": "careful", "heldout": ["dynamic_degree"]},
    }
    clocks, streams = {name: Clock() for name in variants}, {}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for name, settings in variants.items():  # every run has its own model: LoRAs of several runs would meet in one
        run = trainer(folder / name, load_video_model("builtin"), steps=steps, save_every=steps, **settings)
        clocks[name].watch(run, "evaluate", "evaluations")
        clocks[name].watch(run.files, "write_samples", "sample videos")
        clocks[name].watch(run.files, "draw", "report and curve")
        streams[name] = iter(run)
        next(streams[name])  # loading, and the base model's evaluation
        clocks[name].spent.clear()
    for _ in range(steps):
        for name, stream in streams.items():
            began = time.process_time()
            next(stream)
            times[name].append(time.process_time() - began)
    spent = {name: dict(clock.spent) for name, clock in clocks.items()}
    result: dict[str, Any] = {}
    plain = float(np.mean(times["nothing"]))
    for name, values in times.items():
        began = time.process_time()
        list(streams[name])
        result[name] = {
            "median": float(np.median(values)),
            "quartiles": [float(np.quantile(values, q)) for q in (0.25, 0.75)],
            "mean": float(np.mean(values)),
            "times_nothing": float(np.mean(values)) / plain,
            "of_which_a_step": {part: seconds / steps for part, seconds in spent[name].items()},
            "end_of_run": time.process_time() - began,
        }
    return result | {"steps": steps, "sample_every": EVERY, "what": "processor seconds a step"}


def draw(seeds: dict[str, dict[str, Any]]) -> np.ndarray:
    """Reward, true accuracy and true motion over the steps; dots are what ``standard`` keeps, bars where it stops."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.8), dpi=120)
    panels = figure.subplots(1, 3)
    measures = {
        "trained reward (tiny CLIP)": lambda e, base: e["reward"],
        "true: all four attributes right": lambda e, base: e["truth"]["all"],
        "true motion / base": lambda e, base: e["truth"]["motion"] / base["truth"]["motion"],
    }
    for axes, (title, measure) in zip(panels, measures.items(), strict=True):
        for index, (seed, run) in enumerate(seeds.items()):
            base, standard = run["evaluations"][0], run["standard"]
            values = {e["step"]: measure(e, base) for e in run["evaluations"]}
            axes.plot(values.keys(), values.values(), color=f"C{index}", label=f"seed {seed}")
            axes.plot([standard["kept"]], [values[standard["kept"]]], "o", color=f"C{index}", markersize=9)
            if standard["stopped_at"]:
                stop = standard["stopped_at"]
                axes.plot([stop], [values[stop]], "|", color=f"C{index}", markersize=22, markeredgewidth=2)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
    panels[2].axhline(FLOOR, color="black", linewidth=0.8, linestyle="--")
    panels[0].legend(fontsize=8)
    figure.suptitle("built-in model trained for too long: lines without guards, dots: the step that standard keeps, "
                    "bars: where it stops", fontsize=9)  # fmt: skip
    figure.tight_layout()
    return figure_pixels(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="OUTPUT.json and OUTPUT.png are written")
    parser.add_argument("--runs", type=Path, help="where the runs go and stay; else in a new temporary folder")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS, help="parts to make; the others stay")
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=400, help="at most")
    options = parser.parse_args()
    options.runs = options.runs or Path(tempfile.mkdtemp(prefix="guards-"))
    path, model = options.output.with_suffix(".json"), load_video_model("builtin")
    result = json.loads(path.read_text()) if path.exists() else {}
    about = {"torch": torch.__version__, "threads": torch.get_num_threads(), "processors": os.cpu_count()}
    result |= {"settings": LONG, "clips": CLIPS, **about}

    def keep(part: str, value: Any) -> None:
        result[part] = value
        write_text(path, json.dumps(result, indent=1) + "\n")

    if "seeds" in options.only:
        seeds = {}
        for seed in options.seeds:
            print(f"seed {seed}", flush=True)
            folder = options.runs / f"seed-{seed}"
            run = trainer(folder, model, steps=options.steps, guards="off", seed=seed, **LONG)
            seeds[str(seed)] = summed_up(evaluations(run), "tiny_clip", CLIPS)
            keep("seeds", seeds)
            write_png(options.output.with_suffix(".png"), draw(seeds))
    if "careful" in options.only:
        keep("careful", careful_run(model, options.runs / f"seed-{FORKED}"))
    if "heldout" in options.only:
        folder = options.runs / "heldout"
        if not (folder / "advice.json").exists():
            evaluations(trainer(folder, model, **OVERDONE), until_harm=False)
            write_text(folder / "advice.json", json.dumps(said(folder)))
        run = trainer(folder, model, **OVERDONE | {"guards": "off"})
        says = json.loads((folder / "advice.json").read_text())
        sums = summed_up(evaluations(run, False), OVERDONE["reward"], OVERDONE["sample_count"])
        keep("heldout", OVERDONE | {"standard_says": says} | sums)
    if "cost" in options.only:
        keep("cost", cost(options.runs / "cost", COST_STEPS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
