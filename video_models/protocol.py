"""What every video model family offers to training, nodes and the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

Carried = tuple[Any, ...]
"""What a causal decoder carries from one chunk to the next: tensors, through which gradients pass, and constants."""

Tick = Callable[[str], None]
"""Called with a phase name at least once per model call. May raise to stop the work."""


@dataclass(frozen=True)
class ModelSpec:
    """Facts about one loaded model that callers may rely on.

    Attributes:
        family: Registry name, for example ``wan``.
        name: The model's own name, for example ``Wan2.1-Fun-1.3B-InP``.
        latent_channels: Channels of the latents the solver works on.
        temporal_stride: Frames a latent frame stands for (the first stands for one).
        spatial_stride: Pixels a latent cell is wide.
        size_multiple: Width and height must be multiples of this many pixels.
        image_to_video: Whether a start (and end) image can condition the model.
        lora_targets: Names of modules to train; a name matches itself and any module that ends in
            ``.<name>``. ``("all-linear",)`` stands for every linear layer, as the publishers train.
        width, height, frames, steps, guidance_scale, fps: What the model does well without being asked.
        experts: Names of the networks in ``denoisers``, the noisiest first.
        boundary: With two experts, the smallest ``sigma`` at which the first still works.
        solver: In words, for tables.
        step_noise: Whether the solver adds fresh noise at every step (DDIM with eta above 0).
        recipe: What to start training from: a file in ``recipes/`` without its ending, or empty.
    """

    family: str
    name: str
    latent_channels: int
    temporal_stride: int
    spatial_stride: int
    size_multiple: int
    image_to_video: bool
    lora_targets: tuple[str, ...]
    width: int
    height: int
    frames: int
    steps: int
    guidance_scale: float
    fps: int
    experts: tuple[str, ...] = ("transformer",)
    boundary: float = 0.0
    solver: str = "flow-matching Euler"
    step_noise: bool = False
    recipe: str = ""

    @property
    def frame_rule(self) -> str:
        """Which frame counts there are, for messages; a family with another rule overrides it and the three methods."""
        return "1 or more" if self.temporal_stride == 1 else f"{self.temporal_stride}n+1"

    def nearest_frames(self, frames: int) -> int:
        """The nearest frame count the model can paint."""
        stride = self.temporal_stride
        return max(1, round((frames - 1) / stride) * stride + 1)

    def latent_frames(self, frames: int) -> int:
        """Latent frames of a valid frame count."""
        return (frames - 1) // self.temporal_stride + 1

    def frames_of(self, latents: int) -> int:
        """Frames of so many latent frames, 0 of none."""
        return (latents - 1) * self.temporal_stride + 1 if latents else 0

    def expert_at(self, sigma: float | Tensor) -> str:
        """Which network of ``denoisers`` predicts at a noise level."""
        return self.experts[0] if float(sigma) >= self.boundary else self.experts[-1]

    def check_size(self, width: int, height: int, frames: int) -> None:
        """Raise ``ValueError`` naming the nearest valid size if the model cannot paint this one."""
        multiple = self.size_multiple
        near_width, near_height = (max(multiple, round(v / multiple) * multiple) for v in (width, height))
        near_frames = self.nearest_frames(frames)
        if (width, height) != (near_width, near_height):
            raise ValueError(
                f"width and height must be multiples of {multiple} for {self.name}, "
                f"got {width}x{height}; the nearest is {near_width}x{near_height}"
            )
        if frames != near_frames:
            raise ValueError(
                f"the number of frames must be {self.frame_rule} for {self.name}, "
                f"got {frames}; the nearest is {near_frames}"
            )

    def latent_shape(self, width: int, height: int, frames: int) -> tuple[int, int, int, int]:
        """Shape ``(C, t, h, w)`` of one sample's latents. Raises like :meth:`check_size`."""
        self.check_size(width, height, frames)
        return (
            self.latent_channels,
            self.latent_frames(frames),
            height // self.spatial_stride,
            width // self.spatial_stride,
        )


@dataclass(frozen=True)
class Conditioning:
    """What the denoiser is told besides the latents: one mapping of batch-first tensors a guidance branch.

    Attributes:
        positive: Tensors ``[B, ...]`` of the wanted branch, by the family's own names.
        negative: The same names for the unwanted branch, or None when guidance is off.
    """

    positive: Mapping[str, Tensor] = field(repr=False)
    negative: Mapping[str, Tensor] | None = field(default=None, repr=False)


@runtime_checkable
class VideoModel(Protocol):
    """A loaded video diffusion model. All tensors are batch first; latents are float32 ``[B, C, t, h, w]``.

    ``sigma`` runs from 1 (noise) to 0 (clean). Nothing here keeps state between calls.
    """

    spec: ModelSpec
    denoisers: dict[str, nn.Module]
    """The networks a LoRA may be put into, by expert name; a single one is called ``transformer``."""

    @property
    def device(self) -> torch.device: ...

    def lora_names(self, expert: str) -> dict[str, str]:
        """The publisher's dotted name of every LoRA-capable module of an expert, by its name in our classes."""
        ...

    def text_fingerprint(self) -> str:
        """Changes whenever :meth:`encode_text` would answer differently. Keys the embedding cache."""
        ...

    def encode_text(self, prompts: Sequence[str]) -> list[Tensor]:
        """One embedding ``[L_i, D]`` a prompt, without gradient.

        Cut to its true length where the model pads with zeros; with the padding where the model reads that too.
        """
        ...

    def conditioning(
        self,
        positive: Sequence[Tensor],
        negative: Sequence[Tensor] | None,
        latent_shape: Sequence[int],
        *,
        start_image: Tensor | None = None,
        end_image: Tensor | None = None,
    ) -> Conditioning:
        """Join text embeddings and optional images.

        Args:
            positive: What :meth:`encode_text` returned, one a sample.
            negative: The same for the unwanted branch, one a sample; None turns guidance off.
            latent_shape: ``(C, t, h, w)``.
            start_image, end_image: ``[B, 3, H, W]`` or ``[1, 3, H, W]`` in 0..1.
        """
        ...

    def initial_latents(self, latent_shape: Sequence[int], seeds: Sequence[int]) -> Tensor:
        """Noise ``[B, C, t, h, w]``, one seed a sample, drawn on the CPU so that every device agrees."""
        ...

    def sigmas(self, steps: int) -> Tensor:
        """The ``steps + 1`` noise levels of the solver, float64, decreasing, ending in 0 or the smallest it has.

        Any monotone measure will do from which :meth:`predict` finds its timestep and :meth:`step` its factors;
        for a DDIM model ``sqrt(1 - alpha_bar)``.
        """
        ...

    def predict(self, x: Tensor, sigma: Tensor, branch: Mapping[str, Tensor]) -> Tensor:
        """The denoiser's float32 output for one guidance branch at a scalar ``sigma``."""
        ...

    def step(
        self, x: Tensor, prediction: Tensor, sigma: Tensor, sigma_next: Tensor, noise: Tensor | None = None
    ) -> Tensor:
        """One solver step: pure, and linear in ``x`` and in ``prediction``. To ``sigma_next = 0`` it gives x0.

        ``noise`` is standard normal and shaped like ``x``; it is given to models with ``spec.step_noise`` only.
        """
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Frames ``[B, 3, T, H, W]`` in 0..1 of ``[B, C, t, h, w]``, differentiable."""
        ...

    def chunks(self, latent_frames: int) -> Sequence[int]:
        """How many latent frames each call of :meth:`decode_chunk` gets, in order; one number if it needs all."""
        ...

    def decode_chunk(
        self, latents: Tensor, carried: Carried = (), *, save_memory: bool = False
    ) -> tuple[Tensor, Carried]:
        """Frames of the next latent frames, differentiable; those of all chunks are what :meth:`decode` gives.

        Args:
            latents: ``[B, C, t, h, w]``, t as :meth:`chunks` says.
            carried: What the call before returned; empty at the first chunk.
            save_memory: Checkpoint the blocks of the decoder: another forward pass for the memory of one block.
        """
        ...

    def to(self, device: torch.device | str, *parts: str) -> None:
        """Move named parts (``text``, ``denoiser``, ``vae``), or all of them, to a device."""
        ...
