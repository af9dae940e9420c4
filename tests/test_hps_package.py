"""HPS against the package its authors publish."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from reward_lora.reward_models import load_reward

from .reward_checkpoints import OPEN_CLIP

PROMPT = "A red circle, moving left &amp; up"
SIZES = ((16, 16), (40, 64), (64, 40), (9, 13))


def test_against_the_hpsv2_package(reward_files, tmp_path):
    if importlib.util.find_spec("hpsv2") is None:
        pytest.skip("HPS is NOT compared with its authors' package: pip install --no-deps hpsv2")
    generator = torch.Generator().manual_seed(1)
    pictures = [(torch.rand(3, *size, generator=generator) * 255).byte() for size in SIZES]
    for number, picture in enumerate(pictures):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / f"{number}.png")
    (tmp_path / "tiny-test-clip.json").write_text(json.dumps(OPEN_CLIP))
    script = Path(__file__).parent / "hpsv2_package.py"
    checkpoint = reward_files / "HPS_v2.1_compressed.pt"
    command = [sys.executable, str(script), str(tmp_path), str(checkpoint), "tiny-test-clip", PROMPT]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    theirs = json.loads((tmp_path / "scores.json").read_text())
    assert theirs["official"] != theirs["videox-fun"]
    for preprocessing, expected in theirs.items():
        reward = load_reward("hps_v2.1", search=[reward_files], options={"preprocessing": preprocessing})
        scores = [float(reward.score(picture[None, :, None], [PROMPT])) for picture in pictures]
        assert scores == pytest.approx(expected, abs=2e-6)
        assert max(scores) - min(scores) > 1e-3
