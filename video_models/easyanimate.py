"""EasyAnimate V5 and V5.1, text to video and InP (start and end image), on diffusers' classes.

Sources: aigc-apps/EasyAnimate (arXiv 2405.18991), ``easyanimate/pipeline/pipeline_easyanimate_inpaint.py``. V5 has
two text encoders and DDIM with v-prediction, V5.1 one and flow matching; the transformer and the VAE are alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .common import check_pairs, draw_noise, freeze, linear_names, move, no_text_encoder, refuse_images, short_hash
from .easyanimate_decoder import decoder_stations
from .easyanimate_keys import original_module_name
from .easyanimate_published import as_published
from .easyanimate_text import pack, unpack
from .images import fit_image, masked_latents
from .protocol import Carried, Conditioning, ModelSpec
from .solvers import Ddim, FlowMatch
from .stations import pass_through


@dataclass(frozen=True)
class TextTower:
    """One text encoder.

    Attributes:
        tokens: Every prompt is padded or cut to this many.
        encode: From encoder, tokenizer, prompt and ``tokens`` to ``[tokens, D]``.
        encoder, tokenizer: None when embeddings come from a cache.
    """

    tokens: int
    encode: Callable[[nn.Module, Any, str, int], Tensor]
    encoder: nn.Module | None = None
    tokenizer: Any = None


class EasyAnimateModel:
    """An EasyAnimate V5 or V5.1 model. See :class:`.protocol.VideoModel` for every method.

    A prompt's embedding is one tensor also where two encoders made it: V5's is ``[77 + 256, 2048]``, Bert's tokens
    first and filled up with zeros on the right, so that it goes through the embedding cache as any other;
    :meth:`conditioning` takes it apart.

    Args:
        spec: Facts about the model.
        transformer: ``EasyAnimateTransformer3DModel``; made to compute as published, see ``easyanimate_published``.
        vae: ``AutoencoderKLMagvit``.
        towers: Bert and T5 (V5), or Qwen2-VL (V5.1).
        solver: DDIM (V5) or flow matching (V5.1).
        fingerprint: What identifies the text encoders' weights.
    """

    def __init__(
        self,
        spec: ModelSpec,
        transformer: nn.Module,
        vae: nn.Module,
        towers: Sequence[TextTower],
        solver: Ddim | FlowMatch,
        fingerprint: str = "",
    ) -> None:
        self.spec = spec
        self.denoisers = {"transformer": transformer}
        self.vae = vae
        self._towers, self._solver, self._fingerprint = tuple(towers), solver, fingerprint
        config = as_published(transformer).config
        self._widths = [width for width in (config.text_embed_dim, config.text_embed_dim_t5) if width]
        if len(self._widths) != len(self._towers):
            raise ValueError(
                f"{spec.name}'s transformer takes {len(self._widths)} text encoders, got {len(self._towers)}; "
                "V5 has Bert and T5, V5.1 has Qwen2-VL"
            )
        freeze(transformer, vae, *(tower.encoder for tower in self._towers))

    @property
    def transformer(self) -> nn.Module:
        return self.denoisers["transformer"]

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.proj.weight.dtype

    def lora_names(self, expert: str) -> dict[str, str]:
        return linear_names(self.denoisers[expert], original_module_name)

    def text_fingerprint(self) -> str:
        return short_hash("easyanimate", self._fingerprint)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> list[Tensor]:
        """One embedding a prompt, padded to the full number of tokens: the transformer looks at all of them."""
        if any(tower.encoder is None for tower in self._towers):
            raise no_text_encoder(self.spec)
        return [
            pack([tower.encode(tower.encoder, tower.tokenizer, prompt, tower.tokens) for tower in self._towers])
            for prompt in prompts
        ]

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
        shared = self._image_conditioning(batch, latent_shape, start_image, end_image)

        def branch(texts: Sequence[Tensor]) -> dict[str, Tensor]:
            packed = torch.stack(list(texts)).to(self.device, self.dtype)
            parts = unpack(packed, [tower.tokens for tower in self._towers], self._widths)
            return {**dict(zip(("text", "text_t5"), parts, strict=False)), **shared}

        return Conditioning(branch(positive), None if negative is None else branch(negative))

    def _image_conditioning(
        self, batch: int, latent_shape: Sequence[int], start: Tensor | None, end: Tensor | None
    ) -> dict[str, Tensor]:
        if not self.spec.image_to_video:
            refuse_images(self.spec, start, end)
            return {}
        stride = self.spec.spatial_stride
        size = (latent_shape[2] * stride, latent_shape[3] * stride)
        start, end = (fit_image(name, image, batch, size) for name, image in (("start", start), ("end", end)))
        frames, factor = (latent_shape[1] - 1) * self.spec.temporal_stride + 1, self.vae.config.scaling_factor
        noise = self.transformer.config.add_noise_in_inpaint_model
        latents = masked_latents(self.encode, start, end, frames, latent_shape, factor, noise)
        return {"latents": latents.expand(batch, -1, -1, -1, -1).to(self.device, self.dtype)}

    def initial_latents(self, latent_shape: Sequence[int], seeds: Sequence[int]) -> Tensor:
        return draw_noise(latent_shape, seeds, self.device)

    def sigmas(self, steps: int) -> Tensor:
        return self._solver.sigmas(steps)

    def predict(self, x: Tensor, sigma: Tensor, branch: Mapping[str, Tensor]) -> Tensor:
        timestep = self._solver.timestep(sigma).to(x.device, torch.float32)
        output = self.transformer(
            hidden_states=x.to(self.dtype),
            timestep=timestep.expand(x.shape[0]),
            encoder_hidden_states=branch["text"],
            encoder_hidden_states_t5=branch.get("text_t5"),
            inpaint_latents=branch.get("latents"),
            return_dict=False,
        )[0]
        return output.to(x.dtype)

    def step(
        self, x: Tensor, prediction: Tensor, sigma: Tensor, sigma_next: Tensor, noise: Tensor | None = None
    ) -> Tensor:
        return self._solver.step(x, prediction, sigma, sigma_next)

    def decode(self, latents: Tensor) -> Tensor:
        return (self.pixels(latents) / 2 + 0.5).clamp(0, 1)

    def pixels(self, latents: Tensor) -> Tensor:
        """What the VAE paints, about -1..1 and not clamped."""
        frames, carried = [], ()
        for part in latents.split(self.chunks(latents.shape[2]), dim=2):
            clip, carried = self._paint(part, carried, save_memory=False)
            frames.append(clip)
        return torch.cat(frames, dim=2)

    def chunks(self, latent_frames: int) -> list[int]:
        """The first latent frame alone, then as many together as the publisher's VAE takes."""
        full, rest = divmod(latent_frames - 1, self.vae.num_latent_frames_batch_size)
        return [1, *[self.vae.num_latent_frames_batch_size] * full, *[rest] * (rest > 0)]

    def decode_chunk(
        self, latents: Tensor, carried: Carried = (), *, save_memory: bool = False
    ) -> tuple[Tensor, Carried]:
        pixels, carried = self._paint(latents, carried, save_memory)
        return (pixels / 2 + 0.5).clamp(0, 1), carried

    def _paint(self, latents: Tensor, carried: Carried, save_memory: bool) -> tuple[Tensor, Carried]:
        parameter = next(self.vae.parameters())
        scaled = latents.to(parameter.device, parameter.dtype) / self.vae.config.scaling_factor
        row = decoder_stations(self.vae.decoder)
        pixels, carried = pass_through(row, self.vae.post_quant_conv(scaled), carried, nullcontext, save_memory)
        return pixels.to(latents.dtype), carried

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """Scaled latents (the distribution's mean) of ``[B, 3, T, H, W]`` in -1..1."""
        parameter = next(self.vae.parameters())
        try:
            latents = self.vae.encode(frames.to(parameter.device, parameter.dtype)).latent_dist.mode()
        finally:
            self.vae._clear_conv_cache()  # an interrupted call would leave its features to the next
        return latents.to(torch.promote_types(latents.dtype, torch.float32)) * self.vae.config.scaling_factor

    @property
    def text_encoder(self) -> nn.ModuleList:
        """All of them that were loaded."""
        return nn.ModuleList(tower.encoder for tower in self._towers if tower.encoder is not None)

    def to(self, device: torch.device | str, *parts: str) -> None:
        modules = {"text": self.text_encoder, "denoiser": self.transformer, "vae": self.vae}
        move(modules, device, parts)
