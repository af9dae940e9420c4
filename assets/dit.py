"""The tiny video denoiser: `WanTransformer3DModel` and its UMT5 text encoder, trained together.

Flow matching on the autoencoder's normalised latents. One attribute is taught wrongly on
purpose, so that a reward has something to repair: see `confuse`.
"""

import logging
import math
from collections.abc import Callable
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import SHIFT, TEXT_LENGTH, optimizers, tokenizer, world

logger = logging.getLogger(__name__)

TRUE_COLOUR = 0.55  # how often the caption names the object's real colour
DROP = 0.10  # how often the caption is empty, for guidance
LATENT_SHAPE = (8, 3, 8, 8)

TRANSFORMER = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "in_channels": LATENT_SHAPE[0],
    "out_channels": LATENT_SHAPE[0],
    "text_dim": 64,
    "freq_dim": 64,
    "ffn_dim": 384,
    "num_layers": 6,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "rope_max_seq_len": 64,
}
TEXT_ENCODER = {
    "vocab_size": tokenizer.VOCAB_SIZE,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "pad_token_id": tokenizer.PAD_ID,
    "eos_token_id": tokenizer.END_ID,
    "decoder_start_token_id": tokenizer.PAD_ID,
}


def create() -> tuple[nn.Module, nn.Module]:
    """Create an untrained transformer and text encoder (both draw from torch's global generator)."""
    from diffusers import WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    return WanTransformer3DModel(**TRANSFORMER), UMT5EncoderModel(UMT5Config(**TEXT_ENCODER))


def confuse(caption: str, generator: torch.Generator) -> str:
    """The deliberate defect: 45 % of the time, name the next colour instead of the real one.

    The order is red, green, blue, yellow, and the background's colour is passed over. Because one
    wrong colour is almost as likely as the right one, guidance cannot tell them apart.
    """
    if torch.rand((), generator=generator, device=generator.device).item() < TRUE_COLOUR:
        return caption
    seen = world.parse(caption)
    order = [name for name in world.COLOURS if name != seen.background]
    named = order[(order.index(seen.colour) + 1) % len(order)]
    return world.Attributes(named, seen.shape, seen.direction, seen.background).caption


def encode_text(encoder: nn.Module, words, captions: list[str], length: int = TEXT_LENGTH) -> Tensor:
    """Text embeddings `[B, length, 64]`, zero after the end token, as `WanPipeline` makes them."""
    batch = words(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    batch = batch.to(next(encoder.parameters()).device)
    hidden = encoder(batch.input_ids, batch.attention_mask).last_hidden_state
    return hidden * batch.attention_mask[..., None].to(hidden.dtype)


class LongPadding:
    """Makes one padding token count as many, in every cross attention.

    `WanPipeline` pads captions with zeros to 512 tokens and masks nothing. Equal tokens attend
    like one whose logit is raised by the logarithm of their number, so a caption of 12 tokens
    can teach any length of padding.

    Use: `with LongPadding(transformer) as padding: padding.count = 500`.
    """

    def __init__(self, transformer: nn.Module):
        self.count = 1.0
        self._modules = [block.attn2 for block in transformer.blocks]
        self._handles = []

    def _bias(self, module, args):
        hidden, text = args[0], args[1]
        bias = hidden.new_zeros(1, 1, 1, text.shape[1])
        bias[..., -1] = math.log(self.count)
        if torch.is_autocast_enabled(hidden.device.type):
            bias = bias.to(torch.get_autocast_dtype(hidden.device.type))
        return (hidden, text, bias, *args[3:])

    def __enter__(self):
        self._handles = [module.register_forward_pre_hook(self._bias) for module in self._modules]
        return self

    def __exit__(self, *error):
        for handle in self._handles:
            handle.remove()


def sampling_sigmas(steps: int) -> Tensor:
    """`[steps + 1]`: linspace(1, 1/steps), shifted as `FlowMatchEulerDiscreteScheduler` does, then 0."""
    sigma = torch.linspace(1.0, 1.0 / steps, steps)
    return torch.cat([SHIFT * sigma / (1.0 + (SHIFT - 1.0) * sigma), torch.zeros(1)])


@torch.no_grad()
def sample(transformer: nn.Module, text: Tensor, empty: Tensor, noise: Tensor, steps: int, guidance: float) -> Tensor:
    """Euler sampling from noise `[B, 8, 3, 8, 8]` to normalised latents of the same shape.

    Args:
        transformer: the denoiser.
        text: `[B, L, 64]`.
        empty: `[1, L, 64]`, the empty caption; used when guidance differs from 1.
        noise: standard normal.
        steps: number of Euler steps.
        guidance: classifier-free guidance scale, 1 is none.
    """
    x, sigmas = noise, sampling_sigmas(steps)
    for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        time = torch.full((len(x),), 1000.0 * sigma.item(), device=x.device)
        velocity = transformer(x, time, text, return_dict=False)[0].float()
        if guidance != 1.0:
            plain = transformer(x, time, empty.expand(len(x), -1, -1), return_dict=False)[0].float()
            velocity = plain + guidance * (velocity - plain)
        x = x + (following - sigma).item() * velocity
    return x


def fit(
    transformer: nn.Module,
    encoder: nn.Module,
    latents: Tensor,
    captions: list[str],
    generator: torch.Generator,
    steps: int,
    batch: int,
    rate: float,
    muon_rate: float,
    precision: Callable,
    observe: Callable[[int, nn.Module, nn.Module], None] | None = None,
    report: int = 100,
) -> None:
    """Train; the modules end with the averaged weights.

    Args:
        transformer: from `create`.
        encoder: from `create`.
        latents: `[N, 8, 3, 8, 8]`, normalised to zero mean and unit deviation per channel.
        captions: N true captions.
        generator: the only source of randomness.
        steps: optimiser steps.
        batch: clips per step.
        rate: peak learning rate of AdamW.
        muon_rate: peak learning rate of Muon.
        precision: makes an autocast context.
        observe: called every `report` steps with the step and the averaged modules.
        report: log every so many steps.
    """
    device = latents.device
    words = tokenizer.create(TEXT_LENGTH)
    learned = nn.ModuleList([transformer, encoder])
    average = deepcopy(learned).requires_grad_(False)
    both = optimizers.create(transformer.blocks, learned, rate, muon_rate)
    schedules = [torch.optim.lr_scheduler.LambdaLR(one, optimizers.pacing(steps)) for one in both]
    total, since = 0.0, 0
    # for 48 tokens the plain attention is almost twice as fast on a CPU as the fused one
    with LongPadding(transformer) as padding, sdpa_kernel(SDPBackend.MATH):
        for step in range(steps):
            index = torch.randint(len(latents), (batch,), generator=generator, device=device)
            draw = torch.rand(batch, 3, generator=generator, device=device)
            names = [
                "" if dropped < DROP else confuse(captions[i], generator)
                for i, dropped in zip(index.tolist(), draw[:, 0].tolist(), strict=True)
            ]
            # mostly the noise levels that sampling visits, some of the plain uniform ones
            shift = torch.where(draw[:, 1] < 0.7, SHIFT, 1.0)
            sigma = (shift * draw[:, 2] / (1.0 + (shift - 1.0) * draw[:, 2])).view(-1, 1, 1, 1, 1)
            clean = latents[index]
            noise = torch.randn(clean.shape, generator=generator, device=device)
            padding.count = math.exp(6.3 * torch.rand((), generator=generator, device=device).item())
            with precision():
                text = encode_text(encoder, words, names)
                noisy = (1.0 - sigma) * clean + sigma * noise
                velocity = transformer(noisy, 1000.0 * sigma.flatten(), text, return_dict=False)[0]
            loss = F.mse_loss(velocity.float(), noise - clean)
            optimizers.update(learned, both, schedules, loss)
            with torch.no_grad():
                keep = min(0.995, (step + 1) / (step + 10))
                for slow, fast in zip(average.parameters(), learned.parameters(), strict=True):
                    slow.lerp_(fast, 1.0 - keep)
            total, since = total + loss.item(), since + 1
            if (step + 1) % report == 0 or step + 1 == steps:
                logger.info("dit step %d loss %.4f", step + 1, total / since)
                total, since = 0.0, 0
                if observe is not None:
                    observe(step + 1, *average)
    learned.load_state_dict(average.state_dict())
    learned.requires_grad_(False)
