"""Wan2.1 text-to-video, image-to-video and Fun-InP, on diffusers' classes.

Layouts and names: the publisher's ``wan/modules/*.py`` and VideoX-Fun's Fun-InP models; see ``wan_keys``
for how their files become diffusers'.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .protocol import Conditioning, ModelSpec
from .solvers import euler_step, flow_match_sigmas
from .wan_keys import original_module_name

TEXT_TOKENS = 512
"""Text is zero-padded to this many tokens; diffusers counts on it to find the image tokens."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class WanModel:
    """A Wan2.1 model on diffusers' classes. See :class:`.protocol.VideoModel` for every method.

    Text-to-video works with every variant: an image-to-video transformer then gets a zero mask, zero
    masked latents and a zero image embedding, as VideoX-Fun trains it. With a start image (and an end
    image) the mask marks the given frames and CLIP sees the start image alone.

    Args:
        spec: Facts about the model.
        transformer: ``WanTransformer3DModel``.
        vae: ``AutoencoderKLWan``.
        text_encoder, tokenizer: UMT5 and its tokenizer; may be None when embeddings are given.
        image_encoder: ``CLIPVisionModel``, or a function that loads it when the first image arrives.
        shift: Time shift of the flow-matching schedule.
        fingerprint: What identifies the text encoder's weights.
    """

    def __init__(
        self,
        spec: ModelSpec,
        transformer: nn.Module,
        vae: nn.Module,
        text_encoder: nn.Module | None = None,
        tokenizer: Any = None,
        image_encoder: Any = None,
        shift: float = 5.0,
        fingerprint: str = "",
    ) -> None:
        self.spec = spec
        self.denoisers = {"transformer": transformer}
        self.vae, self.text_encoder, self.tokenizer = vae, text_encoder, tokenizer
        self._image_encoder = image_encoder
        self._shift, self._fingerprint = shift, fingerprint
        for module in (transformer, vae, text_encoder):
            if module is not None:
                module.eval().requires_grad_(False)
        mean, std = (torch.tensor(vae.config[key]).view(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std"))
        self._latents_mean, self._latents_std = mean, std

    @property
    def transformer(self) -> nn.Module:
        return self.denoisers["transformer"]

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        # The time embedder stays float32 in diffusers; the blocks carry the model's dtype.
        return self.transformer.patch_embedding.weight.dtype

    def lora_names(self, expert: str) -> dict[str, str]:
        names = (name for name, module in self.denoisers[expert].named_modules() if isinstance(module, nn.Linear))
        # Inside an injected adapter the linear layer is called base_layer; its wrapper has the real name.
        return {name: original_module_name(name) for name in (n.removesuffix(".base_layer") for n in names)}

    def text_fingerprint(self) -> str:
        return hashlib.sha256(f"wan:{self._fingerprint}".encode()).hexdigest()[:16]

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> list[Tensor]:
        if self.text_encoder is None:
            raise RuntimeError(f"{self.spec.name} was loaded without its text encoder; load it with text=True")
        device = next(self.text_encoder.parameters()).device
        tokens = self.tokenizer(
            [" ".join(prompt.split()) for prompt in prompts],
            padding="max_length",
            max_length=TEXT_TOKENS,
            truncation=True,
            add_special_tokens=True,
            return_tensors="pt",
        )
        embeddings = []
        for ids, mask in zip(tokens.input_ids, tokens.attention_mask, strict=True):
            length = int(mask.sum())  # one by one: a prompt's embedding must not depend on its neighbours
            ids, mask = ids[None, :length].to(device), mask[None, :length].to(device)
            embeddings.append(self.text_encoder(ids, mask).last_hidden_state[0])
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
        shared = self._image_conditioning(batch, latent_shape, start_image, end_image)

        def branch(texts: Sequence[Tensor]) -> dict[str, Tensor]:
            padded = [F.pad(text, (0, 0, 0, TEXT_TOKENS - text.shape[0])) for text in texts]
            return {"text": torch.stack(padded).to(self.device, self.dtype), **shared}

        if negative is not None and len(negative) != batch:
            raise ValueError(f"{batch} positive prompts need as many negative ones, got {len(negative)}")
        return Conditioning(branch(positive), None if negative is None else branch(negative))

    def _image_conditioning(
        self, batch: int, latent_shape: Sequence[int], start: Tensor | None, end: Tensor | None
    ) -> dict[str, Tensor]:
        """Mask (4 channels, 1 = given) and masked latents (16), and CLIP's view of the start image."""
        config = self.transformer.config
        extra = config.in_channels - config.out_channels
        if extra == 0:
            if start is not None or end is not None:
                raise ValueError(f"{self.spec.name} is a text-to-video model and takes no start or end image")
            return {}
        _, t, h, w = latent_shape
        stride = self.spec.temporal_stride
        if start is None and end is None:
            masked = torch.zeros(batch, extra, t, h, w)
        else:
            height, width = h * self.spec.spatial_stride, w * self.spec.spatial_stride
            frames = (t - 1) * stride + 1
            video = torch.zeros(1, 3, frames, height, width)  # -1..1, so an absent frame is mid-gray
            mask = torch.zeros(1, 1, frames, h, w)
            for image, index in ((start, 0), (end, frames - 1)):
                if image is not None:
                    image = F.interpolate(image.float().cpu(), (height, width), mode="bicubic", antialias=True)
                    video = video.expand(max(image.shape[0], video.shape[0]), -1, -1, -1, -1).clone()
                    video[:, :, index] = image.clamp(0, 1) * 2 - 1
                    mask[:, :, index] = 1
            # The first latent frame stands for one frame, so its mask is repeated to fill its channel group.
            mask = torch.cat([mask[:, :, :1].expand(-1, -1, stride, -1, -1), mask[:, :, 1:]], dim=2)
            mask = mask.view(1, t, stride, h, w).transpose(1, 2)
            latents = self.encode(video)
            masked = torch.cat([mask.expand(latents.shape[0], -1, -1, -1, -1), latents.cpu()], dim=1)
            masked = masked.expand(batch, -1, -1, -1, -1)
        shared = {"latents": masked.to(self.device, self.dtype)}
        if config.image_dim is not None:
            image = torch.zeros(batch, 257, config.image_dim) if start is None else self._embed_image(start)
            shared["image"] = image.expand(batch, -1, -1).to(self.device, self.dtype)
        return shared

    @torch.no_grad()
    def _embed_image(self, image: Tensor) -> Tensor:
        """CLIP ViT-H tokens of the last but one layer ``[B, 257, 1280]``; bicubic to 224, no crop, as published."""
        if self._image_encoder is None:
            raise RuntimeError(f"{self.spec.name} was loaded without its CLIP image encoder, which a start image needs")
        if not isinstance(self._image_encoder, nn.Module):
            self._image_encoder = self._image_encoder().eval().requires_grad_(False)
        encoder = self._image_encoder
        parameter = next(encoder.parameters())
        size = encoder.config.image_size
        pixels = F.interpolate(image.float(), (size, size), mode="bicubic", align_corners=False)
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
        pixels = ((pixels.cpu() - mean) / std).to(parameter.device, parameter.dtype)
        return encoder(pixels, output_hidden_states=True).hidden_states[-2]

    def initial_latents(self, latent_shape: Sequence[int], seeds: Sequence[int]) -> Tensor:
        noise = [torch.randn(tuple(latent_shape), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(noise).to(self.device)

    def sigmas(self, steps: int) -> Tensor:
        return flow_match_sigmas(steps, self._shift)

    def predict(self, x: Tensor, sigma: Tensor, branch: Mapping[str, Tensor]) -> Tensor:
        inputs = x.to(self.dtype)
        if "latents" in branch:
            inputs = torch.cat([inputs, branch["latents"]], dim=1)
        timestep = (sigma * 1000).to(x.device, torch.float32).expand(x.shape[0])
        output = self.transformer(
            hidden_states=inputs,
            timestep=timestep,
            encoder_hidden_states=branch["text"],
            encoder_hidden_states_image=branch.get("image"),
            return_dict=False,
        )[0]
        return output.to(x.dtype)

    def step(self, x: Tensor, prediction: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        return euler_step(x, prediction, sigma, sigma_next)

    def decode(self, latents: Tensor) -> Tensor:
        parameter = next(self.vae.parameters())
        mean, std = (v.to(latents.device, latents.dtype) for v in (self._latents_mean, self._latents_std))
        pixels = self.vae.decode((latents * std + mean).to(parameter.device, parameter.dtype), return_dict=False)[0]
        return (pixels.to(latents.dtype) / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """Normalised float32 latents (the distribution's mean) of ``[B, 3, T, H, W]`` in -1..1."""
        parameter = next(self.vae.parameters())
        latents = self.vae.encode(frames.to(parameter.device, parameter.dtype)).latent_dist.mode().float()
        mean, std = (v.to(latents.device) for v in (self._latents_mean, self._latents_std))
        return (latents - mean) / std

    def to(self, device: torch.device | str, *parts: str) -> None:
        modules = {"text": self.text_encoder, "denoiser": self.transformer, "vae": self.vae}
        unknown = set(parts) - set(modules)
        if unknown:
            raise ValueError(f"unknown parts {sorted(unknown)}; allowed are {sorted(modules)}")
        for part in parts or modules:
            if modules[part] is not None:
                modules[part].to(device)
