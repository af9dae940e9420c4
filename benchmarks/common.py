"""What benchmarks share: processes of their own, repeats taken in turns, medians and spread, one form of result.

A benchmark is a module with ``measure(options) -> Result``; :func:`command` makes its command line of it::

    python -m reward_lora.benchmarks.NAME [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from typing import Any

import psutil
import torch

from ..files import write_text

PACKAGES = ("torch", "diffusers", "transformers", "peft")
HEAVY = (
    "diffusers.models.autoencoders.autoencoder_kl_wan",
    "diffusers.models.transformers.transformer_wan",
    "peft",
)
"""Modules that take long to import and that most benchmarks need."""


@dataclass(frozen=True)
class Table:
    """Columns by name, and rows of text or numbers; ``title`` may be empty."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str | float]]
    title: str = ""

    def markdown(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        text = "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
        return f"**{self.title}**\n\n{text}" if self.title else text

    def plain(self) -> str:
        lines = [[str(cell) for cell in line] for line in (self.columns, *self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        padded = ("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
        return "\n".join(([self.title] if self.title else []) + list(padded))


@dataclass(frozen=True)
class Result:
    """What a benchmark found.

    Attributes:
        about: What was run, in a line.
        tables: For people.
        said: Sentences that follow from them.
        figures: The numbers behind them, every repeat.
    """

    about: str
    tables: Sequence[Table]
    said: Sequence[str] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)

    def plain(self) -> str:
        return "\n\n".join([self.about, *(table.plain() for table in self.tables), *self.said])


def spread(values: Sequence[float], digits: int = 2) -> str:
    """The median, and in brackets the least and the most of several."""
    middle = f"{statistics.median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f}..{max(values):.{digits}f})"


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """The median of ours over the median of theirs."""
    return f"{statistics.median(ours) / statistics.median(theirs):.2f}"


def mib(size: float) -> str:
    return f"{size / 2**20:.0f}"


def in_turns(calls: Mapping[str, Callable[[], object]], rounds: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of every call, one after the other and that ``rounds`` times; a first round warms up and is not counted.

    What else the machine does falls on all of them alike.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if device.startswith("cuda"):
                torch.cuda.synchronize(device)
            if turn:
                found[name].append(time.perf_counter() - started)
    return found


def fresh(call: Callable[..., Any], *arguments: Any, threads: int = 0) -> Any:
    """What a call returns in a process of its own, whose peak is its own. ``threads`` as they are here if 0."""
    method = "forkserver" if "forkserver" in get_all_start_methods() else "spawn"
    context = get_context(method)
    if method == "forkserver":  # imports once, for all the processes to come
        context.set_forkserver_preload([__name__, *HEAVY])
    start = torch.set_num_threads, (threads or torch.get_num_threads(),)
    with ProcessPoolExecutor(1, context, *start) as pool:
        return pool.submit(call, *arguments).result()


class Resident:
    """Most resident bytes of this process above those at the start, sampled every 2 ms."""

    def __enter__(self) -> Resident:
        self._start = self._highest = psutil.Process().memory_info().rss
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._stop.wait(0.002):
            self._highest = max(self._highest, process.memory_info().rss)

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        self.bytes = max(self._highest, psutil.Process().memory_info().rss) - self._start


class Peak:
    """Most memory above the start: allocated on a GPU, resident on a CPU."""

    def __init__(self, device: str) -> None:
        self._device, self._resident = device, Resident()

    def __enter__(self) -> Peak:
        if self._device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(self._device)
            self._start = torch.cuda.memory_allocated(self._device)
        else:
            self._resident.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._device.startswith("cuda"):
            self.bytes = torch.cuda.max_memory_allocated(self._device) - self._start
        else:
            self._resident.__exit__(*exc)
            self.bytes = self._resident.bytes


def hardware() -> str:
    """Processor, cores, threads, memory and GPU of this machine."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    memory = psutil.virtual_memory().total >> 30
    text = f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {memory} GiB"
    if not torch.cuda.is_available():
        return f"{text}; no GPU"
    gpu = torch.cuda.get_device_properties(0)
    return f"{text}; {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB"


def software() -> str:
    """Versions of what computes."""
    versions = (f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    return ", ".join([f"Python {platform.python_version()}", *versions])


def command(
    name: str,
    doc: str | None,
    measure: Callable[[argparse.Namespace], Result],
    options: Callable[[argparse.ArgumentParser], object] = lambda parser: None,
    arguments: Sequence[str] | None = None,
    package: str = str(__package__),
) -> int:
    """Run a benchmark from the command line: its table on the screen, and with ``--json`` all of it in a file."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(f"python -m {package}.{name}", description=doc, formatter_class=form)
    parser.add_argument("--quick", action="store_true", help="a minute's worth at most: to see that it works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything to a file")
    options(parser)
    given = list(sys.argv[1:] if arguments is None else arguments)
    found = parser.parse_args(given)
    load, started = psutil.getloadavg()[0], time.monotonic()
    result = measure(found)
    print(result.plain())
    if found.json:
        record = {
            "benchmark": name,
            "command": " ".join(["python", "-m", f"{package}.{name}", *_without_json(given)]),
            "date": time.strftime("%d %B %Y", time.gmtime()),
            "hardware": hardware(),
            "software": software(),
            "load": round(load, 2),
            "seconds": round(time.monotonic() - started),
            **asdict(result),
        }
        write_text(found.json, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return 0


def _without_json(given: Sequence[str]) -> list[str]:
    """Arguments but for the place of the file, which is nobody else's."""
    kept, skip = [], False
    for word in given:
        if not skip and not word.startswith("--json"):
            kept.append(word)
        skip = word == "--json"
    return kept
