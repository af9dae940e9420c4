"""One process of a run on several devices, as :mod:`..training.workers` starts it."""

from __future__ import annotations

import logging
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from ..lora.adapter import applied
from ..reward_models.protocol import Reward
from ..training import learner
from ..training.distributed import Group, PeerLost, joined, own_device
from ..training.events import TrainingStopped
from ..training.gradient import silent
from ..training.job import Job, RewardSource
from ..training.sharding import mesh_of, shard
from ..training.trainer import Trainer
from ..training.wire import Wire, pack
from ..video_models import ModelFiles
from ..video_models.protocol import Tick, VideoModel
from .shared import find_reward, open_model


def main(path: Path) -> int:
    """Make the run of a job together with the other workers. Returns the exit status."""
    wire = Wire()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        _work(path, wire)
    except KeyboardInterrupt:
        return 130
    except PeerLost as error:
        wire.send("error", error="peer", text=str(error))
    except TrainingStopped as error:
        wire.send("error", error="stopped", text=str(error))
    except (ValueError, OSError) as error:
        traceback.print_exc()
        wire.send("error", error="refused", text=str(error))
    except BaseException as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines() or ["no message"]
        wire.send("error", error="failed", text=f"{type(error).__name__}: {lines[0]}")
    else:
        return 0
    return 1


def _work(path: Path, wire: Wire) -> None:
    job = Job.read(path)
    device = own_device(job.device)
    with joined(device) as group:
        wire.leads = group.leads
        if group.leads:
            logging.getLogger().addHandler(wire)
        say = (lambda text: wire.send("say", text=text)) if group.leads else silent
        with trainer_of(job, group, device, wire, say) as trainer:
            paths = {expert: str(path) for expert, path in trainer.lora_paths.items()}
            for line in announcement(trainer):
                say(line)
            wire.at_work = True
            if group.leads:
                wire.send("ready", reward=trainer.reward.name, lora_paths=paths)
            for event in trainer:
                if group.leads:
                    wire.send("event", event=pack(event, path.parent))
            if group.leads:
                wire.send("result", paths=[str(path) for path in trainer.result_paths])


@contextmanager
def trainer_of(
    job: Job, group: Group, device: str, tick: Tick = silent, say: Callable[[str], None] = silent
) -> Iterator[Trainer]:
    """The trainer of a job in this process, with the LoRAs in the model that stay applied.

    Args:
        job: What to train.
        group: The processes that do.
        device: Where this one computes.
        tick: Of the trainer.
        say: Gets a line for each LoRA, and what the run will do.
    """
    mesh = mesh_of(group, device) if job.config.shard else None

    def load() -> VideoModel:
        source = job.model
        files = source.source
        wanted = files if isinstance(files, str) else ModelFiles(**{role: Path(file) for role, file in files.items()})
        model = open_model(wanted, dtype=source.dtype, download=source.download, search=source.search)
        if mesh is not None:
            shard(model, mesh)
        return model

    model = group.in_turn(load, one_by_one=job.config.shard)
    reward = _reward(job.reward, job.model.download)
    with applied(model, job.uses) as reports, _listening() if group.leads else nullcontext():
        for line in reports:
            say(line)
        trainer = Trainer(
            model,
            reward,
            job.examples,
            job.config,
            job.folder,
            sample_prompts=job.samples,
            heldout=[_reward(judge, job.model.download) for judge in job.heldout],
            start=job.start,
            group=group,
            device=device,
            cache=job.cache,
            tick=tick,
        )
        yield trainer


@contextmanager
def _listening() -> Iterator[None]:
    """While what a run says of the memory it needs is wanted."""
    level = learner.log.level
    learner.log.setLevel(logging.INFO)
    try:
        yield
    finally:
        learner.log.setLevel(level)


def announcement(trainer: Trainer) -> list[str]:
    """What a run is going to do, in words."""
    steps, model = trainer.config.steps, trainer.model.spec.name
    return [
        f"{steps} step{'s' * (steps != 1)} of {model} towards {trainer.reward.name}, files in {trainer.folder}",
        trainer.batch_in_words,
    ]


def _reward(source: RewardSource, download: bool) -> Reward:
    path, search = Path(source.path) if source.path else None, [Path(folder) for folder in source.search]
    return find_reward(source.text, path, "cpu", download=download, search=search)
