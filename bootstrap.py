"""Makes the virtual environment that quickstart.py and run_tests.py run in. Standard library only."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
ENVIRONMENT = ROOT / ".venv"
ORACLES = ("hpsv2", "image-reward")


def program(name: str) -> Path:
    """Where the environment keeps one of its programs."""
    return ENVIRONMENT / ("Scripts" if os.name == "nt" else "bin") / (f"{name}.exe" if os.name == "nt" else name)


def ready(extra: str = "") -> None:
    """Make the environment, or bring it up to date, if need be.

    Args:
        extra: An optional dependency group of pyproject.toml to install too.
    """
    wanted = hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()
    stamp = ENVIRONMENT / f"installed-{extra or 'base'}.txt"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return
    started = time.monotonic()
    print(f"Installing into {ENVIRONMENT} (PyTorch is large: a few minutes the first time) ...", flush=True)
    _install("--editable", f"{ROOT}[{extra}]" if extra else str(ROOT))
    if extra == "test":  # compared with, never used: their pins would break the environment, and tests do without them
        subprocess.run([*_pip(), "--no-deps", *ORACLES], check=False, cwd=ENVIRONMENT)
    stamp.write_text(wanted, encoding="utf-8")
    print(f"Installed in {time.monotonic() - started:.0f} s.", flush=True)


def _install(*what: str) -> None:
    command = [*_pip(), *what]
    if subprocess.run(command, check=False, cwd=ENVIRONMENT).returncode:
        sys.exit(f"the installation failed; the command was: {' '.join(command)}")


def _pip() -> list[str]:
    """The command that installs, in an environment that is made if there is none."""
    if sys.version_info < (3, 10):  # noqa: UP036  (this file must speak to older ones)
        sys.exit(f"Python 3.10 or newer is needed, this is {sys.version.split()[0]}")
    python = program("python")
    if not python.exists():
        try:
            venv.create(ENVIRONMENT, with_pip=True)
        except subprocess.CalledProcessError:
            shutil.rmtree(ENVIRONMENT)  # it has no pip, and would look whole the next time
            sys.exit(f"{sys.executable} cannot make environments; on Debian and Ubuntu: apt install python3-venv")
    return [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]


def comfy_cli() -> Path:
    """comfy-cli's program, installed into the environment if need be; nothing else is."""
    comfy = program("comfy")
    if not comfy.exists():
        print(f"Installing comfy-cli into {ENVIRONMENT} ...", flush=True)
        _install("comfy-cli")
    return comfy


def run(name: str, arguments: list[str], extra: str = "", **environment: str) -> int:
    """Run one of the environment's programs from the repository's root; returns its exit status."""
    ready(extra)
    # The root is a package, not a folder of modules: keep it off the path of what we start.
    env = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1", **environment}
    with subprocess.Popen([str(program(name)), *arguments], cwd=ROOT, env=env) as process:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:  # it got the same and saves; subprocess.run would kill it after a quarter second
                continue
