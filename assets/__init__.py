"""The built-in tiny model: where its files are and how it is meant to be sampled.

`tiny_wan/` is a complete diffusers `WanPipeline` folder and `tiny_clip/` a transformers
`CLIPModel` folder, both trained on the generated world of `world.py`. Importing this
module loads nothing.
"""

from pathlib import Path

_HERE = Path(__file__).resolve().parent

TINY_WAN = _HERE / "tiny_wan"
TINY_CLIP = _HERE / "tiny_clip"
PROMPTS_TRAIN = _HERE / "prompts_train.txt"
PROMPTS_TEST = _HERE / "prompts_test.txt"

HEIGHT = WIDTH = 32
FRAMES = 9
STEPS = 8  # Euler steps at sigmas linspace(1, 1/STEPS, STEPS), shifted by SHIFT, then 0
SHIFT = 3.0
GUIDANCE = 1.0  # off: half the cost, and a reward LoRA has shape and motion to improve too
TEXT_LENGTH = 12  # tokens; the longest caption has 9 words and an end token
