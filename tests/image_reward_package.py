"""Run by test_image_reward.py in a process of its own: the package ``image-reward`` on a tiny checkpoint.

The package was written for transformers 4.15 and old timm, and its ``__init__`` imports a training framework. Here only
its model's files are imported, and what they expect of those libraries and is gone is put back.

Arguments: a folder with ``ImageReward.pt``, ``med_config.json``, ``bert-base-uncased`` and ``picture.png``; a prompt.
Writes ``package.safetensors`` there: the score, the score of ``pixels`` in ``io.safetensors``, and its gradient.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from functools import partial
from pathlib import Path

import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import modeling_utils, pytorch_utils

FOLDER, PROMPT = Path(sys.argv[1]), sys.argv[2]


def without_init(name: str, path: str) -> None:
    module = types.ModuleType(name)
    module.__path__ = [path]
    sys.modules[name] = module


root = importlib.util.find_spec("ImageReward").submodule_search_locations[0]
without_init("ImageReward", root)
without_init("ImageReward.models", f"{root}/models")
without_init("ImageReward.models.BLIP", f"{root}/models/BLIP")
fairscale = types.ModuleType("fairscale.nn.checkpoint.checkpoint_activations")
fairscale.checkpoint_wrapper = None  # for training only
sys.modules[fairscale.__name__] = fairscale
for name in ("apply_chunking_to_forward", "find_pruneable_heads_and_indices", "prune_linear_layer"):
    if not hasattr(modeling_utils, name):
        setattr(modeling_utils, name, getattr(pytorch_utils, name, None))
med = importlib.import_module("ImageReward.models.BLIP.med")
vit = importlib.import_module("ImageReward.models.BLIP.vit")
pretrain = importlib.import_module("ImageReward.models.BLIP.blip_pretrain")
package = importlib.import_module("ImageReward.ImageReward")
med.BertModel.init_weights = lambda self: None  # they are all read from the file
if not hasattr(med.BertModel, "get_head_mask"):  # gone in transformers 5
    med.BertModel.get_head_mask = lambda self, mask, layers: [None] * layers
if not hasattr(med.BertModel, "invert_attention_mask"):
    med.BertModel.invert_attention_mask = lambda self, mask: (1 - mask[:, None, None].float()) * torch.finfo().min

weights = torch.load(FOLDER / "ImageReward.pt", weights_only=True)
width = weights["blip.visual_encoder.cls_token"].shape[-1]
depth = sum(name.endswith("attn.qkv.weight") for name in weights)
tiny = vit.VisionTransformer(img_size=224, patch_size=16, embed_dim=width, depth=depth, num_heads=width // 64)
pretrain.create_vit = lambda *arguments: (tiny, width)
pretrain.init_tokenizer = partial(transformers.AutoTokenizer.from_pretrained, FOLDER / "bert-base-uncased")
package.MLP = lambda size, MLP=package.MLP: MLP(weights["mlp.layers.0.weight"].shape[1])
model = package.ImageReward(str(FOLDER / "med_config.json")).eval()
model.load_state_dict(weights)

text = model.blip.tokenizer(PROMPT, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
pixels = load_file(FOLDER / "io.safetensors")["pixels"].requires_grad_()
scores = model.score_gard(text.input_ids.expand(len(pixels), -1), text.attention_mask.expand(len(pixels), -1), pixels)
(gradient,) = torch.autograd.grad(scores.sum(), pixels)
picture = model.score(PROMPT, Image.open(FOLDER / "picture.png"))
save_file(
    {"scores": scores[:, 0].detach(), "gradient": gradient, "picture": torch.tensor([picture])},
    FOLDER / "package.safetensors",
)
