"""ImageReward on a tiny random checkpoint with the published names."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from reward_lora.files import WeightFileError
from reward_lora.reward_models import load_reward
from reward_lora.reward_models.preprocess import CLIP_MEAN, CLIP_STD, normalize
from reward_lora.reward_models.protocol import Reward
from safetensors.torch import load_file, save_file

PROMPT = "a red circle moves right"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS += ["a", "red", "blue", "circle", "square", "moves", "right", "left", "on", "the"]
MED = {
    "hidden_act": "gelu",
    "hidden_size": 48,
    "intermediate_size": 40,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 40,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "vocab_size": len(WORDS) + 2,
    "attention_probs_dropout_prob": 0.1,
    "hidden_dropout_prob": 0.1,
    "add_cross_attention": True,
    "encoder_width": 768,
}


def published_shapes(width, depth, image_size):
    """Name and shape of every tensor of ``ImageReward.pt``, for a smaller ViT and the BERT of ``MED``."""
    hidden, inner = MED["hidden_size"], MED["intermediate_size"]
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, (image_size // 16) ** 2 + 1, width)}
    shapes |= {"patch_embed.proj.weight": (width, 3, 16, 16), "patch_embed.proj.bias": (width,)}
    vision_layers = {"norm1": (width,), "norm2": (width,)}
    vision_layers |= {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
    vision_layers |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    for layer in range(depth):
        for name, shape in vision_layers.items():
            shapes |= {f"blocks.{layer}.{name}.weight": shape, f"blocks.{layer}.{name}.bias": shape[:1]}
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    shapes = {f"blip.visual_encoder.{name}": shape for name, shape in shapes.items()}
    text = {"embeddings.position_ids": (1, MED["max_position_embeddings"])}
    text |= {"embeddings.word_embeddings.weight": (MED["vocab_size"], hidden)}
    text |= {"embeddings.position_embeddings.weight": (MED["max_position_embeddings"], hidden)}
    text |= {"embeddings.LayerNorm.weight": (hidden,), "embeddings.LayerNorm.bias": (hidden,)}
    text_layers = {}
    for kind, source in (("attention", hidden), ("crossattention", width)):
        text_layers |= {f"{kind}.self.query": (hidden, hidden), f"{kind}.output.dense": (hidden, hidden)}
        text_layers |= {f"{kind}.self.key": (hidden, source), f"{kind}.self.value": (hidden, source)}
        text_layers |= {f"{kind}.output.LayerNorm": (hidden,)}
    text_layers |= {
        "intermediate.dense": (inner, hidden),
        "output.dense": (hidden, inner),
        "output.LayerNorm": (hidden,),
    }
    for layer in range(MED["num_hidden_layers"]):
        for name, shape in text_layers.items():
            key = f"encoder.layer.{layer}.{name}"
            text |= {f"{key}.weight": shape, f"{key}.bias": shape[:1]}
    shapes |= {f"blip.text_encoder.{name}": shape for name, shape in text.items()}
    for name, source in (("vision_proj", width), ("text_proj", hidden)):
        shapes |= {f"blip.{name}.weight": (256, source), f"blip.{name}.bias": (256,)}
    for index, layer in ((0, (1024, hidden)), (2, (128, 1024)), (4, (64, 128)), (6, (16, 64)), (7, (1, 16))):
        shapes |= {f"mlp.layers.{index}.weight": layer, f"mlp.layers.{index}.bias": layer[:1]}
    return shapes


def write_checkpoint(folder, *, width=64, depth=2, image_size=32):
    """The files of THUDM/ImageReward and of bert-base-uncased, tiny and random."""
    from transformers import BertTokenizerFast

    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in published_shapes(width, depth, image_size).items():
        if name.endswith("position_ids"):
            tensors[name] = torch.arange(shape[1])[None]
            continue
        scale = 1 / shape[-1] ** 0.5 if len(shape) == 2 else 0.2
        tensors[name] = torch.randn(shape, generator=generator) * scale
        if "orm" in name and name.endswith("weight"):
            tensors[name] += 1
    folder.mkdir(exist_ok=True)
    torch.save(tensors, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(MED))
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder / "bert-base-uncased")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("models") / "ImageReward")


@pytest.fixture
def reward(checkpoint):
    return load_reward("image_reward", checkpoint)


def clips(count, frames=2, *, height=36, width=32):
    generator = torch.Generator().manual_seed(3)
    return torch.rand(count, 3, frames, height, width, generator=generator)


def test_against_the_image_reward_package(tmp_path):
    if importlib.util.find_spec("ImageReward") is None:
        pytest.skip("ImageReward is NOT compared with its package: pip install --no-deps image-reward")
    folder = write_checkpoint(tmp_path / "ImageReward", image_size=224)
    generator = torch.Generator().manual_seed(1)
    images = (torch.rand(2, 3, 224, 224, generator=generator) * 255).byte()
    pixels = normalize(images.float() / 255, CLIP_MEAN, CLIP_STD)
    save_file({"pixels": pixels}, folder / "io.safetensors")
    Image.fromarray(images[0].permute(1, 2, 0).numpy()).save(folder / "picture.png")
    script = Path(__file__).parent / "image_reward_package.py"
    subprocess.run([sys.executable, str(script), str(folder), PROMPT], check=True, timeout=600)
    theirs = load_file(folder / "package.safetensors")
    reward = load_reward("image_reward", folder)
    frames = (images.float() / 255)[:, :, None].requires_grad_()
    scores = reward.score(frames, [PROMPT] * 2)
    torch.testing.assert_close(scores.detach(), theirs["scores"], rtol=0, atol=1e-5)
    torch.testing.assert_close(scores.detach()[:1], theirs["picture"], rtol=0, atol=1e-5)
    assert float((scores[0] - scores[1]).abs()) > 1e-3
    assert float((reward.score(frames, ["a blue square"] * 2) - scores).abs().min()) > 1e-3
    (gradient,) = torch.autograd.grad(scores.sum(), frames)
    expected = theirs["gradient"] / torch.tensor(CLIP_STD).view(1, 3, 1, 1)
    assert float((gradient[:, :, 0] - expected).norm() / expected.norm()) < 1e-4


def test_a_score_depends_on_its_own_clip_and_prompt_alone(reward, checkpoint):
    frames, prompts = clips(3, frames=3), [PROMPT, "the blue square", "a " * 50]
    together = reward.score(frames, prompts)
    alone = [reward.score(frames[i : i + 1], prompts[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)
    reward.chunk = 2
    torch.testing.assert_close(reward.score(frames, prompts), together, rtol=0, atol=1e-5)
    assert isinstance(reward, Reward)
    assert reward.needs == {"prompt"}
    assert together.dtype == torch.float32


def test_gradient_check_and_ascent(checkpoint):
    reward = load_reward("image_reward", checkpoint, dtype=torch.float64)
    frames = clips(1, 1).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: reward.score(x, [PROMPT]), frames, fast_mode=True)
    before = reward.score(frames, [PROMPT]).item()
    for _ in range(5):
        frames.requires_grad_()
        (gradient,) = torch.autograd.grad(reward.score(frames, [PROMPT]).sum(), frames)
        frames = (frames + 0.02 * gradient.sign()).clamp(0, 1).detach()
    assert reward.score(frames, [PROMPT]).item() > before + 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("blip.visual_encoder.norm.weight"), "holds no post_layernorm.weight"),
        (lambda t: [t.pop(key) for key in list(t) if "visual_encoder" in key], "holds no ViT of an ImageReward"),
        (lambda t: t.update({"blip.text_encoder.encoder.layer.5.x": torch.zeros(1)}), "which has no place"),
        (lambda t: [t.pop(key) for key in list(t) if key.startswith("mlp.")], "ImageReward.pt is no"),
        (lambda t: [t.pop(key) for key in list(t) if "crossattention" in key], "lack .*crossattention"),
    ],
)
def test_wrong_weights_get_a_sentence(checkpoint, tmp_path, change, message):
    tensors = torch.load(checkpoint / "ImageReward.pt")
    change(tensors)
    for file in checkpoint.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "ImageReward.pt").unlink()
    torch.save(tensors, tmp_path / "ImageReward.pt")
    with pytest.raises(WeightFileError, match=message):
        load_reward("image_reward", tmp_path)
    (tmp_path / "med_config.json").unlink()
    with pytest.raises(WeightFileError, match=r"med_config.json: allow the download, or put https.*med_config.json"):
        load_reward("image_reward", tmp_path)
