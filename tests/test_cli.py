"""The command line: what it does, and what bad input is told, always without a traceback."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from reward_lora import cli
from reward_lora.cli.shared import ROOT
from reward_lora.selfcheck import exactness
from reward_lora.training.config import TrainConfig
from safetensors.torch import save_file

FIXTURES = Path(__file__).parent / "fixtures"


def run(capsys, *arguments):
    try:
        status = cli.main([str(a) for a in arguments])
    except SystemExit as exit:
        status = exit.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_help_teaches(capsys):
    status, out, _ = run(capsys)
    assert status == 0
    assert all(name in out for name in ("train", "generate", "score", "inspect", "selfcheck"))
    status, out, _ = run(capsys, "train", "--help")
    assert status == 0
    for field in dataclasses.fields(TrainConfig):
        name = field.name.replace("_", "-")
        assert f"--{name}" in out, name
    assert "Steps over which the learning rate rises" in re.sub(r"[\s│]+", " ", out)


@pytest.fixture
def short_proof(monkeypatch):
    """One schedule of the exactness proof, which ``test_gradient`` makes in full."""
    monkeypatch.setattr(exactness, "SCHEDULES", {"all steps": exactness.SCHEDULES["all steps"]})


def test_selfcheck_on_the_fixtures(capsys, short_proof):
    status, out, _ = run(capsys, "selfcheck", "--fixtures", FIXTURES)
    lines = out.splitlines()
    assert status == 0
    for name in ("wan_t2v", "wan_vae", "wan_train_step", "rewards"):
        (line,) = [line for line in lines if line.startswith(name)]
        assert " ok " in line


def test_selfcheck_fails_loudly(capsys, short_proof, tmp_path):
    for name in ("meta.json", "io.safetensors", "transformer.safetensors", "lora_videox_fun.safetensors"):
        (tmp_path / name).write_bytes((FIXTURES / "wan_t2v" / name).read_bytes())
    from safetensors.torch import load_file

    weights = load_file(tmp_path / "transformer.safetensors")
    weights["blocks.0.ffn.0.weight"] *= 1.05
    save_file(weights, tmp_path / "transformer.safetensors")
    status, out, _ = run(capsys, "selfcheck", "--fixtures", tmp_path)
    assert status == 1
    assert "FAIL" in out
    (tmp_path / "io.safetensors").unlink()
    status, out, _ = run(capsys, "selfcheck", "--fixtures", tmp_path)
    assert status == 1
    assert "io.safetensors is missing" in out
    status, _, err = run(capsys, "selfcheck", "--fixtures", tmp_path / "nothing")
    assert status == 2
    assert "holds no fixture" in err


def bad_lora(folder: Path) -> Path:
    tensors = {f"diffusion_model.blocks.0.self_attn.q.lora_{p}.weight": torch.zeros(s) for p, s in
               (("A", (4, 1536)), ("B", (1536, 4)))}  # fmt: skip
    save_file(tensors, folder / "big.safetensors")
    return folder / "big.safetensors"


BAD = {
    "unknown command": (("trian",), "COMMAND --help"),
    "name outside": (("train", "--name", "../../x"), "plain file name without folders, got '../../x'"),
    "unknown reward": (("train", "--reward", "beauty"), "unknown reward 'beauty'; known are"),
    "no prompts": (("train", "--model", "somewhere"), "give --prompts FILE"),
    "unknown recipe": (("train", "--recipe", "miracle"), "no recipe 'miracle'.*builtin"),
    "bad strategy": (("train", "--backprop.strategy", "all"), "invalid choice|strategy"),
    "bad number": (("train", "--steps", "0"), "steps must be at least 1, got 0"),
    "no prompt": (("generate",), "give --prompt"),
    "unknown model": (("generate", "--prompt", "x", "--model", "Wan9"), "no folder Wan9"),
    "missing lora": (("generate", "--prompt", "x", "--lora", "none.safetensors"), "none.safetensors is missing"),
    "bad device": (("generate", "--prompt", "x", "--device", "abacus"), "device abacus cannot be used"),
    "missing video": (("score", "none.mp4", "--prompt", "x"), "no such video"),
    "no prompt to score": (("score", "none.mp4"), "needs --prompt"),
    "inspect nothing": (("inspect", "none.safetensors"), "none.safetensors is missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_a_sentence(capsys, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    arguments, words = BAD[case]
    status, out, err = run(capsys, *arguments)
    assert status == 2
    assert re.search(words, re.sub(r"[\s│]+", " ", out + err))
    assert "Traceback" not in out + err
    assert list(tmp_path.rglob("*")) == []


def test_bad_files_get_a_sentence(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "latin.txt").write_bytes("Grün".encode("latin-1"))
    lora = bad_lora(tmp_path)
    before = set(tmp_path.rglob("*"))
    for arguments, words in (
        (("train", "--prompts", "empty.txt"), "holds no prompt"),
        (("train", "--prompts", "latin.txt"), "not UTF-8"),
        (("generate", "--prompt", "x", "--lora", f"{lora}:7"), r"strength must lie in -2..2, got 7.0"),
        (("generate", "--prompt", "x", "--lora", f"{lora}:strong"), "PATH:STRENGTH"),
        (("generate", "--prompt", "x", "--lora", lora), "made for another model"),
        (("inspect", lora, "--model", "builtin"), "made for another model"),
        (("generate", "--prompt", "x", "--frames", "82"), r"4n\+1.*got 82; the nearest is 81"),
        (("generate", "--prompt", "x", "--height", "250"), "multiples of 8.*32x250; the nearest is 32x248"),
    ):
        status, out, err = run(capsys, *arguments)
        assert status == 2, arguments
        assert re.search(words, err), (arguments, err)
        assert "Traceback" not in out + err
    assert set(tmp_path.rglob("*")) == before


def test_recipes_are_valid_settings():
    recipes = sorted((ROOT / "recipes").glob("*.yaml"))
    assert recipes
    for path in recipes:
        data = cli.read_recipe(path.stem)
        assert data["about"]
        config = TrainConfig.from_dict(data["config"])
        assert config.steps > 0


def test_flags_change_a_recipe(capsys, monkeypatch):
    seen = {}
    monkeypatch.setattr(cli.Train, "run", lambda self: seen.update(command=self) or 0)
    assert cli.main(["train", "--recipe", "builtin", "--learning-rate", "5e-4", "--backprop.num-steps", "3"]) == 0
    config = seen["command"].config
    assert (config.learning_rate, config.backprop.num_steps, config.batch_size) == (5e-4, 3, 8)
    assert seen["command"].model == "builtin"


def test_generate_score_inspect(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompt = "a red circle moves right on a blue background"
    status, out, err = run(capsys, "generate", "--prompt", prompt, "--seed", "3", "--output-dir", "o")
    assert status == 0, err
    (video,) = (tmp_path / "o").glob("*.mp4")
    made = video.read_bytes()
    again = run(capsys, "generate", "--prompt", prompt, "--seed", "3", "--steps", "1", "--output-dir", "o")
    assert "video-000-seed-3-2.mp4" in again[1]
    assert video.read_bytes() == made
    status, out, err = run(capsys, "score", video, "--prompt", prompt)
    assert status == 0, err
    right = float(re.search(r"\| +(0\.\d{4}) \|", out)[1])
    status, out, _ = run(capsys, "score", video, "--prompt", "a green square moves up on a white background")
    assert float(re.search(r"\| +(-?0\.\d{4}) \|", out)[1]) < right
