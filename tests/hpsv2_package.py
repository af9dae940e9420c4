"""Run by test_hps_package.py in a process of its own: the package ``hpsv2`` on a checkpoint, pictures and a prompt.

Of the package's dependencies, those that only its downloads and an unused import need are left out, and the vocabulary
that its wheel lacks is open_clip's.

Arguments: a folder with pictures, a checkpoint, an architecture (its ``.json`` may lie in the folder), a prompt.
Writes ``scores.json`` there: scores of the package's own preprocessing, and of pictures squashed as VideoX-Fun does.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import sys
import types
from pathlib import Path

import torch

FOLDER, CHECKPOINT, ARCHITECTURE, PROMPT = Path(sys.argv[1]), *sys.argv[2:]

turtle, clint, textui = types.ModuleType("turtle"), types.ModuleType("clint"), types.ModuleType("clint.textui")
turtle.forward = textui.progress = None
sys.modules |= {"turtle": turtle, "clint": clint, "clint.textui": textui}
VOCABULARY = Path(importlib.util.find_spec("open_clip").submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"
gzip.open = lambda path, *rest, open=gzip.open: open(VOCABULARY if Path(path).name == VOCABULARY.name else path, *rest)

from hpsv2 import img_score  # noqa: E402
from hpsv2.src import open_clip  # noqa: E402
from PIL import Image  # noqa: E402
from torchvision import transforms  # noqa: E402

if (FOLDER / f"{ARCHITECTURE}.json").is_file():
    open_clip.add_model_config(FOLDER / f"{ARCHITECTURE}.json")
model, _, official = open_clip.create_model_and_transforms(
    ARCHITECTURE, precision="amp", device="cpu", light_augmentation=True, output_dict=True
)
img_score.model_dict |= {"model": model, "preprocess_val": official}
size = model.visual.image_size
squashed = transforms.Compose([
    transforms.ToTensor(),
    transforms.Resize(size, interpolation=transforms.InterpolationMode.BICUBIC),
    official.transforms[-1],
])  # fmt: skip
pictures = [Image.open(path) for path in sorted(FOLDER.glob("*.png"))]
scores = {}
for name, preprocess in (("official", official), ("videox-fun", squashed)):
    img_score.model_dict["preprocess_val"] = preprocess
    with torch.no_grad():
        scores[name] = [float(img_score.score(picture, PROMPT, CHECKPOINT)[0]) for picture in pictures]
(FOLDER / "scores.json").write_text(json.dumps(scores))
