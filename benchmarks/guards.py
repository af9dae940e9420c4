"""What guards are for: long runs on the built-in model, what the truth says of them, and what the guards keep.

    python -m reward_lora.benchmarks.guards [--runs RUNS] [--only seeds heldout careful cost] [--quick] [--json FILE]

``seeds``: the recipe of the built-in model is trained for longer than is good: half its rate, which does not fall. The
oracle of the world reads off the evaluation clips what they really show; no guard sees that. ``standard`` is in force
from the first step. Where it stops the run, it goes on without guards, which is the run that never had any, for
``standard`` changes no step (``tests/test_guards.py``). All end when the oracle has found harm three times in a row.

``heldout`` does the same towards motion, which is easily overdone, with the tiny CLIP as a judge that is not trained
on. ``careful`` makes the end of a run again with the preset that changes steps. ``cost`` times the presets, step by
step in turn, in seconds of the processor, so that other work on the machine does not count.

A run that was interrupted goes on in the same ``--runs``. Of parts that are not made the figures in FILE stay. The
picture goes beside FILE.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ..assets import oracle
from ..cli.shared import read_recipe
from ..files import canonical_json, read_safetensors, write_safetensors, write_text
from ..lora.adapter import LoraUse, applied
from ..lora.files import read_lora
from ..training.checkpoint import PATTERN, list_checkpoints
from ..training.config import TrainConfig
from ..training.guards import Reading
from ..training.media import figure_pixels, write_png
from ..training.run_log import RunLog, advice
from ..training.trainer import Trainer
from ..video_models import load_video_model
from .common import Result, Table, command
from .guards_cost import cost, trainer

CLIPS = 64
EVERY = 20
LONG = {"learning_rate": 4e-3, "lr_schedule": "constant", "sample_count": CLIPS, "sample_every": EVERY,
        "save_every": EVERY}  # fmt: skip
HARMED = 3
"""Evaluations with harm in a row, after which a run need not be made worse."""
FLOOR, LOSS = 0.9, 0.1
"""Harm: true motion under this share of the base model's, or true accuracy this much under its best."""
NEAR = 0.02
"""How far under the run's best accuracy what the guards keep may be."""
OVERDONE = {"reward": "dynamic_degree", "heldout": ["tiny_clip"], "judged_frames": 0, "lr_schedule": "constant",
            "steps": 60, "sample_count": 24, "sample_every": 10, "save_every": 10, "seed": 1}  # fmt: skip
"""The run with a held-out judge: towards motion, at the recipe's learning rate."""
CAREFUL = {"keep_checkpoints": 1000, "patience": 0, "seed": 2, **LONG}
FORK, FORK_END = 200, 300
"""From which step on ``careful`` is in force, to which."""
COST_STEPS = 40
PROMPTS = (4, 16, 64)
"""How many of an evaluation's clips its standard errors are told for."""
PARTS = ("seeds", "heldout", "careful", "cost")

Evaluations = list[dict[str, Any]]


def evaluations(run: Trainer, until_harm: bool = False) -> Evaluations:
    """Every evaluation of a run to its end, or until it has done harm, also those that an earlier call made."""
    path = run.folder / "evaluations.json"
    found = json.loads(path.read_text()) if path.exists() else []
    if until_harm and harmed(found):
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
                if until_harm and harmed(found) and not event.stop:  # a run that stops itself also ends itself
                    break
    return found


def harmed(found: Evaluations) -> bool:
    """Whether a run has gone on for long enough: its last evaluations show harm, all of them."""
    count, best = 0, 0.0
    for e in found:
        best = max(best, e["truth"]["all"])
        moves = e["truth"]["motion"] / found[0]["truth"]["motion"]
        count = count + 1 if moves < FLOOR or e["truth"]["all"] < best - LOSS else 0
    return count >= HARMED


def told(found: Evaluations, chosen: Evaluations) -> dict[str, float]:
    """The mean over evaluations: gain of the reward, true accuracy, true motion relative to the base model's."""
    base = found[0]
    return {
        "reward_gain": float(np.mean([e["reward"] for e in chosen])) - base["reward"],
        "accuracy": float(np.mean([e["truth"]["all"] for e in chosen])),
        "motion": float(np.mean([e["truth"]["motion"] for e in chosen])) / base["truth"]["motion"],
    }


def records(folder: Path) -> list[dict[str, Any]]:
    """A run's log."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def kept(run: Trainer, found: Evaluations) -> dict[str, Any]:
    """What the oracle sees in the best LoRA's file, or if there is none in the base model's clips."""
    if not run.kept_paths:
        return found[0]
    with applied(run.model, [LoraUse(read_lora(path), 1.0) for path in run.kept_paths]):
        seen = run.evaluate()
    return {"reward": seen.reward, "truth": oracle.mean_scores(oracle.judge(seen.frames, list(seen.prompts)))}


def long_run(folder: Path, model: Any, until_harm: bool = True, **settings: Any) -> dict[str, Any]:
    """A run with ``standard``, and what it would have become without."""
    run = trainer(folder, model, guards="standard", **settings)
    found = evaluations(run, until_harm)
    log = RunLog.of(records(folder))
    looks = [r for r in log.evaluations if r["guards"].get("gentler")]
    stop, whole = next((r["stop"] for r in log.steps if r["stop"]), ""), found
    if stop:
        whole = evaluations(trainer(continued(folder), model, guards="off", **settings), until_harm)
    best = max(found, key=lambda e: (e["truth"]["all"], e["truth"]["motion"]))
    last = whole[-HARMED:]
    return {
        "steps": settings["steps"],
        "base": told(found, found[:1]),
        "standard": {
            "step": log.best or 0,
            "strength": log.strength,
            "ended_at": found[-1]["step"],
            "stop": stop,
            "looks_at_lower_strength": len(looks),
            "evaluations": len(found),
            "says": advice(log, folder.name)[1],
            **told(found, [kept(run, found)]),
        },
        "best_of_the_guarded_run": {"step": best["step"], **told(found, [best])},
        "unguarded": {"steps": [e["step"] for e in last], "harmed": harmed(whole), **told(whole, last),
                      "best_accuracy": max(e["truth"]["all"] for e in whole)},
        "standard_error": {str(n): doubt(whole, n) for n in PROMPTS if n <= settings["sample_count"]},
        "whole": [{name: e[name] for name in ("step", "reward", "truth")} for e in whole],
    }  # fmt: skip


def doubt(found: Evaluations, clips: int) -> dict[str, float]:
    """Standard errors that so many clips leave the reward's gain and motion / base, the mean over the evaluations."""
    base, errors = found[0]["reading"], {"reward": [], "motion": []}
    for reading in (e["reading"] for e in found[1:]):
        for first in range(0, len(base["motion"]) - clips + 1, clips):
            part = slice(first, first + clips)
            for name in errors:
                now, was = np.array(reading[name][part]), np.array(base[name][part])
                share, unit = (now.mean() / was.mean(), was.mean()) if name == "motion" else (1.0, 1.0)
                errors[name].append(float(np.std(now - share * was, ddof=1)) / clips**0.5 / unit)
    return {name: float(np.mean(values)) for name, values in errors.items()}


def met(run: Mapping[str, Any]) -> bool:
    """Without guards the reward rises and the truth falls; with ``standard`` the truth is near its best and moves."""
    free, held, best = run["unguarded"], run["standard"], run["best_of_the_guarded_run"]
    hacked = free["reward_gain"] > 0 and free["harmed"]
    return hacked and held["accuracy"] >= best["accuracy"] - NEAR and held["motion"] >= FLOOR


def continued(folder: Path, step: int | None = None, name: str = "free", config: TrainConfig | None = None) -> Path:
    """A new run that goes on from a checkpoint of another one, the newest if no step is given.

    With a config it goes on with other settings, which a run itself refuses.
    """
    new = folder.with_name(f"{folder.name}-{name}")
    if not new.exists():
        new.mkdir(parents=True)
        checkpoint = folder / PATTERN.format(step) if step else list_checkpoints(folder)[-1]
        tensors, metadata = read_safetensors(checkpoint)
        identity = json.loads(metadata["identity"]) | (config.decisive() if config else {})
        write_safetensors(new / checkpoint.name, tensors, metadata | {"identity": canonical_json(identity)})
        shutil.copy(folder / "log.jsonl", new)
        shutil.copytree(folder / "samples", new / "samples")
        found = json.loads((folder / "evaluations.json").read_text())
        write_text(new / "evaluations.json", json.dumps([e for e in found if not step or e["step"] <= step]))
    return new


def careful_run(folder: Path, model: Any) -> dict[str, Any]:
    """An unguarded run, and from :data:`FORK` on with ``careful`` instead."""
    settings = {"steps": FORK_END, **CAREFUL}
    plain = evaluations(trainer(folder, model, guards="off", **settings))
    config = TrainConfig.from_dict(read_recipe("builtin")["config"] | settings | {"guards": "careful"})
    new = continued(folder, FORK, "careful", config.for_model(model.spec))
    found = evaluations(trainer(new, model, guards="careful", **settings))
    after = {name: [e for e in run if e["step"] > FORK] for name, run in (("off", plain), ("careful", found))}
    return {"seed": CAREFUL["seed"], "from_step": FORK, "to_step": FORK_END,
            **{name: told(plain, chosen) for name, chosen in after.items()}}  # fmt: skip


def draw(seeds: Mapping[str, Mapping[str, Any]]) -> np.ndarray:
    """Reward, true accuracy and true motion over the steps; dots are what ``standard`` keeps, bars where it stops."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.8), dpi=120)
    panels = figure.subplots(1, 3)
    measures = {
        "trained reward (tiny CLIP), gain": lambda told: told["reward_gain"],
        "true: all four attributes right": lambda told: told["accuracy"],
        "true motion / base": lambda told: told["motion"],
    }
    for axes, (title, measure) in zip(panels, measures.items(), strict=True):
        for index, (seed, run) in enumerate(seeds.items()):
            whole, held, colour = run["whole"], run["standard"], f"C{index}"
            values = {e["step"]: measure(told(whole, [e])) for e in whole}
            axes.plot(values.keys(), values.values(), color=colour, label=f"seed {seed}")
            axes.plot([held["step"]], [measure(held)], "o", color=colour, markersize=9)
            if held["stop"]:
                stop = held["ended_at"]
                axes.plot([stop], [values[stop]], "|", color=colour, markersize=22, markeredgewidth=2)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
    panels[2].axhline(FLOOR, color="black", linewidth=0.8, linestyle="--")
    panels[0].legend(fontsize=8)
    figure.suptitle("built-in model trained for too long: lines without guards, dots: what standard keeps, at its "
                    "strength, bars: where it stops", fontsize=9)  # fmt: skip
    figure.tight_layout()
    return figure_pixels(figure)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def tables(figures: Mapping[str, Any]) -> list[Table]:
    """What was found, for people."""
    found = []
    if seeds := figures.get("seeds"):
        free = [
            [seed, "{}..{}".format(r["unguarded"]["steps"][0], r["unguarded"]["steps"][-1]),
             f"{r['unguarded']['reward_gain']:+.3f}",
             f"{percent(r['base']['accuracy'])}, {percent(r['unguarded']['best_accuracy'])}, "
             f"{percent(r['unguarded']['accuracy'])}", f"{r['unguarded']['motion']:.2f}"]
            for seed, r in seeds.items()
        ]  # fmt: skip
        columns = ("seed", "last three evaluations", "reward", "everything right: base, best, last", "motion / base")
        title = (f"Without guards, until three evaluations in a row show harm: motion under {FLOOR:g}, or "
                 f"{100 * LOSS:g} points less right than the best")  # fmt: skip
        found.append(Table(columns, free, title))
        held = [
            [seed, f"stops at {h['ended_at']}" if h["stop"] else f"no stop in {h['ended_at']}",
             f"step {h['step']} at {h['strength']:g}", f"{h['reward_gain']:+.3f}",
             percent(h["accuracy"]), percent(r["best_of_the_guarded_run"]["accuracy"]), f"{h['motion']:.2f}",
             "yes" if met(r) else "no"]
            for seed, r in seeds.items() for h in [r["standard"]]
        ]  # fmt: skip
        columns = ("seed", "run", "keeps", "reward", "everything right", "best of that run", "motion / base", "met")
        title = (f"With standard. Met: harm without it; with it at most {100 * NEAR:g} points under that run's best, "
                 f"and motion at least {FLOOR:g}")  # fmt: skip
        found.append(Table(columns, held, title))
        counts = next(iter(seeds.values()))["standard_error"]
        errors = [
            [
                n,
                *(
                    f"{np.mean([r['standard_error'][n][what] for r in seeds.values()]):.3f}"
                    for what in ("reward", "motion")
                ),
            ]
            for n in counts
        ]
        columns = ("prompts of an evaluation", "of the reward's gain", "of motion / base")
        found.append(Table(columns, errors, "Standard errors, the mean over these runs"))
    if r := figures.get("heldout"):
        rows = [
            [name, *(f"{part['reward_gain']:+.3f}", percent(part["accuracy"]), f"{part['motion']:.2f}")]
            for name, part in (("base model", r["base"]), ("standard keeps", r["standard"]),
                               (f"without guards, to step {r['steps']}", r["unguarded"]))
        ]  # fmt: skip
        columns = ("", "trained reward", "everything right", "motion / base")
        found.append(Table(columns, rows, "Towards more motion (dynamic_degree), the tiny CLIP held out"))
    if r := figures.get("careful"):
        rows = [[name, f"{r[name]['reward_gain']:+.3f}", percent(r[name]["accuracy"]), f"{r[name]['motion']:.2f}"]
                for name in ("off", "careful")]  # fmt: skip
        title = f"Steps {r['from_step']} to {r['to_step']} of seed {r['seed']} at half the recipe's rate, made twice"
        found.append(Table(("preset", "reward", "everything right", "motion / base"), rows, title))
    if r := figures.get("cost"):
        rows = [[name, f"{r[name]['mean']:.2f}", f"{r[name]['times_nothing']:.2f}", f"{r[name]['end_of_run']:.1f}"]
                for name in ("nothing", "off", "standard", "careful")]  # fmt: skip
        columns = ("preset", "processor seconds a step", "of a run without evaluations", "seconds at its end")
        found.append(Table(columns, rows, f"Cost over {r['steps']} steps, 16 prompts every {r['sample_every']}"))
        rows = [
            [clips, *(f"{one[what]:.4f}" for what in ("motion", "sharpness"))] for clips, one in r["measures"].items()
        ]
        found.append(Table(("clips", "motion", "sharpness"), rows, "Processor seconds of what guards measure of them"))
    return found


def said(figures: Mapping[str, Any]) -> list[str]:
    """What follows, and what the reports of the runs say."""
    lines = []
    if seeds := figures.get("seeds"):
        count = sum(map(met, seeds.values()))
        lines.append(f"Met for {count} of {len(seeds)} seeds. One standard error of {CLIPS} prompts is up to 6 points "
                     "of everything right, 2 near 98 %.")  # fmt: skip
        looks, of = (sum(r["standard"][k] for r in seeds.values()) for k in ("looks_at_lower_strength", "evaluations"))
        lines.append(f"Standard painted {looks} of {of} evaluations a second time, at a lower strength.")
        lines += [f"The report of seed {seed}: “{r['standard']['says'][0]}”" for seed, r in seeds.items()]
    if r := figures.get("heldout"):
        lines.append(f"The report of the run towards motion: “{r['standard']['says'][0]}”")
    return lines


def measure(options: argparse.Namespace) -> Result:
    runs = options.runs or Path(tempfile.mkdtemp(prefix="guards-"))
    made = ("seeds",) if options.quick else options.only
    figures: dict[str, Any] = {}
    if options.json and options.json.exists():
        figures = json.loads(options.json.read_text(encoding="utf-8"))["figures"]
    model, long = load_video_model("builtin"), LONG | {"steps": options.steps, "learning_rate": options.rate}
    if options.quick:
        long |= {"steps": 4, "sample_count": 4, "sample_every": 2, "save_every": 2}
    if "seeds" in made:
        figures["seeds"] = {}
        for seed in options.seeds[: 1 if options.quick else None]:
            print(f"seed {seed}", flush=True)
            figures["seeds"][str(seed)] = long_run(runs / f"seed-{seed}", model, seed=seed, **long)
    if "heldout" in made:
        figures["heldout"] = long_run(runs / "heldout", model, until_harm=False, **OVERDONE)
    if "careful" in made:
        figures["careful"] = careful_run(runs / "careful", model)
    if "cost" in made:
        figures["cost"] = cost(runs / "cost", COST_STEPS, EVERY)
    if options.json and "seeds" in figures:
        write_png(options.json.with_suffix(".png"), draw(figures["seeds"]))
    about = (
        f"Built-in model, its recipe at a constant rate of {long['learning_rate']:g}, at most {long['steps']} steps; "
        f"{long['sample_count']} unseen prompts every {long['sample_every']}; truth by the oracle of its world"
    )
    return Result(about, tables(figures), said(figures), figures)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", type=Path, help="where the runs go and stay; else in a new temporary folder")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS, help="parts to make; the others stay")
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=800, help="at most")
    parser.add_argument(
        "--rate", type=float, default=LONG["learning_rate"], help="of learning, the recipe begins with 8e-3"
    )


if __name__ == "__main__":
    sys.exit(command("guards", __doc__, measure, options))
