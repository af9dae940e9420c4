"""The tiny CLIP that judges single frames, and its training.

It is a transformers `CLIPModel`. Besides the contrastive loss over the 72 captions that a
frame can tell apart, it regresses the graded cosine of `pictures.py`: a wrong colour costs
0.45, a missing or torn object about 1, and a blend of two colours lies between. That makes
the cosine a reward whose gradient points somewhere, and erasing the object a bad idea.
"""

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import optimizers, pictures, tokenizer, vae, world

logger = logging.getLogger(__name__)

TEXT_LENGTH = 16
MEAN = STD = 0.5  # of the image normalisation
PROJECTION = 64


def create():
    """Create an untrained `CLIPModel` (transformers draws from torch's global generator)."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    shared = {"num_attention_heads": 4, "projection_dim": PROJECTION, "hidden_act": "gelu"}
    text = CLIPTextConfig(
        vocab_size=tokenizer.VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        max_position_embeddings=TEXT_LENGTH,
        pad_token_id=tokenizer.PAD_ID,
        bos_token_id=tokenizer.START_ID,
        eos_token_id=tokenizer.END_ID,
        **shared,
    )
    vision = CLIPVisionConfig(
        hidden_size=96, intermediate_size=288, num_hidden_layers=4, image_size=world.SIZE, patch_size=8, **shared
    )
    config = CLIPConfig(
        text_config=text.to_dict(),
        vision_config=vision.to_dict(),
        projection_dim=PROJECTION,
        logit_scale_init_value=math.log(10.0),
        initializer_factor=1.0,
    )
    return CLIPModel(config)


def image_features(model: nn.Module, frames: Tensor) -> Tensor:
    """Unit image embeddings `[N, 64]` of frames `[N, 3, 32, 32]`, 0..1."""
    pooled = model.vision_model(pixel_values=(frames - MEAN) / STD).pooler_output
    return F.normalize(model.visual_projection(pooled).float(), dim=-1)


def text_features(model: nn.Module, words, captions: list[str]) -> Tensor:
    """Unit text embeddings `[N, 64]`; `words` is the tokenizer."""
    device = next(model.parameters()).device
    batch = words(captions, padding=True, truncation=True, return_tensors="pt").to(device)
    pooled = model.text_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).pooler_output
    return F.normalize(model.text_projection(pooled).float(), dim=-1)


@torch.no_grad()
def through_vae(autoencoder: nn.Module, frames: Tensor, generator: torch.Generator, precision: Callable) -> Tensor:
    """Single frames `[N, 3, 32, 32]` encoded, disturbed a little, and decoded."""
    with precision():
        latents = vae.encode(autoencoder, frames[:, :, None]).float()
    strength = 0.3 * torch.rand(len(frames), 1, 1, 1, 1, generator=generator, device=frames.device)
    latents = latents + strength * torch.randn(latents.shape, generator=generator, device=frames.device)
    with precision():
        return vae.decode(autoencoder, latents)[:, :, 0]


def fit(
    model: nn.Module,
    autoencoder: nn.Module,
    generator: torch.Generator,
    steps: int,
    batch: int,
    rate: float,
    muon_rate: float,
    precision: Callable,
    report: int = 100,
) -> None:
    """Train on freshly drawn pictures, a third of them decoded by the autoencoder."""
    words = tokenizer.create(TEXT_LENGTH, clip=True)
    blocks = [*model.vision_model.encoder.layers, *model.text_model.encoder.layers]
    both = optimizers.create(blocks, model, rate, muon_rate)
    schedules = [torch.optim.lr_scheduler.LambdaLR(one, optimizers.pacing(steps)) for one in both]
    for step in range(steps):
        drawn = pictures.draw(batch, generator)
        target = drawn.similarity()
        raw = batch - batch // 3
        frames = torch.cat([drawn.frames[:raw], through_vae(autoencoder, drawn.frames[raw:], generator, precision)])
        frames = pictures.weather(frames, generator)
        captions = pictures.captions(generator)
        with precision():
            cosine = image_features(model, frames) @ text_features(model, words, captions).T
        cosine = cosine.float()
        grade = (cosine - target).square().mean()
        contrast = F.cross_entropy(cosine[drawn.intact] * model.logit_scale.exp(), drawn.label[drawn.intact])
        loss = 10.0 * grade + 0.3 * contrast
        optimizers.update(model, both, schedules, loss)
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(50.0))
        if step % report == 0 or step == steps - 1:
            hit = (cosine.argmax(1) == drawn.label)[drawn.intact].float().mean().item()
            logger.info(
                "clip step %d error %.4f contrast %.3f top-1 %.2f", step, grade.item() ** 0.5, contrast.item(), hit
            )
    model.requires_grad_(False)


def save(model: nn.Module, folder: Path) -> None:
    """Write model, tokenizer and image preprocessing in the transformers layout."""
    model.save_pretrained(folder)
    tokenizer.save(tokenizer.create(TEXT_LENGTH, clip=True), folder)
    size = {"height": world.SIZE, "width": world.SIZE}
    preprocessing = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": world.SIZE},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": size,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [MEAN] * 3,
        "image_std": [STD] * 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing, indent=2) + "\n", encoding="utf-8")
