"""VideoCrafter2, text to video, as VADER trains it: our UNet, Stable Diffusion's VAE, OpenCLIP's text features.

Sources: the publisher's ``lvdm`` package (arXiv 2401.09047) and VADER (arXiv 2407.08737). One difference is wanted:
VADER never leaves training mode, so dropout is at work in its videos; here a step gives the same twice, because the
gradient is taken by computing it again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from .common import check_pairs, draw_noise, freeze, linear_names, move, no_text_encoder, refuse_images, short_hash
from .pictures import decode_pictures
from .protocol import Carried, Conditioning, ModelSpec
from .videocrafter_ddim import Diffusion, ddim_sigmas, ddim_step, scaled_diffusion

TEXT_TOKENS = 77
LATENT_SCALE = 0.18215
"""Of the latents the UNet sees to those of the VAE."""


class VideoCrafterModel:
    """VideoCrafter2. See :class:`.protocol.VideoModel` for every method.

    Args:
        spec: Facts about the model.
        unet: :class:`.videocrafter_unet.VideoCrafterUNet`.
        vae: diffusers' ``AutoencoderKL``.
        text_encoder: ``CLIPTextModel`` without its last block; may be None when embeddings are given.
        tokenizer: From a list of prompts to tokens ``[N, 77]``.
        eta: Share of fresh noise in each step, 0..1; 0 for a model whose ``spec.step_noise`` is False.
        conditioning_fps: The frame rate the UNet is told, of both guidance branches.
        diffusion: The noise of every timestep.
        fingerprint: What identifies the text encoder's weights.
    """

    def __init__(
        self,
        spec: ModelSpec,
        unet: nn.Module,
        vae: nn.Module,
        text_encoder: nn.Module | None = None,
        tokenizer: Callable[[list[str]], Tensor] | None = None,
        eta: float = 1.0,
        conditioning_fps: int = 24,
        diffusion: Diffusion | None = None,
        fingerprint: str = "",
    ) -> None:
        self.spec = spec
        self.denoisers = {"transformer": unet}
        self.vae, self.text_encoder, self.tokenizer = vae, text_encoder, tokenizer
        self._eta, self._fps, self._fingerprint = eta, conditioning_fps, fingerprint
        self.diffusion = diffusion or scaled_diffusion()
        freeze(unet, vae, text_encoder)

    @property
    def unet(self) -> nn.Module:
        return self.denoisers["transformer"]

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.out[-1].weight.dtype

    def lora_names(self, expert: str) -> dict[str, str]:
        return linear_names(self.denoisers[expert])

    def text_fingerprint(self) -> str:
        return short_hash("videocrafter2", self._fingerprint)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> list[Tensor]:
        """All 77 tokens ``[77, D]`` a prompt: the UNet was trained to look at the padding too."""
        if self.text_encoder is None or self.tokenizer is None:
            raise no_text_encoder(self.spec)
        device = next(self.text_encoder.parameters()).device
        return [self.text_encoder(self.tokenizer([p]).to(device)).last_hidden_state[0] for p in prompts]

    def conditioning(
        self,
        positive: Sequence[Tensor],
        negative: Sequence[Tensor] | None,
        latent_shape: Sequence[int],
        *,
        start_image: Tensor | None = None,
        end_image: Tensor | None = None,
    ) -> Conditioning:
        refuse_images(self.spec, start_image, end_image)
        check_pairs(positive, negative)
        fps = torch.full((len(positive),), self._fps, device=self.device)

        def branch(texts: Sequence[Tensor]) -> dict[str, Tensor]:
            return {"text": torch.stack([text.to(self.device, self.dtype) for text in texts]), "fps": fps}

        return Conditioning(branch(positive), None if negative is None else branch(negative))

    def initial_latents(self, latent_shape: Sequence[int], seeds: Sequence[int]) -> Tensor:
        return draw_noise(latent_shape, seeds, self.device)

    def sigmas(self, steps: int) -> Tensor:
        """Noise levels of the publisher's timesteps, which are a few more where ``steps`` does not divide 1000.

        The last is that of timestep 0, not 0: the published sampler leaves this much noise in.
        """
        return ddim_sigmas(self.diffusion, steps)

    def predict(self, x: Tensor, sigma: Tensor, branch: Mapping[str, Tensor]) -> Tensor:
        timestep = torch.full((x.shape[0],), self.diffusion.timestep(sigma), device=x.device)
        return self.unet(x.to(self.dtype), timestep, branch["text"], branch["fps"]).to(x.dtype)

    def step(
        self, x: Tensor, prediction: Tensor, sigma: Tensor, sigma_next: Tensor, noise: Tensor | None = None
    ) -> Tensor:
        return ddim_step(self.diffusion, x, prediction, sigma, sigma_next, self._eta, noise)

    def decode(self, latents: Tensor) -> Tensor:
        return torch.cat([self.decode_chunk(frame)[0] for frame in latents.split(1, dim=2)], dim=2)

    def chunks(self, latent_frames: int) -> list[int]:
        return [1] * latent_frames

    def decode_chunk(
        self, latents: Tensor, carried: Carried = (), *, save_memory: bool = False
    ) -> tuple[Tensor, Carried]:
        """As in the protocol. Nothing is carried: the VAE looks at each frame alone."""
        parameter = next(self.vae.parameters())
        scaled = latents.to(parameter.device, parameter.dtype) / LATENT_SCALE
        pixels = decode_pictures(self.vae, scaled, latents.shape[0], save_memory=save_memory)
        return (pixels.to(latents.dtype) / 2 + 0.5).clamp(0, 1), ()

    def to(self, device: torch.device | str, *parts: str) -> None:
        modules = {"text": self.text_encoder, "denoiser": self.unet, "vae": self.vae}
        move(modules, device, parts)
