"""The tiny video autoencoder: `AutoencoderKLWan` with 0.64 M parameters, and its training.

9 frames of 32x32 become latents `[B, 8, 3, 8, 8]`. Three stages: single frames, then clips,
then the decoder alone on latents that are already fixed.
"""

import logging
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import world

logger = logging.getLogger(__name__)

CONFIG = {
    "base_dim": 16,
    "z_dim": 8,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "attn_scales": [],
    "temperal_downsample": [True, True],
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 4,
    "latents_mean": [0.0] * 8,
    "latents_std": [1.0] * 8,
}


def create(generator: torch.Generator) -> nn.Module:
    """Create an untrained autoencoder.

    PyTorch's default initialisation lets the signal die in this architecture. Here only the last
    temporal tap of a convolution is non-zero (a 2D network applied to every frame), the temporal
    resampling copies, residual branches start small, and the posterior is almost deterministic.
    """
    from diffusers import AutoencoderKLWan

    model = AutoencoderKLWan(**CONFIG)
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Conv2d, nn.Conv3d)):
            continue
        weight = module.weight.data
        fan_in = weight.shape[1] * math.prod(weight.shape[-2:])
        scale = 0.3 if name.endswith("conv2") else 1.0
        drawn = torch.randn(weight.shape, generator=generator) * scale / math.sqrt(fan_in)
        if weight.dim() == 5:
            drawn[:, :, :-1] = 0.0
        if name.endswith("time_conv"):  # start by copying frames
            copies = weight.shape[0] // weight.shape[1]
            drawn[:, :, -1, 0, 0] = torch.eye(weight.shape[1]).repeat(copies, 1)
        weight.copy_(drawn)
        module.bias.data.zero_()
    model.quant_conv.weight.data[CONFIG["z_dim"] :] = 0.0
    model.quant_conv.bias.data[CONFIG["z_dim"] :] = -4.0
    return model


def encode(model: nn.Module, frames: Tensor) -> Tensor:
    """Frames `[B, 3, T, H, W]`, 0..1, to the posterior mean `[B, 8, t, H/4, W/4]`."""
    return model._encode(2.0 * frames - 1.0)[:, : CONFIG["z_dim"]]


def decode(model: nn.Module, latents: Tensor) -> Tensor:
    """Latents to frames, 0..1, without the clamp of `AutoencoderKLWan.decode`, which stops gradients."""
    model.clear_cache()
    hidden = model.post_quant_conv(latents)
    chunks = []
    for i in range(hidden.shape[2]):
        model._conv_idx = [0]
        chunks.append(
            model.decoder(
                hidden[:, :, i : i + 1], feat_cache=model._feat_map, feat_idx=model._conv_idx, first_chunk=i == 0
            )
        )
    model.clear_cache()
    return 0.5 + 0.5 * torch.cat(chunks, 2).float()


def reconstruction_loss(output: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """L1, squared error and L1 of the spatial differences; the object counts six times.

    Args:
        output: `[B, 3, T, H, W]`.
        target: the same shape.
        mask: `[B, 1, T, H, W]`, 1 on the object.
    """
    # the object and a rim of two pixels around it: an unweighted loss ignores a tenth of the picture
    near = F.max_pool3d(mask, (1, 5, 5), stride=1, padding=(0, 2, 2))
    weight = 1.0 + 5.0 * near
    error = output - target
    loss = (weight * (error.abs() + 2.0 * error.square())).mean()
    for dim in (-1, -2):
        loss = loss + (weight.narrow(dim, 1, 31) * error.diff(dim=dim).abs()).mean()
    return loss


def psnr(output: Tensor, target: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of frames in 0..1."""
    return -10.0 * math.log10((output.clamp(0, 1) - target).square().mean().item())


def fit(
    model: nn.Module,
    generator: torch.Generator,
    stages: list[tuple[int, int, int, bool, float]],
    precision: Callable,
    report: int = 50,
) -> None:
    """Train on freshly rendered clips.

    Args:
        model: from `create`.
        generator: the only source of randomness.
        stages: (steps, clips per step, frames per clip, whether the encoder learns, peak learning rate).
        precision: makes an autocast context.
        report: log every so many steps.
    """
    device = generator.device
    for steps, batch, length, whole, rate in stages:
        model.encoder.requires_grad_(whole)
        model.quant_conv.requires_grad_(whole)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=1e-3)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda s, n=steps: min(1.0, (s + 1) / 30) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * s / n)))
        )
        for step in range(steps):
            frames, mask = world.render_with_mask(world.draw_captions(batch, generator), generator)
            first = int(torch.randint(world.FRAMES - length + 1, (1,), generator=generator, device=device))
            frames, mask = frames[:, :, first : first + length], mask[:, :, first : first + length]
            with precision():
                with torch.set_grad_enabled(whole):
                    latents = encode(model, frames).float()
                noise = torch.randn(latents.shape, generator=generator, device=device)
                output = decode(model, latents + 0.1 * noise)
            loss = reconstruction_loss(output, frames, mask) + 1e-3 * latents.square().mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            if step % report == 0 or step == steps - 1:
                quality = psnr(output.detach(), frames)
                logger.info("vae %d frames step %d loss %.4f psnr %.2f", length, step, loss.item(), quality)
    model.requires_grad_(False)


def linearise(
    model: nn.Module, generator: torch.Generator, steps: int, batch: int, rate: float, precision: Callable
) -> None:
    """Teach the decoder, and it alone, that halfway between two colours' latents lies the blended colour.

    A decoder that saw only palette colours snaps to the nearest one. A judge of decoded frames
    then has no gradient from one colour to another, and a reward could not repair a colour.
    """
    model.encoder.requires_grad_(False)
    model.quant_conv.requires_grad_(False)
    learned = [*model.decoder.parameters(), *model.post_quant_conv.parameters()]
    for parameter in learned:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(learned, lr=rate, betas=(0.9, 0.98), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, (s + 1) / 30, (steps - s) / steps * 2))
    for step in range(steps):
        captions = world.draw_captions(batch, generator)
        draw = torch.randint(2, (batch,), generator=generator, device=generator.device).tolist()
        others = []
        for caption, pick in zip(captions, draw, strict=True):
            seen = world.parse(caption)
            free = [name for name in world.COLOURS if name not in (seen.colour, seen.background)]
            others.append(world.Attributes(free[pick], seen.shape, seen.direction, seen.background).caption)
        state = generator.get_state()
        first, mask = world.render_with_mask(captions, generator)
        generator.set_state(state)  # the same geometry once more
        second = world.render(others, generator)
        share = torch.rand(batch, 1, 1, 1, 1, generator=generator, device=generator.device)
        share[: batch // 4] = 0.0
        with torch.no_grad(), precision():
            ends = encode(model, torch.cat([first, second])).float().chunk(2)
        noise = torch.randn(ends[0].shape, generator=generator, device=generator.device)
        latents = torch.lerp(*ends, share) + 0.05 * noise
        with precision():
            output = decode(model, latents)
        target = torch.lerp(first, second, share)
        loss = reconstruction_loss(output, target, mask)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            quality = psnr(output.detach(), target)
            logger.info("vae blends step %d loss %.4f psnr %.2f", step, loss.item(), quality)
    model.requires_grad_(False)


@torch.no_grad()
def write_statistics(model: nn.Module, latents: Tensor) -> None:
    """Store the measured mean and standard deviation of latents `[N, 8, t, h, w]` in the config."""
    mean = latents.mean(dim=(0, 2, 3, 4)).tolist()
    std = latents.std(dim=(0, 2, 3, 4)).tolist()
    model.register_to_config(latents_mean=mean, latents_std=std)


def statistics(model: nn.Module, device: torch.device) -> tuple[Tensor, Tensor]:
    """The config's latent mean and standard deviation, each `[1, 8, 1, 1, 1]`."""
    shape = (1, CONFIG["z_dim"], 1, 1, 1)
    return tuple(
        torch.tensor(getattr(model.config, key), device=device).view(shape) for key in ("latents_mean", "latents_std")
    )


@torch.no_grad()
def dataset(
    model: nn.Module, count: int, generator: torch.Generator, precision: Callable, batch: int = 32
) -> tuple[Tensor, list[str]]:
    """Render and encode `count` clips: raw latents `[count, 8, 3, 8, 8]` (float32) and their captions."""
    captions, latents = [], []
    for start in range(0, count, batch):
        names = world.draw_captions(min(batch, count - start), generator)
        with precision():
            latents.append(encode(model, world.render(names, generator)).float())
        captions += names
    return torch.cat(latents), captions
