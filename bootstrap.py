"""Makes the virtual environment that quickstart.py and run_tests.py run in. Standard library only."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
ENVIRONMENT = ROOT / ".venv"
ORACLES = ("hpsv2", "image-reward")


def ready(extra: str = "") -> Path:
    """Path of the folder with the environment's programs, made or brought up to date if need be.

    Args:
        extra: An optional dependency group of pyproject.toml to install too.
    """
    programs = ENVIRONMENT / ("Scripts" if os.name == "nt" else "bin")
    wanted = hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()
    stamp = ENVIRONMENT / f"installed-{extra or 'base'}.txt"
    if stamp.is_file() and stamp.read_text() == wanted:
        return programs
    started = time.monotonic()
    print(f"Installing into {ENVIRONMENT} (PyTorch is large: a few minutes the first time) ...", flush=True)
    python = str(_python(programs))
    target = f"{ROOT}[{extra}]" if extra else str(ROOT)
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--editable", target]
    if subprocess.run(command, check=False, cwd=ENVIRONMENT).returncode:
        sys.exit(f"the installation failed; the command was: {' '.join(command)}")
    if extra == "test":  # compared with, never used: their pins would break the environment, and tests do without them
        subprocess.run([*command[:-2], "--no-deps", *ORACLES], check=False, cwd=ENVIRONMENT)
    stamp.write_text(wanted)
    print(f"Installed in {time.monotonic() - started:.0f} s.", flush=True)
    return programs


def _python(programs: Path) -> Path:
    if sys.version_info < (3, 10):  # noqa: UP036  (this file must speak to older ones)
        sys.exit(f"Python 3.10 or newer is needed, this is {sys.version.split()[0]}")
    python = programs / ("python.exe" if os.name == "nt" else "python")
    if not python.exists():
        venv.create(ENVIRONMENT, with_pip=True)
    return python


def comfy_cli() -> Path:
    """comfy-cli's program, installed into the environment if need be; nothing else is."""
    programs = ENVIRONMENT / ("Scripts" if os.name == "nt" else "bin")
    comfy = programs / ("comfy.exe" if os.name == "nt" else "comfy")
    if not comfy.exists():
        print(f"Installing comfy-cli into {ENVIRONMENT} ...", flush=True)
        command = [str(_python(programs)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        if subprocess.run([*command, "comfy-cli"], check=False).returncode:
            sys.exit(f"the installation failed; the command was: {' '.join([*command, 'comfy-cli'])}")
    return comfy


def run(program: str, arguments: list[str], extra: str = "", **environment: str) -> int:
    """Run one of the environment's programs from the repository's root; returns its exit status."""
    path = ready(extra) / program
    # The root is a package, not a folder of modules: keep it off the path of what we start.
    env = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", **environment}
    return subprocess.run([str(path), *arguments], check=False, cwd=ROOT, env=env).returncode
