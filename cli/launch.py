"""Starts ``python launch.py JOB``: one process of a run, from this very folder, wherever it lies and whatever its name.

ComfyUI keeps packs in folders that are no Python packages by their names, so ``python -m`` would not find this one.
"""

import importlib.util
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGE = "reward_lora"


def load_package() -> None:
    """Make the pack importable by its name alone: its modules must not stand for others of their names."""
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() not in (HERE, HERE.parent)]
    spec = importlib.util.spec_from_file_location(
        PACKAGE, HERE.parent / "__init__.py", submodule_search_locations=[str(HERE.parent)]
    )
    sys.modules[PACKAGE] = package = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)


if __name__ == "__main__":
    load_package()
    sys.exit(importlib.import_module(f"{PACKAGE}.cli.worker").main(Path(sys.argv[1])))
