"""CogVideoX text-to-video, image-to-video and CogVideoX-Fun InP, on diffusers' classes.

Conventions: diffusers' ``pipelines/cogvideo`` and VideoX-Fun's ``pipeline_cogvideox_fun_inpaint.py``. Inside, latents
are ``[B, t, C, h, w]``; at the door they are ``[B, C, t, h, w]`` as everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .cogvideox_decoder import decoder_stations
from .common import check_pairs, draw_noise, freeze, linear_names, move, no_text_encoder, refuse_images, short_hash
from .images import fit_image, masked_latents
from .precision import float64_throughout
from .protocol import Carried, Conditioning, ModelSpec
from .rotary import rotary_tables
from .solvers import Ddim
from .stations import pass_through


@dataclass(frozen=True)
class CogVideoXSpec(ModelSpec):
    """A :class:`ModelSpec` with CogVideoX's rule for frames.

    The VAE decodes two latent frames at a time, the first time three: their number must be odd.

    Attributes:
        most_frames: Positions and training end here.
    """

    most_frames: int = 49

    @property
    def frame_rule(self) -> str:
        return f"{2 * self.temporal_stride}n+1 and at most {self.most_frames}"

    def nearest_frames(self, frames: int) -> int:
        stride = 2 * self.temporal_stride
        return min(max(0, round((frames - 1) / stride)), (self.most_frames - 1) // stride) * stride + 1


class CogVideoXModel:
    """A CogVideoX model on diffusers' classes. See :class:`.protocol.VideoModel` for every method.

    What the transformer takes besides the noise tells the variant:

    - nothing more: text to video.
    - one more channel than latents have (Fun InP): a mask (times the VAE's scaling factor, 1 = given) and the latents
      of the given frames among frames of -1. Without images all of it is zero, as VideoX-Fun trains.
    - as many channels as latents have (I2V): the start image's latents, then zeros. Without an image all of it is
      zero, which its publisher never trained.

    Args:
        spec: Facts about the model.
        transformer: ``CogVideoXTransformer3DModel``, see :func:`resize_positions`.
        vae: ``AutoencoderKLCogVideoX``.
        solver: Its noise schedule.
        text_encoder, tokenizer: T5 and its tokenizer; may be None when embeddings are given.
        fingerprint: What identifies the text encoder's weights.
    """

    def __init__(
        self,
        spec: ModelSpec,
        transformer: nn.Module,
        vae: nn.Module,
        solver: Ddim,
        text_encoder: nn.Module | None = None,
        tokenizer: Any = None,
        fingerprint: str = "",
    ) -> None:
        self.spec = spec
        self.denoisers = {"transformer": transformer}
        self.vae, self.text_encoder, self.tokenizer = vae, text_encoder, tokenizer
        self.solver, self._fingerprint = solver, fingerprint
        freeze(transformer, vae, text_encoder)

    @property
    def transformer(self) -> nn.Module:
        return self.denoisers["transformer"]

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.patch_embed.proj.weight.dtype

    @property
    def text_tokens(self) -> int:
        """Every prompt is padded to this many tokens, and the padding is seen."""
        return self.transformer.config.max_text_seq_length

    def lora_names(self, expert: str) -> dict[str, str]:
        return linear_names(self.denoisers[expert])

    def text_fingerprint(self) -> str:
        return short_hash("cogvideox", self.text_tokens, self._fingerprint)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> list[Tensor]:
        """All tokens ``[226, D]`` a prompt, the padding too: T5 sees it without a mask, and so does the transformer."""
        if self.text_encoder is None:
            raise no_text_encoder(self.spec)
        device = next(self.text_encoder.parameters()).device
        embeddings = []
        for prompt in prompts:  # one by one: a prompt's embedding must not depend on its neighbours
            ids = self.tokenizer(prompt, padding="max_length", truncation=True, max_length=self.text_tokens).input_ids
            embeddings.append(self.text_encoder(torch.tensor([ids], device=device)).last_hidden_state[0])
        return embeddings

    def conditioning(
        self,
        positive: Sequence[Tensor],
        negative: Sequence[Tensor] | None,
        latent_shape: Sequence[int],
        *,
        start_image: Tensor | None = None,
        end_image: Tensor | None = None,
    ) -> Conditioning:
        batch = len(positive)
        check_pairs(positive, negative)
        lengths = {len(text) for text in (*positive, *(negative or ()))}
        if lengths != {self.text_tokens} and (
            len(lengths) > 1 or hasattr(self.transformer.patch_embed, "pos_embedding")
        ):
            raise ValueError(f"{self.spec.name} takes texts of {self.text_tokens} tokens, got {sorted(lengths)}")
        shared = self._image_conditioning(batch, latent_shape, start_image, end_image)

        def branch(texts: Sequence[Tensor]) -> dict[str, Tensor]:
            return {"text": torch.stack(list(texts)).to(self.device, self.dtype), **shared}

        return Conditioning(branch(positive), None if negative is None else branch(negative))

    def _image_conditioning(
        self, batch: int, latent_shape: Sequence[int], start: Tensor | None, end: Tensor | None
    ) -> dict[str, Tensor]:
        """What the transformer takes besides the noise, ``[B, C, t, h, w]``."""
        config = self.transformer.config
        extra = config.in_channels - config.out_channels
        c, t, h, w = latent_shape
        if extra == 0:
            refuse_images(self.spec, start, end)
            return {}
        if extra == c and end is not None:
            raise ValueError(f"{self.spec.name} takes a start image, and no end image")
        size = (h * self.spec.spatial_stride, w * self.spec.spatial_stride)
        start, end = (fit_image(name, v, batch, size) for name, v in (("start", start), ("end", end)))
        if extra != c:
            frames, factor = (t - 1) * self.spec.temporal_stride + 1, self.vae.config.scaling_factor
            noise = config.add_noise_in_inpaint_model
            given = masked_latents(self.encode, start, end, frames, latent_shape, factor, noise)
        elif start is None:
            given = torch.zeros(1, extra, t, h, w)
        else:
            given = F.pad(self.encode((start * 2 - 1)[:, :, None]).cpu(), (0, 0, 0, 0, 0, t - 1))
        return {"latents": given.expand(batch, -1, -1, -1, -1).to(self.device, self.dtype)}

    def initial_latents(self, latent_shape: Sequence[int], seeds: Sequence[int]) -> Tensor:
        return draw_noise(latent_shape, seeds, self.device)

    def sigmas(self, steps: int) -> Tensor:
        return self.solver.sigmas(steps)

    def predict(self, x: Tensor, sigma: Tensor, branch: Mapping[str, Tensor]) -> Tensor:
        config = self.transformer.config
        inputs = x.to(self.dtype)
        if "latents" in branch:
            inputs = torch.cat([inputs, branch["latents"]], dim=1)
        rotary = None
        if config.use_rotary_positional_embeddings:
            size = (x.shape[2], x.shape[3] // config.patch_size, x.shape[4] // config.patch_size)
            rotary = rotary_of(config, size, x.device)
        with float64_throughout(self.dtype):
            output = self.transformer(
                hidden_states=inputs.transpose(1, 2),
                encoder_hidden_states=branch["text"],
                timestep=self.solver.timestep(sigma).to(x.device).expand(x.shape[0]),
                image_rotary_emb=rotary,
                return_dict=False,
            )[0]
        return output.transpose(1, 2).to(x.dtype)

    def step(
        self, x: Tensor, prediction: Tensor, sigma: Tensor, sigma_next: Tensor, noise: Tensor | None = None
    ) -> Tensor:
        return self.solver.step(x, prediction, sigma, sigma_next)

    def decode(self, latents: Tensor) -> Tensor:
        """See the protocol. An odd number of latent frames gives 4n+1 frames; two give eight, as in VideoX-Fun."""
        return (self.pixels(latents) / 2 + 0.5).clamp(0, 1)

    def chunks(self, latent_frames: int) -> list[int]:
        """As VideoX-Fun and diffusers split them: what does not divide goes with the first."""
        together = min(self.vae.num_latent_frames_batch_size, latent_frames)
        return [together + latent_frames % together, *[together] * (latent_frames // together - 1)]

    def decode_chunk(
        self, latents: Tensor, carried: Carried = (), *, save_memory: bool = False
    ) -> tuple[Tensor, Carried]:
        parameter = next(self.vae.parameters())
        scaled = (latents / self.vae.config.scaling_factor).to(parameter.device, parameter.dtype)
        if self.vae.post_quant_conv is not None:
            scaled = self.vae.post_quant_conv(scaled)
        row = decoder_stations(self.vae.decoder, scaled)
        pixels, carried = pass_through(row, scaled, carried, lambda: float64_throughout(parameter.dtype), save_memory)
        return (pixels.to(latents.dtype) / 2 + 0.5).clamp(0, 1), carried

    def pixels(self, latents: Tensor) -> Tensor:
        """What the VAE paints, about -1..1 and not clamped."""
        parameter = next(self.vae.parameters())
        scaled = (latents / self.vae.config.scaling_factor).to(parameter.device, parameter.dtype)
        with float64_throughout(parameter.dtype):
            return self.vae.decode(scaled, return_dict=False)[0].to(latents.dtype)

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """Scaled latents (the distribution's mean), at least float32, of ``[B, 3, T, H, W]`` in -1..1."""
        parameter = next(self.vae.parameters())
        with float64_throughout(parameter.dtype):
            latents = self.vae.encode(frames.to(parameter.device, parameter.dtype)).latent_dist.mode()
        return latents.to(torch.promote_types(latents.dtype, torch.float32)) * self.vae.config.scaling_factor

    def to(self, device: torch.device | str, *parts: str) -> None:
        modules = {"text": self.text_encoder, "denoiser": self.transformer, "vae": self.vae}
        move(modules, device, parts)


def rotary_of(config: Any, size: tuple[int, int, int], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """The rotary tables of a transformer's configuration at ``size`` ``(t, h, w)`` in patches."""
    base = (config.sample_height // config.patch_size, config.sample_width // config.patch_size)
    return rotary_tables(config.attention_head_dim, size, base, device)


def resize_positions(transformer: nn.Module) -> None:
    """Let a transformer resize the position table of its training size, as VideoX-Fun does; none is left as it is.

    diffusers computes another table for every other size instead, which the InP models never saw, and refuses other
    sizes where the table was learned. Time is not resized: the first frames are taken.
    """
    patch = transformer.patch_embed
    if patch.use_positional_embeddings or patch.use_learned_positional_embeddings:
        patch.use_positional_embeddings = patch.use_learned_positional_embeddings = False
        patch.register_forward_hook(_add_positions)


def _add_positions(patch: nn.Module, inputs: tuple[Tensor, Tensor], embeddings: Tensor) -> Tensor:
    text, latents = inputs
    size = (latents.shape[1], latents.shape[3] // patch.patch_size, latents.shape[4] // patch.patch_size)
    return embeddings + position_table(patch, text.shape[1], size).to(embeddings.dtype)


def position_table(patch: nn.Module, text_tokens: int, size: tuple[int, int, int]) -> Tensor:
    """The position table ``[1, text_tokens + t * h * w, D]`` of a patch embedding at ``size`` ``(t, h, w)`` in patches.

    Raises:
        ValueError: More frames than the table has.
    """
    t0 = (patch.sample_frames - 1) // patch.temporal_compression_ratio + 1
    trained = (t0, patch.sample_height // patch.patch_size, patch.sample_width // patch.patch_size)
    if size[0] > t0:
        raise ValueError(f"the position table has {t0} latent frames, got {size[0]}; paint fewer frames")
    text, video = patch.pos_embedding.split([text_tokens, patch.pos_embedding.shape[1] - text_tokens], dim=1)
    video = video[0].unflatten(0, trained)[: size[0]]
    if size[1:] != trained[1:]:
        video = F.interpolate(video.permute(0, 3, 1, 2), size[1:], mode="bilinear").permute(0, 2, 3, 1)
    return torch.cat([text, video.flatten(0, 2)[None]], dim=1)
