"""A real ComfyUI as a subprocess, in a folder of its own: nothing of the host's is read or written."""

from __future__ import annotations

import json
import os
import shutil
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from reward_lora import bootstrap_comfyui

from .listen import Listener

ROOT = Path(__file__).resolve().parents[2]
RUN_SECONDS = 900
"""Patience with a graph, of which most take a few seconds on an idle machine."""


def find_comfyui() -> tuple[Path, Path] | str:
    """ComfyUI's folder and its Python, or why there is none."""
    folder = bootstrap_comfyui.wanted_folder()
    if not (folder / "main.py").is_file():
        return f"no ComfyUI in {folder}; set COMFYUI_PATH to test the nodes in a real one"
    python = bootstrap_comfyui.find_python(folder)
    return (folder, python) if python else f"no Python next to {folder}; set COMFYUI_PYTHON to the one that runs it"


@dataclass
class Outcome:
    """How a prompt ended.

    Attributes:
        status: ``success``, ``error``, or ``refused`` before anything ran.
        message: What the user reads if it failed.
        outputs: What history lists, by node.
        cached: Nodes answered from the cache.
        interrupted: Whether the user's cancel ended it.
    """

    status: str
    message: str
    outputs: dict
    cached: list[str]
    interrupted: bool = False


class ComfyUI:
    """Speaks to a running server.

    Args:
        port: Of the server.
        base: Its base directory, with ``output`` and ``models`` in it.
        log: What it prints.
        hub: The port at which it looks for the Hugging Face Hub; nobody listens there but a test that wants to.
        process: Its number.
    """

    def __init__(self, port: int, base: Path, log: Path, hub: int, process: int) -> None:
        self.url, self.base, self.log, self.hub = f"http://127.0.0.1:{port}", base, log, hub
        self.port, self.output, self._process = port, base / "output", psutil.Process(process)

    def ask(self, path: str, data: dict | None = None) -> tuple[int, dict]:
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                status, text = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read()
        return status, json.loads(text) if text.strip().startswith((b"{", b"[")) else {}

    def queue(self, graph: dict, client: str = "") -> tuple[int, dict]:
        return self.ask("/prompt", {"prompt": graph, **({"client_id": client} if client else {})})

    def memory(self) -> int:
        """Resident bytes of the server."""
        return self._process.memory_info().rss

    def free(self, limit: float = 0.0) -> int:
        """What the button "Free model and node cache" does. Resident bytes once they are below a limit, or 5 s later.

        More than once, because the server sets two flags one by one and may wake for the first alone.
        """
        for _ in range(30 if limit else 5):
            self.ask("/free", {"unload_models": True, "free_memory": True})
            time.sleep(1)
            if self.memory() < limit:
                break
        return self.memory()

    def watch(self, graph: dict) -> tuple[Outcome, Listener]:
        """Run a graph, and hear what a browser would."""
        with Listener(self.port, "watcher") as listener:
            status, answer = self.queue(graph, "watcher")
            assert status == 200, answer
            return self.wait(answer["prompt_id"]), listener

    def wait(self, prompt_id: str) -> Outcome:
        deadline = time.monotonic() + RUN_SECONDS
        while time.monotonic() < deadline:
            entry = self.ask(f"/history/{prompt_id}")[1].get(prompt_id)
            if entry:
                messages = dict(entry["status"]["messages"])
                return Outcome(
                    entry["status"]["status_str"],
                    messages.get("execution_error", {}).get("exception_message", "").strip(),
                    entry["outputs"],
                    messages.get("execution_cached", {}).get("nodes", []),
                    "execution_interrupted" in messages,
                )
            time.sleep(0.1)
        raise TimeoutError(f"no answer after {RUN_SECONDS} s; the log ends:\n{self.log.read_text()[-2000:]}")

    def run(self, graph: dict) -> Outcome:
        status, answer = self.queue(graph)
        if status != 200:
            errors = [e for node in answer.get("node_errors", {}).values() for e in node["errors"]]
            message = "; ".join(f"{e['message']}: {e['details']}" for e in errors) or str(answer)
            return Outcome("refused", message, {}, [])
        return self.wait(answer["prompt_id"])

    def files(self, outcome: Outcome) -> list[Path]:
        """Every output file that history lists."""
        return bootstrap_comfyui.listed(outcome.outputs, self.output)


@pytest.fixture(scope="session")
def comfyui(tmp_path_factory):
    found = find_comfyui()
    if isinstance(found, str):
        pytest.skip(found)
    folder, python = found
    base = tmp_path_factory.mktemp("comfyui") / "deep" / "base"
    for name in ("custom_nodes", "user", "output", "temp", "input", "models/loras"):
        (base / name).mkdir(parents=True)
    bootstrap_comfyui.link_folder(base / "custom_nodes" / "reward-lora", ROOT)
    for helper in Path(__file__).parent.glob("helper_*.py"):
        shutil.copy(helper, base / "custom_nodes")
    elsewhere = base.parent / "elsewhere"
    elsewhere.mkdir()
    bootstrap_comfyui.link_folder(elsewhere / "my_wan", ROOT / "assets" / "tiny_wan")
    paths = base.parent / "extra_model_paths.yaml"
    paths.write_text(f"elsewhere:\n  video_models: {elsewhere.as_posix()}\n", encoding="utf-8")
    port, hub = bootstrap_comfyui.free_port(), bootstrap_comfyui.free_port()
    log = base.parent / "server.log"
    arguments = ["--cpu", "--base-directory", base, "--user-directory", base / "user", "--preview-method", "none"]
    arguments += ["--database-url", "sqlite:///:memory:", "--extra-model-paths-config", paths]
    environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{hub}"}  # never the real one
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    with bootstrap_comfyui.server(folder, python, port, list(map(str, arguments)), log, environment) as process:
        yield ComfyUI(port, base, log, hub, process.pid)
