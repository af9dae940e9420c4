"""Curves and clips in TensorBoard and Weights & Biases: read back from what their own libraries wrote."""

from __future__ import annotations

import builtins
import importlib.util
import io
import json
import time
from contextlib import closing
from dataclasses import replace

import pytest
from PIL import Image
from reward_lora.reward_models.mixture import Mixture
from reward_lora.training import trackers
from reward_lora.training.config import TrainConfig
from reward_lora.training.trainer import Trainer

from .test_trainer import PROMPTS, SamePictures


def read_tensorboard(folder):
    """Scalars ``{tag: {step: value}}`` and images ``{tag: {step: bytes}}``, as TensorBoard shows them."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
    events = accumulator(str(folder / "tensorboard"), size_guidance={"images": 0, "scalars": 0}).Reload()
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    images = {tag: {e.step: e.encoded_image_string for e in events.Images(tag)} for tag in events.Tags()["images"]}
    return scalars, images


def test_tensorboard_has_every_number_and_clip(wan, reward, config, tmp_path):
    config = replace(config, trackers=("tensorboard",), anchor=0.1)
    mixture = Mixture([reward, SamePictures()], [1.0, 0.5])
    heldout = [type("Held", (SamePictures,), {"name": "held"})()]
    trainer = Trainer(wan, mixture, PROMPTS, config, tmp_path / "run", heldout=heldout)
    events = list(trainer)
    scalars, images = read_tensorboard(trainer.folder)
    close = lambda pairs: [(step, pytest.approx(value, rel=1e-6)) for step, value in pairs]  # noqa: E731
    assert scalars["train/reward"] == close([(e.step, e.reward) for e in events[1:]])
    assert scalars["train/grad_norm"] == close([(e.step, e.grad_norm) for e in events[1:]])
    assert scalars["train/drift"] == close([(e.step, e.drift) for e in events[1:]])
    assert scalars["terms/toy"] == close([(e.step, e.terms["toy"]) for e in events[1:]])
    evaluated = [e for e in events if e.evaluation]
    assert scalars["evaluation/reward"] == close([(e.step, e.evaluation.reward) for e in evaluated])
    assert [step for step, _ in scalars["evaluation/held"]] == [0, 2, 4]
    assert scalars["guards/motion"] == close([(e.step, e.evaluation.findings["motion"]) for e in evaluated])
    assert len(images) == 2
    picture = Image.open(io.BytesIO(images["samples/00 one"][4]))
    assert (picture.format, picture.n_frames) == ("GIF", 3)


def test_a_resumed_run_goes_on_with_the_same_curve(wan, reward, config, tmp_path):
    """It is stopped after step 3 without its last checkpoint, as by a kill: step 3 is made, and shown, once."""
    config = replace(config, trackers=("tensorboard",), steps=6)
    trainer = Trainer(wan, reward, PROMPTS, config, tmp_path / "run")
    with closing(iter(trainer)) as events:
        for event in events:
            if event.step == 3:
                break
    (trainer.folder / "checkpoint-000003.safetensors").unlink()
    rest = list(Trainer(wan, reward, PROMPTS, config, trainer.folder))
    assert [event.step for event in rest] == [3, 4, 5, 6]
    scalars, _ = read_tensorboard(trainer.folder)
    assert [step for step, _ in scalars["train/reward"]] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in scalars["evaluation/reward"]] == [0, 2, 4, 6]


def test_weights_and_biases_offline(wan, reward, config, tmp_path, monkeypatch):
    """Every number lies in the file that is uploaded later; a resumed run has the same id and ends well."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = replace(config, trackers=("wandb",))
    trainer = Trainer(wan, reward, PROMPTS, config, tmp_path / "run")
    events = []
    with closing(iter(trainer)) as running:
        for event in running:
            events.append(event)
            if event.step == 2:
                break
    events += list(Trainer(wan, reward, PROMPTS, config, trainer.folder))
    files = sorted(trainer.folder.glob("wandb/offline-run-*/*.wandb"))
    identity = (trainer.folder / "wandb_run_id.txt").read_text()
    assert [path.name for path in files] == [f"run-{identity}.wandb"] * 2
    deadline = time.monotonic() + 120
    while len(read_wandb(files)[1]) < 2 and time.monotonic() < deadline:  # its own process still writes
        time.sleep(0.1)
    history, exits, project = read_wandb(files)
    rewards = {row["step"]: row["train/reward"] for row in history if "train/reward" in row}
    assert rewards == {e.step: pytest.approx(e.reward) for e in events[1:]}
    assert {row["step"] for row in history if "evaluation/reward" in row} == {0, 2, 4}
    assert {row["step"] for row in history if any(key.startswith("samples/01") for key in row)} == {0, 2, 4}
    assert len(list(trainer.folder.glob("wandb/offline-run-*/files/media/videos/samples/*.mp4"))) == 6
    assert (exits, project) == ([0, 0], "reward-lora")


def read_wandb(paths):
    """Rows of history, exit codes and the project of offline runs."""
    from wandb.proto.wandb_internal_pb2 import Record

    history, exits, project = [], [], ""
    for path in paths:
        for data in leveldb_log(path.read_bytes()):
            record = Record.FromString(data)
            if record.HasField("history"):
                items = record.history.item
                history.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
            elif record.HasField("exit"):
                exits.append(record.exit.exit_code)
            elif record.HasField("run"):
                project = record.run.project
    return history, exits, project


def leveldb_log(content):
    """Records of a LevelDB log, which wandb's files are behind 7 bytes: blocks of 32 KiB with parts of records, each
    behind a checksum (4 bytes), its length (2) and its kind (1): 1 whole, 2 first, 3 middle, 4 last."""
    place, record = 7, b""
    while place < len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6 : place + 7]
        if not kind or place + 7 + length > len(content):  # not yet written to its end
            return
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (b"\x01", b"\x04"):
            yield record
            record = b""


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_said_before_any_work(name, wan, reward, config, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None if module == name else found(module))
    with pytest.raises(ValueError, match=f"trackers: {name} needs the Python package {name}.*-m pip install {name}"):
        Trainer(wan, reward, PROMPTS, replace(config, trackers=(name,)), tmp_path / "run")


def test_nothing_is_imported_that_was_not_asked_for(wan, reward, config, tmp_path, monkeypatch):
    original = builtins.__import__

    def watched(name, *rest):
        assert not name.startswith(("wandb", "tensorboard", "torch.utils.tensorboard"))
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", watched)
    list(Trainer(wan, reward, PROMPTS, replace(config, steps=1, sample_every=0), tmp_path / "run"))


def test_a_tracker_that_fails_does_not_end_the_run(wan, reward, config, tmp_path, monkeypatch, caplog):
    class Broken:
        def __init__(self, *arguments):
            pass

        def scalars(self, values, step):
            if step == 2:
                raise ConnectionError("the network is down")

    monkeypatch.setitem(trackers.KINDS, "wandb", Broken)
    config = replace(config, trackers=("wandb",), sample_every=0)
    assert len(list(Trainer(wan, reward, PROMPTS, config, tmp_path / "run"))) == 5
    assert caplog.text.count("wandb takes nothing more (ConnectionError: the network is down)") == 1


def test_trackers_are_spelled_as_a_list_or_as_one_line():
    assert TrainConfig.from_dict({"trackers": "tensorboard, wandb"}).trackers == ("tensorboard", "wandb")
    assert TrainConfig.from_dict({"trackers": ["wandb"]}).fingerprint() == TrainConfig().fingerprint()
    with pytest.raises(ValueError, match="trackers must be among tensorboard, wandb, got 'mlflow'"):
        TrainConfig(trackers=("mlflow",))
