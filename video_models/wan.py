"""Wan2.1 and Wan2.2 on diffusers' classes: text-to-video, image-to-video, Fun-InP, two experts, and TI2V-5B.

Layouts and names: the publisher's ``wan/modules/*.py`` and VideoX-Fun's Fun-InP models; see ``wan_keys``
for how their files become diffusers'.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..block_weights import bring, residents
from .common import check_pairs, draw_noise, freeze, linear_names, move, no_text_encoder, refuse_images, short_hash
from .images import fit_image
from .precision import float64_throughout
from .protocol import Carried, Conditioning, ModelSpec
from .solvers import euler_step, flow_match_sigmas
from .wan_decoder import decode_frame
from .wan_image import CLIP_TOKENS, clip_tokens, given_frames
from .wan_keys import original_module_name

TEXT_TOKENS = 512
"""Text is zero-padded to this many tokens; diffusers counts on it to find the image tokens."""


def clean_prompt(prompt: str) -> str:
    """Text as the publisher's tokenizer sees it: mended by ftfy where installed, HTML unescaped, single spaces."""
    try:
        import ftfy
    except ImportError:
        pass
    else:
        prompt = ftfy.fix_text(prompt)
    return " ".join(html.unescape(html.unescape(prompt)).split())


def rest(network: nn.Module) -> None:
    """Move a network to the CPU, but for parameters being trained: their gradients and optimizer stay with them."""
    for tensor in residents(network):
        if not tensor.requires_grad:
            tensor.data = tensor.data.to("cpu")


class WanModel:
    """A Wan model on diffusers' classes. See :class:`.protocol.VideoModel` for every method.

    Text-to-video works with every variant: an image-to-video transformer then gets a zero mask, zero
    masked latents and a zero image embedding, as VideoX-Fun trains it. With a start image (and an end
    image) the mask marks the given frames and CLIP sees the start image alone (both in the FLF2V model; Wan2.2
    has no CLIP). The CLIP image encoder stays on the CPU. TI2V-5B, an image-to-video model without channels for
    the image, takes the start image's latents in place of the first latent frame, at timestep 0.

    Of two experts only the one at work is on the device; the other waits on the CPU. So ``device`` is where the
    denoiser works, and what a model's modules lie on may change with every :meth:`predict`.

    Args:
        spec: Facts about the model.
        transformer: ``WanTransformer3DModel``, or one by the name of each of ``spec.experts``.
        vae: ``AutoencoderKLWan``.
        text_encoder, tokenizer: UMT5 and its tokenizer; may be None when embeddings are given.
        image_encoder: ``CLIPVisionModel``, or a function that loads it when the first image arrives.
        shift: Time shift of the flow-matching schedule.
        text_tokens: Text is zero-padded to this many; a model with image tokens needs 512.
        fingerprint: What identifies the text encoder's weights.
    """

    def __init__(
        self,
        spec: ModelSpec,
        transformer: nn.Module | Mapping[str, nn.Module],
        vae: nn.Module,
        text_encoder: nn.Module | None = None,
        tokenizer: Any = None,
        image_encoder: Any = None,
        shift: float = 5.0,
        text_tokens: int = TEXT_TOKENS,
        fingerprint: str = "",
    ) -> None:
        self.spec = spec
        self.denoisers = {"transformer": transformer} if isinstance(transformer, nn.Module) else dict(transformer)
        self.vae, self.text_encoder, self.tokenizer = vae, text_encoder, tokenizer
        self._image_encoder = image_encoder
        self._shift, self._text_tokens, self._fingerprint = shift, text_tokens, fingerprint
        freeze(*self.denoisers.values(), vae, text_encoder)
        mean, std = (torch.tensor(vae.config[key]).view(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std"))
        self._latents_mean, self._latents_std = mean, std
        self._at_work = spec.experts[0]

    @property
    def transformer(self) -> nn.Module:
        """The denoiser at work."""
        return self.denoisers[self._at_work]

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        # The time embedder stays float32 in diffusers; the blocks carry the model's dtype.
        return self.transformer.patch_embedding.weight.dtype

    def put_to_work(self, expert: str) -> nn.Module:
        """The expert, on the device; the one it relieves goes to the CPU, but for what is being trained in it."""
        if expert != self._at_work:
            device, relieved = self.device, self.transformer
            if device.type != "cpu":
                rest(relieved)
            bring(self.denoisers[expert], device)
            self._at_work = expert
        return self.transformer

    def lora_names(self, expert: str) -> dict[str, str]:
        return linear_names(self.denoisers[expert], original_module_name)

    def text_fingerprint(self) -> str:
        return short_hash("wan", self._fingerprint)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> list[Tensor]:
        if self.text_encoder is None:
            raise no_text_encoder(self.spec)
        device = next(self.text_encoder.parameters()).device
        embeddings = []
        for prompt in prompts:  # one by one: a prompt's embedding must not depend on its neighbours
            tokens = self.tokenizer(clean_prompt(prompt), truncation=True, max_length=self._text_tokens).input_ids
            ids = torch.tensor([tokens or [self.tokenizer.pad_token_id or 0]], device=device)
            embeddings.append(self.text_encoder(ids, torch.ones_like(ids)).last_hidden_state[0])
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
            padded = [F.pad(text, (0, 0, 0, self._text_tokens - text.shape[0])) for text in texts]
            return {"text": torch.stack(padded).to(self.device, self.dtype), **shared}

        check_pairs(positive, negative)
        return Conditioning(branch(positive), None if negative is None else branch(negative))

    def _image_conditioning(
        self, batch: int, latent_shape: Sequence[int], start: Tensor | None, end: Tensor | None
    ) -> dict[str, Tensor]:
        """What the transformer is told of the images, by the names :meth:`predict` knows."""
        config, (_, _, h, w) = self.transformer.config, latent_shape
        if not self.spec.image_to_video:
            refuse_images(self.spec, start, end)
            return {}
        size = (h * self.spec.spatial_stride, w * self.spec.spatial_stride)
        start, end = (fit_image(name, v, batch, size) for name, v in (("start", start), ("end", end)))
        if config.in_channels == config.out_channels:
            if end is not None:
                raise ValueError(
                    f"{self.spec.name} begins with an image but cannot end with one; leave the end image out"
                )
            if start is None:
                return {}
            first = self.encode(start[:, :, None] * 2 - 1)
            return {"first": first.expand(batch, -1, -1, -1, -1).to(self.device)}
        given = given_frames(self.encode, start, end, latent_shape, self.spec.temporal_stride)
        shared = {"latents": given.expand(batch, -1, -1, -1, -1).to(self.device, self.dtype)}
        if config.image_dim is not None:
            # The first-last-frame model has positions for two images, the others see one.
            images = [start] if config.pos_embed_seq_len is None else [start, end]
            tokens = [torch.zeros(1, CLIP_TOKENS, config.image_dim) if v is None else self._embed(v) for v in images]
            tokens = torch.cat([v.cpu().expand(batch, -1, -1) for v in tokens], dim=1)
            shared["image"] = tokens.to(self.device, self.dtype)
        return shared

    def _embed(self, image: Tensor) -> Tensor:
        if self._image_encoder is None:
            raise RuntimeError(f"{self.spec.name} was loaded without its CLIP image encoder, which a start image needs")
        if not isinstance(self._image_encoder, nn.Module):
            self._image_encoder = self._image_encoder().eval().requires_grad_(False)
        return clip_tokens(self._image_encoder, image)

    def initial_latents(self, latent_shape: Sequence[int], seeds: Sequence[int]) -> Tensor:
        return draw_noise(latent_shape, seeds, self.device)

    def sigmas(self, steps: int) -> Tensor:
        return flow_match_sigmas(steps, self._shift)

    def predict(self, x: Tensor, sigma: Tensor, branch: Mapping[str, Tensor]) -> Tensor:
        transformer = self.put_to_work(self.spec.expert_at(sigma))
        inputs, first, image = x.to(self.dtype), branch.get("first"), branch.get("image")
        timestep = (sigma * 1000).to(x.device, x.dtype).expand(x.shape[0])
        if "latents" in branch:
            inputs = torch.cat([inputs, branch["latents"]], dim=1)
        if first is not None:
            inputs = torch.cat([first.to(self.dtype), inputs[:, :, 1:]], dim=2)
            _, rows, columns = transformer.config.patch_size
            given = (x.shape[-2] // rows) * (x.shape[-1] // columns)  # tokens of a latent frame
            timestep = timestep[:, None].repeat(1, given * x.shape[2])
            timestep[:, :given] = 0
        if image is not None:
            image = image.reshape(-1, CLIP_TOKENS, image.shape[-1])  # two images of a sample stand in the batch
        with float64_throughout(self.dtype):
            output = transformer(
                hidden_states=inputs,
                timestep=timestep,
                encoder_hidden_states=branch["text"],
                encoder_hidden_states_image=image,
                return_dict=False,
            )[0].to(x.dtype)
        if first is not None:
            # The velocity that leads to the given frame, so that the solver ends in it and in nothing else.
            velocity = (x[:, :, :1] - first.to(x.dtype)) / sigma.to(x.device, x.dtype)
            output = torch.cat([velocity, output[:, :, 1:]], dim=2)
        return output

    def step(
        self, x: Tensor, prediction: Tensor, sigma: Tensor, sigma_next: Tensor, noise: Tensor | None = None
    ) -> Tensor:
        return euler_step(x, prediction, sigma, sigma_next)

    def decode(self, latents: Tensor) -> Tensor:
        frames, carried = [], ()
        for part in latents.split(self.chunks(latents.shape[2]), dim=2):
            clip, carried = self.decode_chunk(part, carried)
            frames.append(clip)
        return torch.cat(frames, dim=2)

    def chunks(self, latent_frames: int) -> list[int]:
        return [1] * latent_frames

    def decode_chunk(
        self, latents: Tensor, carried: Carried = (), *, save_memory: bool = False
    ) -> tuple[Tensor, Carried]:
        parameter = next(self.vae.parameters())
        mean, std = (v.to(latents.device, latents.dtype) for v in (self._latents_mean, self._latents_std))
        scaled = (latents * std + mean).to(parameter.device, parameter.dtype)
        pixels, carried = decode_frame(
            self.vae, scaled, carried, lambda: float64_throughout(parameter.dtype), save_memory
        )
        return (pixels.to(latents.dtype) / 2 + 0.5).clamp(0, 1), carried

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """Normalised latents (the distribution's mean), at least float32, of ``[B, 3, T, H, W]`` in -1..1."""
        parameter = next(self.vae.parameters())
        with float64_throughout(parameter.dtype):
            latents = self.vae.encode(frames.to(parameter.device, parameter.dtype)).latent_dist.mode()
        latents = latents.to(torch.promote_types(latents.dtype, torch.float32))
        mean, std = (v.to(latents.device, latents.dtype) for v in (self._latents_mean, self._latents_std))
        return (latents - mean) / std

    def to(self, device: torch.device | str, *parts: str) -> None:
        modules = {"text": self.text_encoder, "denoiser": self.transformer, "vae": self.vae}
        if not parts or "denoiser" in parts:
            for network in self.denoisers.values():
                if network is not self.transformer:
                    rest(network)
        move(modules, device, parts)
