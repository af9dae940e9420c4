"""A run on several devices, started from one process: a worker for each, and their leader's events as they come."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import torch

from .events import Evaluation, StepEvent, TrainingStopped
from .gradient import silent
from .job import Job
from .run_folder import RunFolder, best_path
from .wire import GRACE, unpack

log = logging.getLogger(__name__)

LAUNCH = Path(__file__).resolve().parents[1] / "cli" / "launch.py"
BEAT = 0.25
"""Seconds between looks at whether the user has cancelled."""
SETTLE = 3.0
"""Seconds that the other workers have to end once the leader has."""


@dataclass
class Worker:
    """One process of the run.

    Attributes:
        process: As the system knows it; the leader's number is 0.
        log: Where its errors go.
        error: What it said of its end: ``refused``, ``stopped``, ``failed`` or ``peer``, and a sentence.
        ended: Whether it is our doing that it ends.
    """

    process: subprocess.Popen
    log: Path
    error: tuple[str, str] | None = None
    ended: bool = False


@dataclass
class Workers:
    """Trains like :class:`.trainer.Trainer`, in a process for each device. Iterate to train; leave the loop to stop.

    The leader writes the run's folder, and a checkpoint when it is stopped: by leaving the loop, by an exception raised
    in ``tick`` or ``beat``, or because this process has gone. Each process loads the model itself, so nothing of this
    one's should be on the devices meanwhile. While it runs, and after a failure, ``folder/workers`` holds the job and
    one log a process.

    Args:
        job: What to train.
        processes: How many; on GPUs, one for each of the first ones.
        tick: Called before every call of a large model in the leader; may raise to stop.
        beat: Called several times a second; may raise to stop.
        say: Gets a line now and then.
        evaluate: What :meth:`.trainer.Trainer.evaluate` does, in this process.

    Attributes:
        files: The run's folder, as far as the workers have come. Known, like ``lora_paths``, once they have begun.
        lora_paths: The LoRA of each trained network.
        result_paths: What the run gives; see :attr:`.trainer.Trainer.result_paths`. Known at its end.

    Raises:
        ValueError: More processes than GPUs, or another kind of device; while iterating, what a worker refuses.
        TrainingStopped: While iterating: a worker has failed; unless it was the leader that was killed, what was
            learned up to then is saved.
    """

    job: Job
    processes: int
    tick: Callable[[str], None] = silent
    beat: Callable[[], object] = bool
    say: Callable[[str], None] = log.info
    evaluate: Callable[[], Evaluation] | None = None
    files: RunFolder | None = None
    lora_paths: dict[str, Path] = field(default_factory=dict)
    result_paths: list[Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise ValueError(f"devices must be at least 1, got {self.processes}")
        if self.job.device not in ("cpu", "cuda"):
            raise ValueError(f"several devices train on CUDA's GPUs or on the CPU, not on {self.job.device}")
        if self.job.device == "cuda" and self.processes > torch.cuda.device_count():
            raise ValueError(
                f"devices must be at most {torch.cuda.device_count()}, the GPUs that are visible here, "
                f"got {self.processes}"
            )

    @property
    def folder(self) -> Path:
        return self.job.folder.resolve()

    @property
    def kept_paths(self) -> list[Path]:
        """The LoRAs of the best evaluation that are there."""
        return [path for path in map(best_path, self.lora_paths.values()) if path.is_file()]

    def __iter__(self) -> Iterator[StepEvent]:
        home = self.folder / "workers"
        shutil.rmtree(home, ignore_errors=True)
        messages: SimpleQueue[tuple[int, dict[str, Any] | None]] = SimpleQueue()
        workers: list[Worker] = []
        self.files, self.lora_paths = None, {}
        with ExitStack() as undo:
            undo.callback(_clear, home, workers)
            undo.callback(self._end, workers)
            job = self.job.write(home)
            store = _store(self.processes)
            for rank in range(self.processes):
                workers.append(self._start(rank, store.port, job, messages))
            running = set(range(self.processes))
            while running and not any(worker.error for worker in workers):
                self.beat()
                try:
                    rank, message = messages.get(timeout=BEAT)
                except Empty:
                    continue
                if message is None:
                    running.discard(rank)
                    workers[rank].error = workers[rank].error or _death(rank, workers)
                elif message["kind"] == "event":
                    self.files.read()
                    yield unpack(message["event"])
                else:
                    self._take(workers[rank], message)
            failed = bool(running) or any(worker.error for worker in workers)
            self._end(workers)
            with suppress(Empty):  # what they said at their end
                while True:
                    rank, message = messages.get(timeout=BEAT)
                    if message and message["kind"] == "error":
                        self._take(workers[rank], message)
            if failed:
                raise _reason(workers)
            undo.callback(shutil.rmtree, home, ignore_errors=True)

    def _start(self, rank: int, port: int, job: Path, messages: SimpleQueue) -> Worker:
        log_file = job.with_name(f"process-{rank}.log")
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self.processes),
            "LOCAL_WORLD_SIZE": str(self.processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # this process keeps it, as torchrun does
            "TORCHELASTIC_RESTART_COUNT": "0",
            "PYTHONUNBUFFERED": "1",
        }
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.processes)))
        if sys.platform == "linux":
            environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all are on this machine, whatever its name means
        command = [sys.executable, *(["-s"] if sys.flags.no_user_site else []), str(LAUNCH), str(job)]
        # A group of its own: a Ctrl-C in the terminal is this process's to pass on.
        own = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP} if os.name == "nt" else {"start_new_session": True}
        with log_file.open("wb") as errors:
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, **own
            )

        def read() -> None:
            for line in process.stdout:
                with suppress(ValueError):  # the last line of one that was killed while it wrote
                    messages.put((rank, json.loads(line)))
            process.wait()
            messages.put((rank, None))

        threading.Thread(target=read, daemon=True).start()
        return Worker(process, log_file)

    def _take(self, worker: Worker, message: dict[str, Any]) -> None:
        kind = message["kind"]
        if kind == "ready":
            self.files = RunFolder(self.folder, message["reward"])
            self.lora_paths = {expert: Path(path) for expert, path in message["lora_paths"].items()}
        elif kind == "tick":
            self.tick(message["phase"])
        elif kind == "result":
            self.result_paths = [Path(path) for path in message["paths"]]
        elif kind == "say":
            self.say(message["text"])
        elif kind == "log":
            if message["level"] < logging.WARNING:
                self.say(message["text"])
            else:
                log.log(message["level"], message["text"])
        else:
            worker.error = (message["error"], message["text"])

    def _end(self, workers: Sequence[Worker]) -> None:
        """Let the leader save and end, then the others; those that do not are killed, which is safe at any time."""
        try:
            if not workers:
                return
            leader, *others = workers
            if self.files is None:  # still loading: nothing to save
                return
            if not _ends(leader, GRACE):
                log.warning("the leading process did not stop in %.0f s; what came after its last checkpoint is lost",
                            GRACE)  # fmt: skip
            deadline = time.monotonic() + SETTLE
            for worker in others:
                _ends(worker, max(0.0, deadline - time.monotonic()))
        finally:
            for worker in workers:
                if worker.process.poll() is None:
                    worker.ended = True
                    worker.process.kill()
                    worker.process.wait()
                with suppress(OSError):
                    worker.process.stdin.close()


def _clear(home: Path, workers: Sequence[Worker]) -> None:
    """Leave nothing that nobody needs."""
    if not any(worker.error for worker in workers):
        shutil.rmtree(home, ignore_errors=True)


def _store(processes: int) -> torch.distributed.TCPStore:
    """Where the workers find each other, at a free port of this machine."""
    if os.name == "nt":  # whose builds of PyTorch lack it
        os.environ.setdefault("USE_LIBUV", "0")
    libuv = os.environ.get("USE_LIBUV", "1") == "1"
    return torch.distributed.TCPStore("127.0.0.1", 0, processes, True, wait_for_workers=False, use_libuv=libuv)


def _ends(worker: Worker, seconds: float) -> bool:
    """Tell a worker to end, and wait for it."""
    with suppress(OSError):
        worker.process.stdin.close()
    try:
        worker.process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _death(rank: int, workers: Sequence[Worker]) -> tuple[str, str] | None:
    """What became of a worker that ended without a word."""
    status = workers[rank].process.returncode
    if status == 0 or workers[rank].ended:
        return None
    if status < 0:
        name = signal.Signals(-status).name
        memory = ", perhaps because main memory ran out" if name == "SIGKILL" else ""
        return "failed", f"it was ended by {name}{memory}"
    return "failed", f"it ended with status {status}"


def _reason(workers: Sequence[Worker]) -> Exception:
    """The first cause of a failure, in a sentence."""
    for rank, worker in enumerate(workers):
        if worker.error is None and worker.process.returncode < 0:
            worker.error = _death(rank, workers)
    order = ("refused", "stopped", "failed", "peer")
    found = [(order.index(worker.error[0]), rank) for rank, worker in enumerate(workers) if worker.error]
    kind, rank = min(found)
    text = workers[rank].error[1]
    if order[kind] == "refused":
        return ValueError(text)
    if order[kind] == "failed":
        orderly = workers[0].process.returncode >= 0 and not workers[0].ended
        safe = "what was learned is saved" if orderly else "what was learned up to the last checkpoint is saved"
        text = (
            f"process {rank} of {len(workers)} (counted from 0) failed: {text}; the whole story is in "
            f"{workers[rank].log}; {safe}: run the same again to go on"
        )
    return TrainingStopped(text)
