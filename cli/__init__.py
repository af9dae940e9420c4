"""The command line: the same engine the nodes drive."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import Any

import torch
import tyro

from ..training.config import TrainConfig
from ..training.events import TrainingStopped
from ..video_models import BUILTIN
from .lora import Catalog, Convert, Inspect, Merge
from .lora_sweep import Sweep
from .score import Score
from .shared import read_recipe
from .train import Demo, Train
from .use import Generate, Selfcheck

COMMANDS = {
    "demo": Demo,
    "train": Train,
    "generate": Generate,
    "score": Score,
    "inspect": Inspect,
    "convert": Convert,
    "merge": Merge,
    "catalog": Catalog,
    "sweep": Sweep,
    "selfcheck": Selfcheck,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, 1 failed, 2 bad input, 130 interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        if not arguments or arguments[0] not in COMMANDS:
            print(__doc__, *(f"  {name:10} {c.__doc__.splitlines()[0]}" for name, c in COMMANDS.items()), sep="\n")
            print("\nreward-lora COMMAND --help tells the rest.")
            return 0 if arguments in ([], ["--help"], ["-h"]) else 2
        command, rest = COMMANDS[arguments[0]], arguments[1:]
        default = None
        if command is Train and (recipe := _recipe_of(rest)):
            data = read_recipe(recipe)
            default = Train(config=TrainConfig.from_dict(data.pop("config", {})), recipe=recipe, **_checked(data))
        return tyro.cli(command, args=rest, default=default, prog=f"reward-lora {arguments[0]}").run()
    except torch.OutOfMemoryError as error:
        advice = "try fewer or smaller frames, a smaller batch_size, or --memory small"
        print(f"error: the device's memory is too small ({str(error).splitlines()[0]}); {advice}", file=sys.stderr)
        return 2
    except (ValueError, OSError, TrainingStopped) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _recipe_of(arguments: Sequence[str]) -> str:
    """The recipe asked for; without one, the built-in model is trained by its own."""
    scout = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    scout.add_argument("--recipe", default="")
    scout.add_argument("--model", default=BUILTIN)
    known, _ = scout.parse_known_args(arguments)
    return known.recipe or (BUILTIN if known.model == BUILTIN else "")


def _checked(data: dict[str, Any]) -> dict[str, Any]:
    allowed = ("model", "reward", "dtype")
    unknown = sorted(set(data) - {*allowed, "config", "about"})
    if unknown:
        raise ValueError(f"unknown recipe entry {unknown[0]!r}; known are about, config, {', '.join(allowed)}")
    return {key: value for key, value in data.items() if key in allowed}
