"""ModelScope text-to-video 1.7b on diffusers' classes.

Sources: arXiv 2308.06571, diffusers' ``TextToVideoSDPipeline``, and VADER (arXiv 2407.08737), which trains it with
rewards. VADER samples with a two-step solver; here it is DDIM, with the same noise schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .common import check_pairs, draw_noise, freeze, linear_names, move, no_text_encoder, refuse_images, short_hash
from .pictures import decode_pictures
from .protocol import Carried, Conditioning, ModelSpec
from .solvers import Ddim


def make_checkpointable(unet: nn.Module) -> nn.Module:
    """Make ``enable_gradient_checkpointing`` work on a ``UNet3DConditionModel``, which diffusers refuses it.

    Its transformer blocks know what to do; the residual blocks and temporal convolutions learn it here.
    """
    from diffusers.models.resnet import ResnetBlock2D, TemporalConvLayer

    for module in unet.modules():
        if isinstance(module, (ResnetBlock2D, TemporalConvLayer)):
            module.gradient_checkpointing = False
            module.forward = partial(_forward, module)
    unet._supports_gradient_checkpointing = True
    return unet


def _forward(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    plain = partial(type(module).forward, module, **kwargs)
    if torch.is_grad_enabled() and module.gradient_checkpointing:
        return module._gradient_checkpointing_func(plain, *args)
    return plain(*args)


class ModelScopeModel:
    """ModelScope text-to-video. See :class:`.protocol.VideoModel` for every method.

    Any number of frames: each is a latent of its own. The UNet looks at all 77 text tokens, padding too.

    Args:
        spec: Facts about the model.
        unet: ``UNet3DConditionModel``; it has dropout, so it must stay in eval mode.
        vae: ``AutoencoderKL``.
        solver: Its noise schedule.
        text_encoder: ``CLIPTextModel``; may be None when embeddings are given.
        tokenize: From a prompt to the numbers of its 77 tokens, padding too.
        fingerprint: What identifies the text encoder's weights.
    """

    def __init__(
        self,
        spec: ModelSpec,
        unet: nn.Module,
        vae: nn.Module,
        solver: Ddim,
        text_encoder: nn.Module | None = None,
        tokenize: Callable[[str], Sequence[int]] | None = None,
        fingerprint: str = "",
    ) -> None:
        self.spec = spec
        self.denoisers = {"transformer": make_checkpointable(unet)}
        self.vae, self.text_encoder = vae, text_encoder
        self._tokenize, self._solver, self._fingerprint = tokenize, solver, fingerprint
        freeze(unet, vae, text_encoder)

    @property
    def unet(self) -> nn.Module:
        return self.denoisers["transformer"]

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.conv_in.weight.dtype

    def lora_names(self, expert: str) -> dict[str, str]:
        return linear_names(self.denoisers[expert])

    def text_fingerprint(self) -> str:
        return short_hash("modelscope", self._fingerprint)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> list[Tensor]:
        """All tokens ``[77, D]`` a prompt: the UNet was trained to look at the padding too."""
        if self.text_encoder is None or self._tokenize is None:
            raise no_text_encoder(self.spec)
        device = self.text_encoder.device
        ids = (torch.tensor([list(self._tokenize(prompt))], device=device) for prompt in prompts)
        return [self.text_encoder(one).last_hidden_state[0] for one in ids]  # a prompt depends on no neighbour

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

        def branch(texts: Sequence[Tensor]) -> dict[str, Tensor]:
            return {"text": torch.stack(list(texts)).to(self.device, self.dtype)}

        return Conditioning(branch(positive), None if negative is None else branch(negative))

    def initial_latents(self, latent_shape: Sequence[int], seeds: Sequence[int]) -> Tensor:
        return draw_noise(latent_shape, seeds, self.device)

    def sigmas(self, steps: int) -> Tensor:
        """The last is that of timestep 0, not 0: the published scheduler leaves this much noise in."""
        return self._solver.sigmas(steps)

    def predict(self, x: Tensor, sigma: Tensor, branch: Mapping[str, Tensor]) -> Tensor:
        timestep = self._solver.timestep(sigma).to(x.device).expand(x.shape[0])
        return self.unet(x.to(self.dtype), timestep, branch["text"], return_dict=False)[0].to(x.dtype)

    def step(
        self, x: Tensor, prediction: Tensor, sigma: Tensor, sigma_next: Tensor, noise: Tensor | None = None
    ) -> Tensor:
        return self._solver.step(x, prediction, sigma, sigma_next)

    def decode(self, latents: Tensor) -> Tensor:
        return torch.cat([self.decode_chunk(frame)[0] for frame in latents.split(1, dim=2)], dim=2)

    def chunks(self, latent_frames: int) -> list[int]:
        return [1] * latent_frames

    def decode_chunk(
        self, latents: Tensor, carried: Carried = (), *, save_memory: bool = False
    ) -> tuple[Tensor, Carried]:
        """As in the protocol. Nothing is carried: the VAE looks at each frame alone."""
        parameter = next(self.vae.parameters())
        scaled = latents.to(parameter.device, parameter.dtype) / self.vae.config.scaling_factor
        pixels = decode_pictures(self.vae, scaled, latents.shape[0], save_memory=save_memory)
        return (pixels.to(latents.dtype) / 2 + 0.5).clamp(0, 1), ()

    def to(self, device: torch.device | str, *parts: str) -> None:
        modules = {"text": self.text_encoder, "denoiser": self.unet, "vae": self.vae}
        move(modules, device, parts)
