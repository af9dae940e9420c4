"""Robustness, as one command: damaged files, kills, cancels, and a long run.

    python -m reward_lora.tests.robustness [--quick] [--json FILE]

Ends with status 1 if anything happened that must not.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from reward_lora.benchmarks.common import Result, Table, command, fresh

from .fuzz import Found, fuzz
from .interrupts import cancel, kill_and_resume, soak
from .readers import readers

KIB_A_STEP = 8
"""What counts as flat: 8 MiB in a thousand steps. A step's record in the log takes 1.5 KiB; the rest is what the
allocator keeps for the next step, more at one moment than at another."""


def measure(options: argparse.Namespace) -> Result:
    quick, figures = options.quick, {}
    if options.only and options.json and options.json.is_file():
        figures = json.loads(options.json.read_text(encoding="utf-8"))["figures"]
    named = readers(quick)
    with tempfile.TemporaryDirectory() as place:
        for number, reader in enumerate(named):
            if options.only not in reader.name:
                continue
            wanted = 25 if quick else options.examples
            try:
                figures[reader.name] = dict(fuzz(reader, Path(place) / f"{number}", wanted, options.seed))
            except Found as error:
                figures[reader.name] = {"wrong": str(error)}
                kept = Path("robustness-spoiled")
                kept.mkdir(exist_ok=True)
                for file in Path(place).glob(f"{number}-spoiled-*"):
                    shutil.move(file, kept / file.name)
            print(reader.name, figures[reader.name], file=sys.stderr, flush=True)  # noqa: T201 - minutes pass between
    for name, run, count in (
        ("kill", kill_and_resume, 2 if quick else options.times),
        ("cancel", cancel, 4 if quick else options.times),
        ("soak", soak, 30 if quick else options.steps),
    ):
        if options.only in name:
            figures[name] = fresh(run, count, threads=1)
    rows, wrong = [], []
    for name in (reader.name for reader in named if reader.name in figures):
        found = figures[name]
        wrong += [found["wrong"]] if "wrong" in found else []
        refused, read = found.get("refused", 0), found.get("read", 0)
        rows.append([name, "", "", "", 1] if "wrong" in found else [name, refused + read, refused, read, 0])
    said = []
    if killed := figures.get("kill"):
        said.append(
            f"Killed with signal 9 and resumed {killed['kills']} times over {killed['runs']} runs: "
            f"{killed['different']} LoRAs differ from an undisturbed run's by a byte."
        )
        wrong += ["a killed run ended in another LoRA than one left alone"] if killed["different"] else []
    if cancelled := figures.get("cancel"):
        said.append(
            f"Cancelled {cancelled['cancels']} times over {cancelled['runs']} runs in one process: "
            f"{cancelled['changed']} times the model was not as before, {cancelled['different']} LoRAs differ; "
            f"tensors that stayed: {cancelled['tensor bytes']} bytes; resident {cancelled['resident MiB']:+.0f} MiB."
        )
        wrong += ["a cancelled run ended in another LoRA than one left alone"] if cancelled["different"] else []
        if cancelled["changed"] or cancelled["tensor bytes"] > 0:
            wrong.append(f"a cancel left something in the model: {cancelled}")
    if soaked := figures.get("soak"):
        long = soaked["steps"] > 100  # shorter, the first evaluation is all of it
        said.append(
            f"{soaked['steps']} steps in {soaked['seconds']} s: "
            f"resident {soaked['MiB at a tenth']:.0f} MiB after a tenth, "
            f"{soaked['MiB at the end']:.0f} MiB at the end, "
            f"{soaked['KiB a step']:.1f} KiB a step{f' (at most {KIB_A_STEP} count as flat)' * long}; "
            f"tensors that stayed: {soaked['tensor bytes']} bytes."
        )
        if long and soaked["KiB a step"] > KIB_A_STEP:
            wrong.append(f"memory grows by {soaked['KiB a step']} KiB a step")
    options.failed = bool(wrong)
    return Result(
        "Files a user hands us, spoiled by hypothesis; runs of the built-in model: one frame, two solver steps"
        + (". Made in several sittings, of which this command is the last." if options.only else ""),
        [Table(("spoiled files of", "files", "refused in a sentence", "read all the same", "anything else"), rows)],
        [*said, *(f"WRONG: {line}" for line in wrong)],
        figures,
    )


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--examples", type=int, default=400, help="spoiled files of a reader")
    parser.add_argument("--times", type=int, default=50, help="kills, and cancels")
    parser.add_argument("--steps", type=int, default=1000, help="of the long run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only",
        default="",
        help="readers with this in their name, or kill, cancel or soak; what --json's file holds of others stays",
    )


def main(arguments: list[str] | None = None) -> int:
    seen = argparse.Namespace(failed=False)

    def run(given: argparse.Namespace) -> Result:
        result = measure(given)
        seen.failed = given.failed
        return result

    return (
        command("robustness", __doc__, run, options, arguments, package=__package__.rpartition(".")[0]) or seen.failed
    )


if __name__ == "__main__":
    sys.exit(main())
