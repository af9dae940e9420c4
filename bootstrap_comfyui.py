"""Takes a ComfyUI, or has comfy-cli install one, and runs a workflow of the pack in it. Standard library only."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent
PROBE = "RewardLoraTrainRewardLora"
START_SECONDS = 600
"""How long a server may take to start: the first start on a slow disk, with many other packs, takes minutes."""
ALONE = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP} if os.name == "nt" else {"start_new_session": True}
"""Starts a process that the terminal's Ctrl-C does not reach."""
CANCELLED = 130
"""What ``comfy run`` ends with when its workflow is cancelled."""


def wanted_folder() -> Path:
    """Where ComfyUI is, or belongs: ``COMFYUI_PATH``, or ``~/ComfyUI``."""
    return Path(os.environ.get("COMFYUI_PATH") or "~/ComfyUI").expanduser().absolute()


def find_python(folder: Path) -> Path | None:
    """The Python that runs a ComfyUI: ``COMFYUI_PYTHON``, or that of a virtual environment or of the portable build."""
    if os.environ.get("COMFYUI_PYTHON"):
        return Path(os.environ["COMFYUI_PYTHON"])
    places = [folder / name / part for name in (".venv", "venv") for part in ("bin/python", "Scripts/python.exe")]
    places.append(folder.parent / "python_embeded" / "python.exe")
    return next((python for python in places if python.exists()), None)


def install(comfy: Path, folder: Path) -> Path:
    """Have comfy-cli clone ComfyUI and its requirements; gives its folder."""
    try:
        socket.create_connection(("github.com", 443), timeout=10).close()
    except OSError:
        sys.exit(f"there is no ComfyUI in {folder}, and github.com cannot be reached to install one; set COMFYUI_PATH")
    if shutil.which("git") is None:
        sys.exit(f"there is no ComfyUI in {folder}, and installing one needs git; install git, or set COMFYUI_PATH")
    if shutil.which("nvidia-smi"):
        device = "--nvidia"
    elif shutil.which("rocm-smi"):
        device = "--amd"
    else:
        device = "--m-series" if (sys.platform, platform.machine()) == ("darwin", "arm64") else "--cpu"
    print(f"Installing ComfyUI into {folder} with comfy-cli, {device} ...", flush=True)
    # Without these, comfy-cli makes a virtual environment of ComfyUI's own.
    env = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "CONDA_PREFIX")} | {"DO_NOT_TRACK": "1"}
    command = [str(comfy), "--skip-prompt", f"--workspace={folder}", "install", device]
    if subprocess.run(command, check=False, env=env).returncode:
        sys.exit(f"the installation failed; the command was: {' '.join(command)}")
    for place in (folder, folder / "ComfyUI"):
        if (place / "main.py").is_file():
            return place
    sys.exit(f"comfy-cli ended well, but there is no main.py in {folder}")


def link_folder(place: Path, target: Path) -> None:
    """A symbolic link, or on Windows, where that needs a right, a junction."""
    if sys.platform == "win32":
        import _winapi

        _winapi.CreateJunction(str(target), str(place))
    else:
        place.symlink_to(target, target_is_directory=True)


def link(custom_nodes: Path) -> Path:
    """Put the pack into a folder of custom nodes, where it stays if it is there already; gives its place."""
    custom_nodes.mkdir(parents=True, exist_ok=True)
    for entry in custom_nodes.iterdir():
        if entry.is_dir() and entry.resolve() == ROOT:
            return entry
    place = custom_nodes / "reward-lora"
    if place.exists() or place.is_symlink():
        sys.exit(
            f"{place} is there already, and is another copy of the pack; remove it, or run the quickstart.py in it"
        )
    link_folder(place, ROOT)
    print(f"Linked {place} -> {ROOT}", flush=True)
    return place


def add_requirements(python: Path) -> None:
    """Install the pack's requirements into ComfyUI's Python, as ComfyUI-Manager would, if one of them is missing."""
    check = "import av, diffusers, ftfy, matplotlib, open_clip, peft, sentencepiece, transformers, tyro"
    if subprocess.run([str(python), "-c", check], check=False, capture_output=True).returncode == 0:
        return
    command = [str(python), "-m", "pip", "install", "--quiet", "-r", str(ROOT / "requirements.txt")]
    print("Installing the pack's requirements into ComfyUI's Python ...", flush=True)
    if subprocess.run(command, check=False).returncode:
        sys.exit(f"the installation failed; the command was: {' '.join(command)}")


def _has_gpu(python: Path) -> bool:
    check = "import torch; assert torch.cuda.is_available() or torch.backends.mps.is_available()"
    return subprocess.run([str(python), "-c", check], check=False, capture_output=True).returncode == 0


def _ask(url: str) -> dict:
    with urllib.request.urlopen(url, timeout=60) as answer:
        return json.load(answer)


@contextmanager
def server(
    folder: Path, python: Path, port: int, arguments: Sequence[str], log: Path, env: Mapping[str, str] = os.environ
) -> Iterator[subprocess.Popen]:
    """A ComfyUI that answers at a port and knows the pack; leaving stops it. Ends the program if it does not start.

    Args:
        folder: ComfyUI's own.
        python: That runs it.
        port: To listen at.
        arguments: More for its ``main.py``.
        log: What it prints is written there.
        env: Its environment, but for what would change where it finds its modules.
    """
    command = [str(python), str(folder / "main.py"), "--port", str(port), "--disable-auto-launch", *arguments]
    env = {k: v for k, v in env.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")} | {"PYTHONUTF8": "1"}
    with log.open("wb") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, cwd=folder, env=env, **ALONE)
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                known = _ask(f"http://127.0.0.1:{port}/object_info/{PROBE}")
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    sys.exit(f"ComfyUI did not start; its log ends:\n{_tail(log)}")
                time.sleep(0.3)
        if not known:
            sys.exit(f"ComfyUI runs, but could not import the pack; see {log}")
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def free_port(*wanted: int) -> int:
    """The first of the wanted ports that is free, or any."""
    for port in (*wanted, 0):
        with socket.socket() as free:
            try:
                free.bind(("127.0.0.1", port))
            except OSError:
                continue
            return free.getsockname()[1]
    sys.exit("no free port was found for ComfyUI")


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-30:])


def listed(outputs: Mapping[str, dict], output: Path) -> list[Path]:
    """The files in the output folder among the outputs of a prompt, by node, as a server's history has them."""
    files = [f for node in outputs.values() for entries in node.values() for f in entries]
    files = [f for f in files if isinstance(f, dict) and f.get("type") == "output"]
    return [output / f["subfolder"] / f["filename"] for f in files]


def _follow(command: Sequence[str], url: str) -> int:
    """Run comfy-cli to its end. Ctrl-C, which it would not pass on, cancels the workflow: a training then saves."""
    with subprocess.Popen(command, env={**os.environ, "DO_NOT_TRACK": "1"}, **ALONE) as process:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                print("Cancelling ...", flush=True)
                urllib.request.urlopen(f"{url}/interrupt", data=b"", timeout=60).close()
            except BaseException:
                process.terminate()
                raise


def run(comfy: Path, workflow: Path, *, base: Path | None, port: int, once: bool, arguments: Sequence[str]) -> int:
    """Everything from nothing to the graph; returns the exit status of ``comfy run``.

    Args:
        comfy: comfy-cli's program.
        workflow: What to run, in ComfyUI's format or its API's.
        base: ComfyUI's ``--base-directory``, if it is not its own folder.
        port: Of the server; 0 takes 8188 or a free one.
        once: Stop the server after the run, instead of at Ctrl-C.
        arguments: More for ComfyUI's ``main.py``.
    """
    folder = wanted_folder()
    if not (folder / "main.py").is_file():
        folder = install(comfy, folder)
    python = find_python(folder)
    if python is None:
        sys.exit(f"no Python of {folder} was found; set COMFYUI_PYTHON to the one that runs ComfyUI")
    base = base.absolute() if base else folder
    link(base / "custom_nodes")
    add_requirements(python)
    arguments = [*arguments, *(() if base == folder else ("--base-directory", str(base)))]
    if "--cpu" not in arguments and not _has_gpu(python):
        arguments.append("--cpu")
    port = port or free_port(8188)
    url, log = f"http://127.0.0.1:{port}", ROOT / "outputs" / "comfyui.log"
    log.parent.mkdir(exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left running
    print(f"Starting ComfyUI; its log is {log} ...", flush=True)
    with server(folder, python, port, arguments, log):
        command = [str(comfy), "--skip-prompt", "--no-json", "run", "--workflow", str(workflow), "--wait"]
        command += ["--host", "127.0.0.1", "--port", str(port)]
        print(f"Running {workflow.name} ...", flush=True)
        status = _follow(command, url)
        if status == CANCELLED:
            print("Cancelled; the same command goes on with the run.", flush=True)
            return status
        if status:
            print(f"comfy run ended with {status}; ComfyUI's log ends:\n{_tail(log)}", flush=True)
        else:
            newest = list(_ask(f"{url}/history?max_items=1").values())[-1]
            print("Files made:", *dict.fromkeys(listed(newest["outputs"], base / "output")), sep="\n  ", flush=True)
        if once:
            return status
        print(
            f"\nOpen {url} in a browser; the workflows are under Templates, reward-lora. Ctrl-C stops ComfyUI.",
            flush=True,
        )
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            return status
