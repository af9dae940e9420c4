"""Measures the tiny models against the oracle: the figures in the README come from here."""

import torch
from torch import Tensor, nn

from . import clip, dit, oracle, pictures, tokenizer, vae, world


@torch.no_grad()
def of_vae(model: nn.Module, count: int, generator: torch.Generator) -> dict[str, float]:
    """PSNR of reconstructions and of decoding disturbed latents, and what the oracle reads from them."""
    captions = world.draw_captions(count, generator)
    frames = world.render(captions, generator)
    latents = vae.encode(model, frames)
    decoded = vae.decode(model, latents)
    deviation = latents.std(dim=(0, 2, 3, 4), keepdim=True)
    disturbed = vae.decode(model, latents + 0.2 * deviation * torch.randn(latents.shape, generator=generator))
    figures = {"psnr": vae.psnr(decoded, frames), "psnr_disturbed": vae.psnr(disturbed, frames)}
    figures |= oracle.mean_scores(oracle.judge(decoded, captions))
    figures |= {f"disturbed_{k}": v for k, v in oracle.mean_scores(oracle.judge(disturbed, captions)).items()}
    return figures


def spoiled_frames(captions: list[str], generator: torch.Generator) -> dict[str, Tensor]:
    """One true frame per caption and the same frame spoiled in known ways, each `[N, 3, 32, 32]`."""
    clip_layout = world.layout(captions, generator)
    centre = 0.5 * (clip_layout["start"] + clip_layout["end"])
    mask = world.coverage(clip_layout["shape"], centre, clip_layout["radius"])[:, None]
    background = clip_layout["background"][:, :, None, None]
    foreground = clip_layout["foreground"][:, :, None, None]
    wanted = [world.parse(caption) for caption in captions]
    others = [
        next(c for c in world.COLOURS[i:] + world.COLOURS[:i] if c not in (w.colour, w.background))
        for i, w in zip(torch.randint(4, (len(captions),), generator=generator).tolist(), wanted, strict=True)
    ]
    other = torch.tensor([world.PALETTE[name] for name in others])[:, :, None, None]
    shape = world.coverage((clip_layout["shape"] + 1) % 3, centre, clip_layout["radius"])[:, None]
    swollen = world.coverage(clip_layout["shape"], centre, 1.7 * clip_layout["radius"])[:, None]
    grid = torch.arange(world.SIZE) + 0.5
    half = (grid[None, :] < centre[:, :1])[:, None, None, :]
    blocks = torch.rand(len(captions), 1, 8, 8, generator=generator) < 0.5
    torn = mask * blocks.repeat_interleave(4, 2).repeat_interleave(4, 3)

    def paint(where: Tensor, colour: Tensor) -> Tensor:
        return background + where * (colour - background)

    return {
        "true": paint(mask, foreground),
        "blend 0.25": paint(mask, 0.75 * foreground + 0.25 * other),
        "blend 0.5": paint(mask, 0.5 * foreground + 0.5 * other),
        "blend 0.75": paint(mask, 0.25 * foreground + 0.75 * other),
        "wrong colour": paint(mask, other),
        "wrong shape": paint(shape, foreground),
        "half erased": paint(mask * half, foreground),
        "swollen": paint(swollen, foreground),
        "torn": paint(torn, foreground),
        "empty": paint(0.0 * mask, foreground),
        "noise": torch.rand(mask.expand(-1, 3, -1, -1).shape, generator=generator),
    }


@torch.no_grad()
def of_clip(model: nn.Module, autoencoder: nn.Module, count: int, generator: torch.Generator) -> dict[str, float]:
    """Top-1 among 72 captions on true frames, and mean cosines of `spoiled_frames`, raw and decoded."""
    words = tokenizer.create(clip.TEXT_LENGTH, clip=True)
    captions = world.draw_captions(count, generator)
    own = clip.text_features(model, words, captions)
    choices = pictures.captions(generator)
    table = clip.text_features(model, words, choices)

    def key(caption: str) -> tuple[str, str, str]:
        seen = world.parse(caption)
        return seen.colour, seen.shape, seen.background

    keys = [key(choice) for choice in choices]
    label = torch.tensor([keys.index(key(caption)) for caption in captions])
    figures = {}
    for name, frames in spoiled_frames(captions, generator).items():
        decoded = vae.decode(autoencoder, vae.encode(autoencoder, frames[:, :, None]))[:, :, 0]
        for source, shown in (("", frames), (" decoded", decoded)):
            image = clip.image_features(model, shown)
            figures[f"cosine {name}{source}"] = (image * own).sum(1).mean().item()
            if name == "true":
                figures[f"top-1{source}"] = ((image @ table.T).argmax(1) == label).float().mean().item()
    return figures


@torch.no_grad()
def generate(
    transformer: nn.Module,
    encoder: nn.Module,
    autoencoder: nn.Module,
    captions: list[str],
    generator: torch.Generator,
    steps: int,
    guidance: float,
    length: int = dit.TEXT_LENGTH,
) -> Tensor:
    """Sample one clip per caption: `[B, 3, 9, 32, 32]`, 0..1."""
    device = next(transformer.parameters()).device
    words = tokenizer.create(length)
    text = dit.encode_text(encoder, words, captions, length)
    empty = dit.encode_text(encoder, words, [""], length)
    noise = torch.randn(len(captions), *dit.LATENT_SHAPE, generator=generator, device=generator.device).to(device)
    mean, std = vae.statistics(autoencoder, device)
    frames = []
    for start in range(0, len(captions), 64):
        part = slice(start, start + 64)
        latents = dit.sample(transformer, text[part], empty, noise[part], steps, guidance)
        frames.append(vae.decode(autoencoder, latents * std + mean).clamp(0.0, 1.0))
    return torch.cat(frames)


def of_samples(
    transformer: nn.Module,
    encoder: nn.Module,
    autoencoder: nn.Module,
    captions: list[str],
    seed: int,
    steps: int,
    guidance: float,
) -> dict[str, float]:
    """What the oracle reads from generated clips."""
    generator = torch.Generator().manual_seed(seed)
    frames = generate(transformer, encoder, autoencoder, captions, generator, steps, guidance)
    return oracle.mean_scores(oracle.judge(frames, captions))
