"""Tiny random rewards in the published layouts: file names, key names and configurations as their publishers write."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import torch
from reward_lora.reward_models.mps import MpsNetwork
from safetensors.torch import save_file

TOKENIZER = Path(__file__).parents[1] / "assets" / "tiny_clip"
SIZES = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**SIZES, "vocab_size": 32, "max_position_embeddings": 12, "hidden_act": "gelu", "eos_token_id": 1,
        "bos_token_id": 3, "pad_token_id": 0}  # fmt: skip
VISION = {**SIZES, "image_size": 16, "patch_size": 8, "hidden_act": "gelu"}
OPEN_CLIP = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 8, "head_width": 4, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 2},
}
FILES = ("HPS_v2.1_compressed.pt", "HPS_v2_compressed.pt", "MPS_overall.pth", "sac+logos+ava1-l14-linearMSE.pth",
         "aesthetic_predictor_v2_5.pth")  # fmt: skip


def randomize(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Weights large enough for scores to differ."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        value = torch.randn(parameter.shape, generator=generator) * (0.7 if parameter.ndim > 1 else 0.1)
        norm = "norm" in name or ".ln_" in name
        parameter.data.copy_(value + 1 if norm and name.endswith("weight") else value)
    return module


def tensors(module: torch.nn.Module, prefix: str = "") -> dict[str, torch.Tensor]:
    return {prefix + key: value.detach().clone() for key, value in module.state_dict().items()}


def write_folder(folder: Path, module: torch.nn.Module, config: dict, *, tokenizer: bool = False) -> None:
    """As ``save_pretrained`` writes, SigLIP's tower under its published prefix."""
    folder.mkdir(parents=True)
    save_file(tensors(module), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    if tokenizer:
        write_tokenizer(folder)


def write_tokenizer(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder / name)


def head(inputs: int, numbers: tuple[int, ...], prefix: str, seed: int) -> dict[str, torch.Tensor]:
    """Linear layers as numbered by the publisher; the gaps were dropouts."""
    generator, found = torch.Generator().manual_seed(seed), {}
    widths = [inputs, 12, 8, 6, 4, 1]
    for number, wide, narrow in zip(numbers, widths, widths[1:], strict=False):
        found[f"{prefix}.{number}.weight"] = torch.randn(narrow, wide, generator=generator) * 0.5
        found[f"{prefix}.{number}.bias"] = torch.randn(narrow, generator=generator) * 0.5
    return found


def write_all(root: Path) -> Path:
    """Everything the image rewards of this package read, below one folder."""
    import open_clip
    from transformers import CLIPConfig, CLIPModel, SiglipVisionConfig, SiglipVisionModel

    config = {"model_type": "clip", "text_config": TEXT, "vision_config": VISION, "projection_dim": 8}

    def clip(seed: int) -> torch.nn.Module:
        return randomize(CLIPModel(CLIPConfig.from_dict(config)), seed)

    write_folder(root / "PickScore_v1", clip(0), config)
    write_folder(root / "clip-vit-large-patch14", clip(1), config, tokenizer=True)
    laion = root / "CLIP-ViT-H-14-laion2B-s32B-b79K"
    write_tokenizer(laion)
    (laion / "config.json").write_text(json.dumps(config))
    vision = {key: value for key, value in VISION.items() if key != "hidden_act"}
    siglip = randomize(SiglipVisionModel(SiglipVisionConfig(**vision)), 2)
    siglip = getattr(siglip, "vision_model", siglip)
    folder = root / "siglip-so400m-patch14-384"
    folder.mkdir()
    published = tensors(siglip, "vision_model.") | {"logit_scale": torch.zeros(1), "text_model.x": torch.zeros(1)}
    save_file(published, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "siglip", "vision_config": vision}))
    for seed, name in enumerate(FILES[:2], 3):
        torch.save({"state_dict": tensors(randomize(open_clip.CLIP(**OPEN_CLIP), seed))}, root / name)
    cross = tensors(randomize(MpsNetwork((8, 2, 4, 16), 2), 5))
    cross = {re.sub(r"layers\.(\d)\.(\d)\.", r"cross_model.layers.\1.\2.fn.", key): cross[key] for key in cross}
    cross |= {f"cross_model.layers.{i}.1.fn.rotary_emb.inv_freq": torch.ones(2) for i in range(2)}
    torch.save(tensors(clip(6), "model.") | cross, root / FILES[2])
    torch.save(head(8, (0, 2, 4, 6, 7), "layers", 7), root / FILES[3])
    compiled = head(8, (0, 2, 4, 6, 8), "_orig_mod.scoring_head", 8)
    torch.save({"model_state_dict": compiled}, root / FILES[4])
    return root
