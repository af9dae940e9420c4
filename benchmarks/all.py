"""Every benchmark, one after the other in a process each, and RESULTS.md made of what they found.

    python -m reward_lora.benchmarks.all [--quick] [--only NAME ...] [--only-table]

Take a machine that does nothing else. The numbers go to ``benchmarks/results/NAME.json``; a GPU benchmark that cannot
run leaves what was measured before. ``--quick`` writes nothing: it shows that everything works.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from ..files import write_text
from .common import Table

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
TITLES = {
    "replay": "Replay against one autograd graph",
    "step": "A step against its floor",
    "decoding": "The gradient of a long clip, chunk by chunk",
    "scoring": "Scoring a clip",
    "loading": "Loading a model",
    "processes": "Two processes against one",
    "robustness": "Robustness",
    "guards": "What guards are for, and what they cost",
    "gpu": "Full-size models on a GPU",
}
"""In the order of RESULTS.md; what takes longer than minutes is run only when named."""
LONG = ("robustness", "guards", "gpu")
PREFACE = """# Measured

Made by `python -m reward_lora.benchmarks.all` from `results/*.json`; do not edit. Each section says when, on what and
by which command. Numbers are medians, with the least and the most of the repeats in brackets: the spread of one run.
From one hour to another the seconds of a shared machine differed by up to a fifth, its bytes did not.
"""


def module(name: str) -> str:
    return "reward_lora.tests.robustness" if name == "robustness" else f"{__package__}.{name}"


def run(name: str, quick: bool, folder: Path) -> int:
    arguments = ["--json", str(folder / f"{name}.json"), *(["--quick"] if quick else [])]
    print(f"\n--- {name}", flush=True)
    return subprocess.run([sys.executable, "-m", module(name), *arguments], check=False).returncode


def document(folder: Path = RESULTS) -> str:
    """RESULTS.md."""
    parts = [PREFACE]
    for name, title in TITLES.items():
        file = folder / f"{name}.json"
        if not file.is_file() and name != "robustness" and not (HERE / f"{name}.py").is_file():
            continue
        record = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        parts.append(f"## {title}\n\n{section(record) if record else f'Not measured. `python -m {module(name)}`'}\n")
        if file.with_suffix(".png").is_file():
            parts.append(f"![{title}]({RESULTS.name}/{name}.png)\n")
    return "\n".join(parts)


def section(record: dict[str, Any]) -> str:
    """One benchmark."""
    if "tables" not in record:
        return other_form(record)
    load = f"; load {record['load']:g} before it began" if record.get("load", 0) > 0.5 else ""
    head = f"{record['date']}, {record['hardware']}; {record['software']}{load}.\n\n`{record['command']}`"
    tables = [Table(t["columns"], t["rows"], t.get("title", "")).markdown() for t in record["tables"]]
    return "\n\n".join([head, record["about"], *tables, "\n".join(f"- {line}" for line in record["said"])]).rstrip()


def other_form(record: dict[str, Any]) -> str:
    """A benchmark with a record of its own: its numbers by name, long lists left out."""
    parts = [f"{name}: {value}" for name, value in record.items() if isinstance(value, (str, int, float))]
    for name, value in record.items():
        entries = list(enumerate(value, 1)) if isinstance(value, list) else list(getattr(value, "items", list)())
        rows = [(key, *row) for key, entry in entries if isinstance(entry, dict) for row in _rows(entry)]
        if not rows:
            rows = [(key, "", {"": entry}) for key, entry in entries if isinstance(entry, (int, float, str))]
        columns = list(dict.fromkeys(column for *_, numbers in rows for column in numbers))
        if columns:
            lines = [[key, part, *(_short(numbers.get(c, "")) for c in columns)] for key, part, numbers in rows]
            parts.append(
                Table(("", "", *(c.replace("_", " ") for c in columns)), lines, name.replace("_", " ")).markdown()
            )
    return "\n\n".join(parts)


def _rows(entry: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Numbers and words of an entry, and of the entries in it."""
    found = [("", {k: v for k, v in entry.items() if isinstance(v, (int, float, str)) and len(str(v)) < 40})]
    found += [(k, row[1]) for k, v in entry.items() if isinstance(v, dict) for row in _rows(v)[:1]]
    return [(name, numbers) for name, numbers in found if numbers]


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="see that everything works, and write nothing")
    parser.add_argument("--only", nargs="+", choices=list(TITLES), metavar="NAME", help=f"of {', '.join(TITLES)}")
    parser.add_argument("--only-table", action="store_true", help="run nothing; make RESULTS.md of what is there")
    options = parser.parse_args()
    failed = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) if options.quick else RESULTS
        folder.mkdir(exist_ok=True)
        gpu = ["gpu"] if torch.cuda.is_available() else []
        there = [name for name in TITLES if name not in LONG and (HERE / f"{name}.py").is_file()]
        names = options.only or there + gpu
        for name in [] if options.only_table else names:
            if run(name, options.quick, folder):
                failed.append(name)
        if not options.quick:
            print(write_text(HERE / "RESULTS.md", document()))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
