"""A published model fetched by its name: only what is read, with progress, resumed, and in a sentence when offline."""

from __future__ import annotations

import pytest
from reward_lora.cli import main
from reward_lora.tests.families import wan as family
from reward_lora.tests.mirror import mirror
from reward_lora.video_models import BASE_MODELS, UNFINISHED, WeightFileError, load_video_model

NAME = "Wan2.1-T2V-1.3B"
NOT_READ = ("README.md", "assets/logo.png", "model.onnx", "google/umt5-xxl.zip")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A mirror with the model of that name, tiny, and things beside it that nobody reads."""
    folder = tmp_path / "published"
    folder.mkdir()
    family.write(folder, "2.1 original t2v")
    for name in NOT_READ:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text("not read")
    with mirror(folder, BASE_MODELS[NAME].repository) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        yield server


def test_a_model_is_fetched_by_name_and_only_what_is_read(hub, tmp_path):
    told = []
    here = tmp_path / "models"
    model = load_video_model(NAME, search=[here], download=True, progress=lambda *count: told.append(count))
    assert model.spec.name == NAME
    done, total = told[-1]
    assert done == total == sum(path.stat().st_size for path in here.rglob("*") if path.is_file())
    assert done > 10_000
    fetched = {path.relative_to(here / NAME).as_posix() for path in here.rglob("*") if path.is_file()}
    assert {"config.json", f"{family.VAE_FILE}.pth", "google/umt5-xxl/tokenizer.json"} <= fetched
    assert not fetched & set(NOT_READ)

    asked = len(hub.asked)
    assert load_video_model(BASE_MODELS[NAME].repository, search=[here], download=True).spec.name == NAME
    assert len(hub.asked) == asked, "what is here needs no network"


def test_a_download_that_was_cancelled_goes_on(hub, tmp_path):
    class Cancelled(Exception):
        pass

    def cancel(done, total):
        if done > total / 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        load_video_model(NAME, search=[tmp_path], download=True, progress=cancel)
    with pytest.raises(WeightFileError, match=f"{NAME} is only partly here .*allow the download of about 18 GB"):
        load_video_model(NAME, search=[tmp_path])
    hub.asked.clear()
    assert load_video_model(NAME, search=[tmp_path], download=True).spec.name == NAME
    assert not (tmp_path / NAME / UNFINISHED).exists()
    assert len(hub.asked) < len(list((tmp_path / NAME).rglob("*")))


def test_offline_the_sentence_names_address_and_target(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(WeightFileError, match="HF_HUB_OFFLINE is set") as caught:
        load_video_model(NAME, search=[tmp_path], download=True)
    message = str(caught.value)
    assert BASE_MODELS[NAME].repository in message
    assert str(tmp_path / NAME) in message
    assert "\n" not in message


def test_without_a_folder_for_models_nothing_is_fetched(hub):
    with pytest.raises(WeightFileError, match="put the files of https://huggingface.co/Wan-AI/"):
        load_video_model(NAME, download=True)
    assert not hub.asked


def test_the_command_line_fetches_on_request(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["generate", "--prompt", "a red circle", "--model", NAME, "--width", "32", "--height", "32"]
    command += ["--frames", "5", "--steps", "1", "--guidance-scale", "1", "--output-dir", "out", "--device", "cpu"]
    assert main(command) != 0
    assert "allow the download" in capsys.readouterr().err
    assert main([*command, "--download"]) == 0
    assert (tmp_path / "models" / "video_models" / NAME / "config.json").is_file()
    assert list((tmp_path / "out").glob("*.mp4"))
